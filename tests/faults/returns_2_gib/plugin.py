"""Returns more than anybody takes, with memory enough to make it."""


class Plugin:
    def __init__(self, context): ...

    def validate(self): ...

    def work(self) -> bytes:
        return bytes(2 << 30)
