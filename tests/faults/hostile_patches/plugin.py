"""Replaces what the worker itself may use."""

import builtins
import gc
import json
import os
import socket
import sys
import threading

import msgspec


def broken(*_args, **_kwargs):
    raise RuntimeError("patched")


class Plugin:
    def __init__(self, context): ...

    def validate(self): ...

    def patches_json(self) -> str:
        json.dumps = json.loads = json.JSONEncoder = json.JSONDecoder = broken
        return "patched"

    def patches_msgspec(self) -> str:
        for module in (msgspec, msgspec.json, msgspec.msgpack):
            for name in ("encode", "decode", "convert", "Encoder", "Decoder", "Struct", "Raw", "defstruct"):
                if hasattr(module, name):
                    setattr(module, name, broken)
        return "patched"

    def patches_os(self) -> str:
        for name in ("write", "read", "close", "getpid", "kill", "fstat", "open", "fork"):
            setattr(os, name, broken)
        return "patched"

    def patches_socket(self) -> str:
        socket.socket.sendall = socket.socket.send = socket.socket.recv = broken
        socket.socket = broken
        return "patched"

    def patches_threads_and_the_collector(self) -> str:
        threading.Lock = threading.RLock = threading.get_ident = broken
        gc.collect = gc.disable = broken
        return "patched"

    def patches_builtins(self) -> str:
        builtins.isinstance = builtins.len = builtins.bytes = broken
        return "patched"

    def empties_the_modules(self) -> str:
        sys.modules.clear()
        return "emptied"

    def traces_everything(self) -> str:
        sys.settrace(broken)
        sys.setprofile(broken)
        return "traced"
