"""Finds and tracks what moves in front of a fixed camera: OpenCV, CPU only."""

from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypedDict

import cv2
import numpy as np
from association import Tracker
from foreground import Foreground
from video_file import VideoFile, decode_image, ffmpeg_is_built_in

PROGRESS_STEPS = 50
# What never moves by 0.4 of its size is no moving object: the place that something left, a patch of
# changed light, a branch in the wind. On a real road 0.25 let one of those through and 0.4 none.
MIN_TRAVEL = 0.4


class MovingObject(TypedDict):
    """`box` is x1, y1, x2, y2 in pixels, x2 and y2 exclusive; `score` its share that moves."""

    box: list[int]
    score: float


class TrackedObject(MovingObject):
    id: int


class TrackedFrame(TypedDict):
    """`frame` counts from 0; `time_s` is the frame's time from the start of the video."""

    frame: int
    time_s: float
    tracks: list[TrackedObject]


class DetectedFrame(TypedDict):
    """`frame` counts the images of `stream` from 0; sizes in pixels."""

    stream: str
    frame: int
    width: int
    height: int
    objects: list[MovingObject]


class MotionTracker:
    """Settings: `analysis_px`, `threads`, `streams`; the README says what they do."""

    def __init__(self, context: Any) -> None:
        self._analysis_px = _positive(context.settings, "analysis_px", 480)
        self._threads = _positive(context.settings, "threads", 1)
        self._max_streams = _positive(context.settings, "streams", 8)
        self._streams: OrderedDict[str, _Stream] = OrderedDict()
        cv2.setNumThreads(self._threads)

    def validate(self) -> None:
        """Follow a square over a drawn scene; raise `RuntimeError` when that cannot be done."""
        if not ffmpeg_is_built_in():
            raise RuntimeError(
                "this OpenCV is built without FFmpeg and cannot read videos; pip install opencv-python-headless"
            )
        foreground, tracker = Foreground(self._analysis_px), _tracker()
        expected = [0, 0, 0, 0]
        tracks = []
        for step in range(8):
            image = np.full((96, 128, 3), 90, np.uint8)
            if step >= 3:
                x = 10 + 8 * step
                expected = [x, 40, x + 24, 64]
                image[40:64, x : x + 24] = (30, 200, 240)
            tracks = tracker.update(*foreground.regions(image, min_area=100))
        if len(tracks) != 1 or np.abs(tracks[0].box - expected).max() > 4:
            raise RuntimeError(
                f"a drawn square at {expected} was tracked as {[t.box.tolist() for t in tracks]}; "
                "reinstall numpy, opencv-python-headless and lapx"
            )

    def track(
        self, video: Path, min_area: int = 400, *, progress: Callable[[int, int], None]
    ) -> Iterator[TrackedFrame]:
        """Track what moves through a video; one item per frame, in order.

        `min_area` is the least number of moving pixels, in the full frame, that make an object.
        `progress` is called about 50 times with the frames done and the frames declared (0 where
        the video declares none).

        Raises `ValueError` for a file that is no video, is empty or cut short, and for a
        `min_area` under 1. A video whose index is whole but whose data ends early is refused when
        that end is reached, after the items before it: see `VideoFile.frames` for the tolerance.
        """
        _check_area(min_area)
        source = VideoFile(video, self._threads)
        foreground = Foreground(self._analysis_px)
        tracker = _tracker()
        step = max(1, source.frames_declared // PROGRESS_STEPS)
        done = 0
        for frame in source.frames():
            tracks = tracker.update(*foreground.regions(frame.image, min_area))
            yield {
                "frame": frame.index,
                "time_s": round(frame.time_s, 3),
                "tracks": [
                    {"id": track.id, **_moving(track.box, track.score, frame.image.shape)} for track in tracks
                ],
            }
            done = frame.index + 1
            if done % step == 0:
                progress(done, source.frames_declared)
        if done % step:
            progress(done, source.frames_declared)

    def detect(self, frame: bytes, stream: str = "default", min_area: int = 400) -> DetectedFrame:
        """What moves in an encoded image, compared with the images of `stream` before it.

        One image alone shows no motion: the first of a stream has no objects. Each stream is one
        fixed camera; the `streams` used last are remembered, by this process, until it ends.

        Raises `ValueError` for bytes that are no whole image, and for a `min_area` under 1.
        """
        _check_area(min_area)
        image = decode_image(frame)
        state = self._streams.pop(stream, None) or _Stream(Foreground(self._analysis_px))
        self._streams[stream] = state
        if len(self._streams) > self._max_streams:
            self._streams.popitem(last=False)
        boxes, scores = state.foreground.regions(image, min_area)
        index, state.frames = state.frames, state.frames + 1
        return {
            "stream": stream,
            "frame": index,
            "width": image.shape[1],
            "height": image.shape[0],
            "objects": [_moving(box, float(score), image.shape) for box, score in zip(boxes, scores, strict=True)],
        }


class _Stream:
    def __init__(self, foreground: Foreground) -> None:
        self.foreground = foreground
        self.frames = 0


def _tracker() -> Tracker:
    return Tracker(min_travel=MIN_TRAVEL, blobs=True)


def _moving(box: Any, score: float, shape: tuple[int, ...]) -> MovingObject:
    height, width = shape[:2]
    limits = (width, height, width, height)
    sides = [min(max(round(float(side)), 0), end) for side, end in zip(box, limits, strict=True)]
    return {"box": sides, "score": round(score, 3)}


def _positive(settings: Mapping[str, Any], name: str, default: int) -> int:
    value = settings.get(name, default)
    if not isinstance(value, int) or value < 1:
        raise ValueError(f"setting `{name}` is {value!r}; it is a whole number, 1 or more")
    return value


def _check_area(min_area: int) -> None:
    if min_area < 1:
        raise ValueError(f"min_area is {min_area}; it is a number of pixels, 1 or more")
