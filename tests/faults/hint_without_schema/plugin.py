"""A type hint that no caller could fill."""

import threading


class Plugin:
    def __init__(self, context): ...

    def validate(self): ...

    def work(self, lock: threading.Event) -> None: ...
