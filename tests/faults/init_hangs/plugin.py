"""Never comes back from `__init__`."""


class Plugin:
    def __init__(self, context):
        while True:
            pass

    def validate(self): ...

    def work(self) -> None: ...
