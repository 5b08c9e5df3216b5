"""Not Python."""


def detect(frame)
    return frame
