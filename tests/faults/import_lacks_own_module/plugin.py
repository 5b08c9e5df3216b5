"""Imports, from its own package, a module that was forgotten: a bug of the plugin, not of the machine."""

from detection import forgotten


class Plugin:
    def __init__(self, context):
        self.forgotten = forgotten
