"""Hides in `__init__` that it could not load its model; `validate` finds out."""

import contextlib
from pathlib import Path


class Plugin:
    def __init__(self, context):
        self.model = None
        with contextlib.suppress(OSError):
            self.model = Path("/nonexistent/model.bin").read_bytes()

    def validate(self):
        if self.model is None:
            raise RuntimeError("the model was not loaded")

    def work(self) -> None: ...
