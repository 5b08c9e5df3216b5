"""Reads address zero while it is imported."""

import ctypes


def read_nowhere():
    return ctypes.string_at(0)


read_nowhere()
