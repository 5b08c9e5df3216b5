"""Loads a shared library that is not there."""

import ctypes

LIBRARY = ctypes.CDLL("libnothere.so.9")
