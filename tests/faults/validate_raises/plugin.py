"""Its own check says no, with a reason."""


class Plugin:
    def __init__(self, context): ...

    def validate(self):
        raise ValueError("the weights are of another model")

    def work(self) -> None: ...
