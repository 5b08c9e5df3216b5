"""Hides in `__init__` that it could not load its model; `validate` finds out."""


class Plugin:
    def __init__(self, context):
        self.model = None
        try:
            self.model = open("/nonexistent/model.bin").read()  # noqa: PTH123, SIM115
        except OSError:
            pass

    def validate(self):
        if self.model is None:
            raise RuntimeError("the model was not loaded")

    def work(self) -> None: ...
