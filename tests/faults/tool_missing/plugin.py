"""Its manifest names a tool that the class does not have."""


class Plugin:
    def __init__(self, context): ...

    def validate(self): ...
