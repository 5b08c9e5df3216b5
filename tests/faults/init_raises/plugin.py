"""Raises in `__init__`."""


class Plugin:
    def __init__(self, context):
        self.labels = {"car": 0}["truck"]

    def validate(self): ...

    def work(self) -> None: ...
