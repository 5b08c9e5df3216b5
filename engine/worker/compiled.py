"""What a plugin's modules are compiled to is kept beside them: to compile is an eighth of a short start, and takes
seconds where a plugin is large.

In `__pycache__`, as Python does, and checked by the source's content instead of its age (PEP 552): an edit shows
however soon it comes, and whoever else imports the module gains, too. Where it cannot be written, nothing is kept.
"""

from __future__ import annotations

import marshal
import sys
from collections.abc import Callable
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
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from importlib.abc import PathEntryFinder

_CHECKED_BY_CONTENT = (0b11).to_bytes(4, "little")


def kept(source: bytes, code: CodeType) -> bytes:
    """A `.pyc` file."""
    return b"".join((MAGIC_NUMBER, _CHECKED_BY_CONTENT, source_hash(source), marshal.dumps(code)))


class _Keeping(SourceFileLoader):
    def get_code(self, fullname: str) -> CodeType | None:
        """Of what is kept, if it fits the source."""
        try:
            return super().get_code(fullname)
        except (EOFError, TypeError, ValueError):  # what is kept was cut short
            return self.source_to_code(self.get_data(self.path), self.path)

    def source_to_code(self, data: Any, path: Any, *, _optimize: int = -1) -> CodeType:  # type: ignore[override]
        """Called where nothing is kept that fits the source."""
        code = super().source_to_code(data, path, _optimize=_optimize)
        self.set_data(cache_from_source(path), kept(data, code))  # whole or not at all; raises nothing
        return code


# In the order of Python's own, for what else a folder may have.
_find_in = FileFinder.path_hook(
    (ExtensionFileLoader, EXTENSION_SUFFIXES),
    (_Keeping, SOURCE_SUFFIXES),
    (SourcelessFileLoader, BYTECODE_SUFFIXES),
)


def keep(folder: str) -> None:
    """Keep what the modules of this folder, and of those in it, are compiled to."""
    sys.path_hooks.insert(0, _of(folder))
    sys.path_importer_cache.pop(folder, None)


def _of(folder: str) -> Callable[[str], PathEntryFinder]:
    below = f"{folder}/"

    def hook(path: str) -> PathEntryFinder:
        if path != folder and not path.startswith(below):
            raise ImportError(path)
        return _find_in(path)

    return hook
