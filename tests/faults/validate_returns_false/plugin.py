"""Its own check says no, without a reason."""


class Plugin:
    def __init__(self, context): ...

    def validate(self):
        return False

    def work(self) -> None: ...
