"""The bundled tracker on a clip: its plugin through the sandbox, and in turn with it, its class called directly.

python -m benchmarks.probes.tracking CLIP FOLDER     # the class: tracks the clip once for each line it is sent
"""

from __future__ import annotations

import asyncio
import logging
import subprocess
import sys
import time
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import IO

from benchmarks.harness import ROOT
from benchmarks.probes import Plan
from benchmarks.probes.hosting import hosting, run
from benchmarks.stats import percentile

PLUGIN = ROOT / "plugins" / "motion_tracker"
_WARM, _TURNS = 1, 5


def clip(plan: Plan) -> dict[str, float]:
    """The median time that the clip takes through `Engine.stream`, item by item, and in-process."""
    with _in_process(plan) as direct:
        return run(_clip(plan, direct))


async def _clip(plan: Plan, direct: _Direct) -> dict[str, float]:
    folder = plan.folder / "plugins"
    folder.mkdir()
    (folder / PLUGIN.name).symlink_to(PLUGIN, target_is_directory=True)
    async with hosting(folder) as engine:
        found: list[float] = []
        beside: list[float] = []
        for _ in range(_WARM + _TURNS):
            started_s = time.perf_counter()
            frames = 0
            async for _ in engine.stream(PLUGIN.name, "track", {"video": plan.clip}):
                frames += 1
            found.append(time.perf_counter() - started_s)
            took_s, counted = await asyncio.to_thread(direct.track)
            beside.append(took_s)
            if counted != frames:
                raise RuntimeError(f"{frames} frames through the sandbox, {counted} in-process")
    return {
        "clip_s": percentile(found[_WARM:], 0.5),
        "in_process_s": percentile(beside[_WARM:], 0.5),
        "frames": frames,
    }


class _Direct:
    """The plugin's class, in a process of its own that does nothing else."""

    def __init__(self, asked: IO[str], told: IO[str]) -> None:
        self._asked, self._told = asked, told

    def track(self) -> tuple[float, int]:
        """Seconds that the clip took, and its frames. Raises RuntimeError: the process ended."""
        self._asked.write("\n")
        self._asked.flush()
        if not (line := self._told.readline()):
            raise RuntimeError("the tracker failed in-process")
        took_s, frames = line.split()
        return float(took_s), int(frames)


@contextmanager
def _in_process(plan: Plan) -> Iterator[_Direct]:
    command = [sys.executable, "-m", "benchmarks.probes.tracking", str(plan.clip), str(plan.folder)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        yield _Direct(process.stdin, process.stdout)


def _serve(video: Path, folder: Path) -> None:
    """With the settings of the manifest."""
    sys.path.insert(0, str(PLUGIN))
    manifest = tomllib.loads((PLUGIN / "plugin.toml").read_text())
    context = SimpleNamespace(
        settings=manifest["settings"], models={}, scratch=folder, log=logging.getLogger("tracker")
    )
    tracker = import_module("plugin").MotionTracker(context)
    tracker.validate()
    for _ in sys.stdin:
        started_s = time.perf_counter()
        frames = sum(1 for _ in tracker.track(video, progress=_ignore))
        print(time.perf_counter() - started_s, frames, flush=True)


def _ignore(_done: float, _total: float) -> None:
    """Progress, as the sandbox passes it on where nobody asked for it."""


if __name__ == "__main__":
    _serve(Path(sys.argv[1]), Path(sys.argv[2]))
