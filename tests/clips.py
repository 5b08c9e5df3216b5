"""Clips that the tests draw themselves, and how plugins are loaded without the engine."""

import importlib.util
import logging
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

Image = NDArray[np.uint8]
Box = tuple[int, int, int, int]

PLUGINS = Path(__file__).parents[1] / "plugins"
REAL_CLIPS = Path(__file__).parents[2] / "shared" / "data"


@dataclass(frozen=True)
class Mover:
    """A filled rectangle that starts at `start` (x, y) in frame 0 and moves by `step` per frame."""

    start: tuple[int, int]
    step: tuple[int, int]
    size: tuple[int, int] = (40, 30)
    colour: tuple[int, int, int] = (40, 40, 220)

    def box(self, frame: int) -> Box:
        """Its x1, y1, x2, y2 in pixels, x2 and y2 exclusive; parts may lie outside the picture."""
        x, y = self.start[0] + frame * self.step[0], self.start[1] + frame * self.step[1]
        return x, y, x + self.size[0], y + self.size[1]


def draw(movers: Sequence[Mover], frame: int, size: tuple[int, int] = (320, 240)) -> Image:
    """One picture of a grey, slightly mottled ground and what moves over it; later movers on top."""
    width, height = size
    grain = np.random.default_rng(1).normal(0, 3, (height, width, 1))
    image = np.broadcast_to(100 + grain, (height, width, 3)).astype(np.uint8)
    for mover in movers:
        x1, y1, x2, y2 = mover.box(frame)
        cv2.rectangle(image, (x1, y1), (x2 - 1, y2 - 1), mover.colour, cv2.FILLED)
    return image


def draw_clip(
    path: Path,
    movers: Sequence[Mover],
    frames: int = 60,
    *,
    fps: float = 12.5,
    size: tuple[int, int] = (320, 240),
) -> Path:
    """Write what `draw` draws as `write_clip` does."""
    return write_clip(path, (draw(movers, frame, size) for frame in range(frames)), fps)


def write_clip(path: Path, images: Iterable[Image], fps: float = 12.5) -> Path:
    """Write a clip, its index last: `.avi` as Motion JPEG, whose edges stay sharp, `.mp4` as MPEG-4."""
    code = cv2.VideoWriter.fourcc(*{".avi": "MJPG", ".mp4": "mp4v"}[path.suffix])
    writer: cv2.VideoWriter | None = None
    for image in images:
        if writer is None:
            writer = cv2.VideoWriter(str(path), cv2.CAP_FFMPEG, code, fps, image.shape[1::-1])
            assert writer.isOpened(), f"this OpenCV cannot write {path.name}"
        writer.write(image)
    assert writer is not None, "a clip has at least one picture"
    writer.release()
    return path


def encode(image: Image, suffix: str = ".jpg") -> bytes:
    """The image as an encoded file: JPEG, PNG …"""
    return cv2.imencode(suffix, image)[1].tobytes()


def context(scratch: Path, models: dict[str, Path] | None = None, **settings: object) -> SimpleNamespace:
    """What the engine hands to a plugin's `__init__`."""
    log = logging.getLogger("plugin")
    return SimpleNamespace(models=models or {}, settings=settings, scratch=scratch, log=log)


def load_plugin(name: str, module: str = "plugin") -> Any:
    """A module of a bundled plugin, imported as its worker does: the plugin's folder comes first.

    Plugins may use the same names for modules of their own, so none stays in `sys.modules`.
    """
    folder = PLUGINS / name
    own = {path.stem for path in folder.glob("*.py")}
    sys.path.insert(0, str(folder))
    try:
        return _load(f"{name}_{module}", folder / f"{module}.py")
    finally:
        sys.path.remove(str(folder))
        for stem in own:
            sys.modules.pop(stem, None)


def _load(name: str, path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module
