"""The bundled tracker on a clip: its class called in this process, and its plugin through the sandbox."""

from __future__ import annotations

import logging
import sys
import time
import tomllib
from importlib import import_module
from types import SimpleNamespace

from benchmarks.harness import ROOT
from benchmarks.probes import Plan
from benchmarks.probes.hosting import hosting, run

PLUGIN = ROOT / "plugins" / "motion_tracker"
CLIP = PLUGIN / "sample.mp4"
_WARM = 1
_TIMES = 2


def in_process(plan: Plan) -> dict[str, float]:
    """The plugin's class, imported here, with the settings of its manifest."""
    sys.path.insert(0, str(PLUGIN))
    manifest = tomllib.loads((PLUGIN / "plugin.toml").read_text())
    context = SimpleNamespace(
        settings=manifest["settings"], models={}, scratch=plan.folder, log=logging.getLogger("tracker")
    )
    tracker = import_module("plugin").MotionTracker(context)
    tracker.validate()
    best_s, frames = float("inf"), 0
    for turn in range(_WARM + _TIMES):
        started_s = time.perf_counter()
        frames = sum(1 for _ in tracker.track(plan.clip, progress=_ignore))
        if turn >= _WARM:
            best_s = min(best_s, time.perf_counter() - started_s)
    return {"clip_s": best_s, "frames": frames}


def _ignore(_done: float, _total: float) -> None:
    """Progress, as the sandbox passes it on where nobody asked for it."""


def sandboxed(plan: Plan) -> dict[str, float]:
    """The same through `Engine.stream`, item by item."""
    return run(_sandboxed(plan))


async def _sandboxed(plan: Plan) -> dict[str, float]:
    folder = plan.folder / "plugins"
    folder.mkdir()
    (folder / PLUGIN.name).symlink_to(PLUGIN, target_is_directory=True)
    async with hosting(folder) as engine:
        best_s, frames = float("inf"), 0
        for turn in range(_WARM + _TIMES):
            started_s = time.perf_counter()
            frames = 0
            async for _ in engine.stream(PLUGIN.name, "track", {"video": plan.clip}):
                frames += 1
            if turn >= _WARM:
                best_s = min(best_s, time.perf_counter() - started_s)
        return {"clip_s": best_s, "frames": frames}
