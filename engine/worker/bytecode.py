"""What a plugin's modules are compiled to, kept beside them for the next start.

In `__pycache__`, as Python does, but checked by the source's content and not by its age (PEP 552): an edit shows,
however soon it comes. Where it cannot be written, nothing is kept. A start does not wait for it: see `write`.
"""

from __future__ import annotations

import _imp
import contextlib
import marshal
import os
import sys
from collections.abc import Callable
from functools import partial
from importlib.machinery import (
    BYTECODE_SUFFIXES,
    EXTENSION_SUFFIXES,
    SOURCE_SUFFIXES,
    ExtensionFileLoader,
    FileFinder,
    SourceFileLoader,
    SourcelessFileLoader,
)
from importlib.util import MAGIC_NUMBER, cache_from_source, source_hash
from types import CodeType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from importlib.abc import PathEntryFinder

_FLAGS = (0b11).to_bytes(4, "little")  # PEP 552: it bears the source's hash, and that is looked at


def header(source: bytes) -> bytes:
    """How a `.pyc` file begins that is checked by this source."""
    return MAGIC_NUMBER + _FLAGS + source_hash(source)


def pyc(begins: bytes, code: CodeType) -> bytes:
    """The content of a `.pyc` file with that header."""
    return begins + marshal.dumps(code)


class Keeping(SourceFileLoader):
    """Python's own, but for what it keeps, and what of that it trusts."""

    def get_code(self, fullname: str) -> CodeType:  # noqa: ARG002
        """As it is kept, if that is of this very source; else compiled, and kept by `write`."""
        source, file = self.get_data(self.path), cache_from_source(self.path)
        begins = header(source)
        code = self._kept(file, begins)
        if code is None:
            code = self.source_to_code(source, self.path)
            if not sys.flags.dont_write_bytecode:  # as the operator's environment says
                _unwritten.append(partial(self._keep, file, begins, code))
        return code

    def __reduce__(self) -> tuple[type[SourceFileLoader], tuple[str, str]]:
        return SourceFileLoader, (self.name, self.path)  # a plugin that unpickles it cannot import us

    def _keep(self, file: str, begins: bytes, code: CodeType) -> None:
        with contextlib.suppress(OSError, ValueError, MemoryError):  # nested too deeply for `marshal`; or no room
            mode = os.stat(self.path).st_mode  # noqa: PTH116 - `Path` takes pages
            # What a full disk cuts short is found to be damaged when it is read.
            self.set_data(file, pyc(begins, code), _mode=mode | 0o200)

    def _kept(self, file: str, begins: bytes) -> CodeType | None:
        with contextlib.suppress(OSError, EOFError, TypeError, ValueError, MemoryError):  # none there, or damaged
            content = self.get_data(file)
            if content.startswith(begins):
                # Who could change it could change the source.
                code = marshal.loads(memoryview(content)[len(begins) :])  # noqa: S302
                if isinstance(code, CodeType):
                    # As Python does: the folder may have been moved.
                    _imp._fix_co_filename(code, self.path)  # type: ignore[attr-defined]  # noqa: SLF001
                    return code
        return None


_unwritten: list[Callable[[], None]] = []


def write() -> None:
    """Keep what was compiled."""
    while _unwritten:
        _unwritten.pop()()


# In the order of Python's own, for what else a folder may have.
_finder_of = FileFinder.path_hook(
    (ExtensionFileLoader, EXTENSION_SUFFIXES),
    (Keeping, SOURCE_SUFFIXES),
    (SourcelessFileLoader, BYTECODE_SUFFIXES),
)


def install(folder: str) -> None:
    """For the modules of this folder, and of those in it; before the first is imported."""
    place = os.path.normpath(folder)

    def hook(path: str) -> PathEntryFinder:
        # A folder beside it may be named by way of `..`.
        whole = os.path.normpath(path) if isinstance(path, str) else ""
        if whole != place and not whole.startswith(f"{place}/"):
            raise ImportError(path)
        return _finder_of(path)

    # Just before Python's own; what somebody has put before that, often made by the same function, stays there.
    alike = [at for at, made in enumerate(sys.path_hooks) if getattr(made, "__name__", "") == _finder_of.__name__]
    sys.path_hooks.insert(alike[-1] if alike else 0, hook)
    sys.path_importer_cache.pop(folder, None)
