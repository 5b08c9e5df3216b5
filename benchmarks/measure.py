"""Runs one probe in a process of its own, and ends whatever is left of it."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
from contextlib import suppress
from pathlib import Path

import msgspec

from benchmarks.harness import ROOT, Watch
from benchmarks.probes import Plan
from engine.settings import ENV_PREFIX

_TOLD_LINES = 3
PROBE_S = 120.0  # for one probe, start and end included


class NotMeasured(Exception):
    """A probe that did not come to its end; the last thing it said."""


def run(name: str, plan: Plan, deadline_s: float = PROBE_S) -> dict[str, float]:
    """The figures of one probe. `plan.place` is where its own folder is made.

    Raises:
        NotMeasured: it failed, or took longer than `deadline_s`.
    """
    folder = Path(tempfile.mkdtemp(prefix="holdfast-bench-", dir=plan.folder))
    try:
        plan = msgspec.structs.replace(plan, place=str(folder))
        (folder / "plan.json").write_bytes(msgspec.json.encode(plan))
        with (folder / "output").open("wb") as output:
            process = subprocess.Popen(
                [sys.executable, "-m", "benchmarks.probe", name, str(folder)],
                cwd=ROOT,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env=_environment(),
                start_new_session=True,  # its process group is ended as a whole
            )
        try:
            # Waited for, not watched: whoever looks at processes takes time from what is measured.
            status = process.wait(deadline_s)
        except subprocess.TimeoutExpired:
            raise NotMeasured(f"not done after {deadline_s:g} s") from None
        finally:
            _end(process)
        if status:
            raise NotMeasured(_tail(folder) or f"exit status {status}")
        return msgspec.json.decode((folder / "figures.json").read_bytes(), type=dict[str, float])
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _end(process: subprocess.Popen[bytes]) -> None:
    """The process group, and where it did not end by itself also what left that group."""
    watch = Watch(process.pid) if process.poll() is None else None
    if watch is not None:
        watch.look()
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    if watch is not None:
        watch.kill()


def _environment() -> dict[str, str]:
    """Without settings of an engine: its defaults are measured, and a server refuses what it does not know.

    And without the one that keeps Python from keeping what it compiles: that is a default as well, and many
    containers take it away.
    """
    kept = {name: value for name, value in os.environ.items() if not name.startswith(ENV_PREFIX)}
    kept.pop("PYTHONDONTWRITEBYTECODE", None)
    return kept


def _tail(folder: Path) -> str:
    """The last of what it said, tracebacks' inner lines left out."""
    lines = (folder / "output").read_text(errors="replace").splitlines()
    told = [line for line in lines if line.strip() and not line.startswith((" ", "Traceback "))]
    return " · ".join(told[-_TOLD_LINES:])
