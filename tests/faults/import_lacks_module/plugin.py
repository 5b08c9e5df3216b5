"""Needs, two modules down, a package that nobody declared."""

from detection import boxes


class Plugin:
    def __init__(self, context):
        self.boxes = boxes

    def validate(self): ...

    def work(self) -> None: ...
