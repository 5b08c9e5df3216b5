"""Its own check never ends, in C."""

import ctypes


class Plugin:
    def __init__(self, context): ...

    def validate(self):
        while True:
            ctypes.CDLL(None).sleep(1000)

    def work(self) -> None: ...
