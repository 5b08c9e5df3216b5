"""Asks for 4 GiB while it is imported."""

TABLE = bytearray(4 << 30)
