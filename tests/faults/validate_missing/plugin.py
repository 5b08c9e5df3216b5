"""Has no check of its own."""


class Plugin:
    def __init__(self, context): ...

    def work(self) -> None: ...
