"""Imports a module of its own that is no Python."""

import broken_syntax


class Plugin:
    def __init__(self, context):
        self.module = broken_syntax
