"""A type hint names what does not exist."""


class Plugin:
    def __init__(self, context): ...

    def validate(self): ...

    def work(self, box: "Rectangle") -> None: ...  # noqa: F821
