"""Model files a plugin declares: there, readable, and plausibly a model. Only ends of a file are read."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import BinaryIO

from engine.errors import ReasonCode
from engine.loader import model_formats as formats
from engine.loader.archives import safetensors_problem, zip_problem
from engine.loader.findings import Finding
from engine.loader.manifest import Manifest
from engine.loader.manifest_values import leaves_folder
from engine.loader.regular_files import NotRegular, open_regular, read_exactly, why
from engine.loader.toml_source import printable

_VARIABLE = re.compile(r"\$\{([A-Za-z_][A-Za-z0-9_]*)\}")
_PEEK_BYTES = 1024  # enough to tell a web page that begins with a comment


def resolve_models(manifest: Manifest, folder: Path, env: Mapping[str, str] | None = None) -> dict[str, Path]:
    """Model name → absolute path, in the manifest's order.

    Relative to `folder` (the plugin's own), with `${VAR}` taken from `env` (the process's, if None). A model
    that `check_models` refuses by its path alone (variable not set, leaves the folder) is left out.
    """
    resolved = ((name, _resolve(file, folder, env)) for name, file in manifest.models.items())
    return {name: path for name, path in resolved if isinstance(path, Path)}


def check_models(manifest: Manifest, folder: Path, env: Mapping[str, str] | None = None) -> list[Finding]:
    """What is wrong with each model, at most one finding for each, in the manifest's order.

    Reads the file system and never blocks on a pipe, but may on a slow disk: call it in a thread.
    """
    findings = []
    for name, file in manifest.models.items():
        path = _resolve(file, folder, env)
        problem = _problem(path) if isinstance(path, Path) else path
        if problem:
            code, text = problem
            reason = printable(f"model `{name}` {text}", 2000)
            findings.append(Finding(check="models", reason_code=code, reason=reason, subject=name))
    return findings


_Problem = tuple[ReasonCode, str]
"""A code, and text that continues "model `detector` …"."""


def _resolve(file: str, folder: Path, env: Mapping[str, str] | None) -> Path | _Problem:
    known = os.environ if env is None else env
    unset = [name for name in _VARIABLE.findall(file) if not known.get(name)]
    if unset:
        fact = f"is in {file}, but the variable {unset[0]} is not set"
        return ReasonCode.MODEL_MISSING, f"{fact}; set it in the engine's environment and restart the engine"
    expanded = _VARIABLE.sub(lambda match: known[match[1]], file)
    if leaves_folder(expanded):
        fact = f"is in {expanded}, which leaves the plugin's folder"
        return ReasonCode.MODEL_UNREADABLE, f"{fact}; use an absolute path"
    return folder / expanded


def _problem(path: Path) -> _Problem | None:
    try:
        with open_regular(path) as file:
            problem = _content_problem(file, path)
    except (FileNotFoundError, NotADirectoryError):
        return ReasonCode.MODEL_MISSING, _missing(path)
    except NotRegular as error:
        return ReasonCode.MODEL_UNREADABLE, f"is {error}, not a file: {path}; put the model file there"
    except (OSError, ValueError) as error:  # ValueError: a path that no file can have
        words = why(error) if isinstance(error, OSError) else str(error)
        step = "make it readable for the engine's user, or correct the path"
        return ReasonCode.MODEL_UNREADABLE, f"cannot be read ({words}): {path}; {step}"
    return problem and (ReasonCode.MODEL_CORRUPT, f"{problem[0]}: {path}; {problem[1]}")


def _missing(path: Path) -> str:
    if path.is_symlink():
        return f"is missing: {path} is a link to {path.readlink()}, which does not exist; put the file there"
    return f"is missing: {path}; put the file there, or correct the path in plugin.toml"


_AGAIN = "download or copy it again"


def _content_problem(file: BinaryIO, path: Path) -> tuple[str, str] | None:
    """(fact, next step) if this is no model file that could be loaded whole."""
    size = os.fstat(file.fileno()).st_size
    peek = read_exactly(file, _PEEK_BYTES)
    head = peek[: formats.HEAD_BYTES]
    if formats.LFS_POINTER.match(peek):
        return "is a Git LFS pointer, not the file itself", "run `git lfs pull`"
    if not peek:
        return "is empty", _AGAIN
    if formats.WEB_PAGE.match(peek):
        return "is a web page (HTML)", "download the file itself, perhaps after signing in"
    if error := formats.STORE_ERROR.match(peek):
        return (
            f"is a file store's error message ({error[1].decode()})",
            "correct the link and download it again",
        )
    if len(head) < formats.HEAD_BYTES:
        return f"is {len(head)} bytes long, too short for a model", _AGAIN
    if not any(head):
        return "begins with zeros, as a download that did not finish", _AGAIN
    extension = path.suffix.lower()
    form = formats.format_of(head, extension)
    promised = formats.promised(extension)
    if promised and (form is None or form.name not in promised):
        found = f"is {form.name}" if form else f"begins with {head[:8].hex(' ')}"
        return f"{found}, but a {extension} file is {' or '.join(promised)}", _AGAIN
    if form is not None and form.name in _WHOLE and (problem := _WHOLE[form.name](file, size)):
        return problem, _AGAIN
    return None


_WHOLE = {formats.ZIP: zip_problem, formats.SAFETENSORS: safetensors_problem}
"""Formats that state their own length."""
