"""A package of the plugin's own; `forgotten` is not in it."""

from detection.forgotten import boxes

__all__ = ["boxes"]
