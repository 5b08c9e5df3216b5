"""The child's side: the fork server, and the worker it forks for each plugin.

Nothing here imports more than the wire format, msgspec and the standard library.
"""
