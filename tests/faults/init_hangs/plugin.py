"""Never comes back from `__init__`."""

import itertools


class Plugin:
    def __init__(self, context):
        sum(itertools.repeat(0))

    def validate(self): ...

    def work(self) -> None: ...
