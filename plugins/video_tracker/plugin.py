"""Finds and tracks objects with a detector of your own: torch, on a GPU."""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypedDict

import cv2
import numpy as np
from association import Tracker
from detector import Detector
from numpy.typing import NDArray
from video_file import VideoFile, decode_image, ffmpeg_is_built_in

PROGRESS_STEPS = 50
# Boxes that score less than `min_score` but at least this continue tracks: ByteTrack's low threshold
# (Zhang et al., ECCV 2022, arXiv:2110.06864).
CONTINUE_SCORE = 0.1


class DetectedObject(TypedDict):
    """`box` is x1, y1, x2, y2 in pixels of the image; `score` is the detector's, in 0..1."""

    box: list[float]
    score: float
    label: str


class TrackedObject(DetectedObject):
    id: int


class TrackedFrame(TypedDict):
    """`frame` counts from 0; `time_s` is the frame's time from the start of the video."""

    frame: int
    time_s: float
    tracks: list[TrackedObject]


class DetectedFrame(TypedDict):
    """Sizes in pixels; objects by falling score."""

    width: int
    height: int
    objects: list[DetectedObject]


class VideoTracker:
    """Settings: `device`, `input_px`, `labels`, `threads`; the README says what they do."""

    def __init__(self, context: Any) -> None:
        settings = context.settings
        self._labels = [str(label) for label in settings.get("labels", [])]
        self._threads = _positive(settings, "threads", 1)
        cv2.setNumThreads(self._threads)
        self._detector = Detector(
            Path(context.models["detector"]),
            device=str(settings.get("device", "cuda")),
            input_px=_positive(settings, "input_px", 640),
            classes=len(self._labels),
        )

    def validate(self) -> None:
        """Run the detector once on a grey picture; its own errors, and CUDA's, are left as they are."""
        if not ffmpeg_is_built_in():
            raise RuntimeError(
                "this OpenCV is built without FFmpeg and cannot read videos; pip install opencv-python-headless"
            )
        self._detector.detect(np.full((48, 64, 3), 114, np.uint8), min_score=0.5, max_overlap=0.5)

    def track(
        self,
        video: Path,
        min_score: float = 0.25,
        max_overlap: float = 0.45,
        *,
        progress: Callable[[int, int], None],
    ) -> Iterator[TrackedFrame]:
        """Track the detector's objects through a video; one item per frame, in order.

        `min_score` is the score that begins a track; `max_overlap` (IoU) is how much two objects of
        one class may overlap, both in 0..1 (YOLOv5's defaults). `progress` is called about 50 times
        with the frames done and the frames declared (0 where the video declares none).

        Raises `ValueError` for a file that is no video, is empty or cut short, and for thresholds
        outside 0..1. A video whose index is whole but whose data ends early is refused when that
        end is reached, after the items before it: see `VideoFile.frames` for the tolerance.
        """
        _check_share("min_score", min_score)
        _check_share("max_overlap", max_overlap)
        source = VideoFile(video, self._threads)
        tracker = Tracker(birth_score=min_score)
        step = max(1, source.frames_declared // PROGRESS_STEPS)
        done = 0
        for frame in source.frames():
            found = self._detector.detect(frame.image, min(CONTINUE_SCORE, min_score), max_overlap)
            tracks = tracker.update(found.boxes, found.scores, found.labels)
            yield {
                "frame": frame.index,
                "time_s": round(frame.time_s, 3),
                "tracks": [
                    {"id": track.id, **self._object(track.box, track.score, track.label)} for track in tracks
                ],
            }
            done = frame.index + 1
            if done % step == 0:
                progress(done, source.frames_declared)
        if done % step:
            progress(done, source.frames_declared)

    def detect(self, frame: bytes, min_score: float = 0.25, max_overlap: float = 0.45) -> DetectedFrame:
        """The detector's objects in an encoded image (JPEG, PNG …).

        Raises `ValueError` for bytes that are no whole image and for thresholds outside 0..1.
        """
        _check_share("min_score", min_score)
        _check_share("max_overlap", max_overlap)
        image = decode_image(frame)
        found = self._detector.detect(image, min_score, max_overlap)
        return {
            "width": image.shape[1],
            "height": image.shape[0],
            "objects": [
                self._object(box, float(score), int(label))
                for box, score, label in zip(found.boxes, found.scores, found.labels, strict=True)
            ],
        }

    def _object(self, box: NDArray[np.float32], score: float, label: int) -> DetectedObject:
        name = self._labels[label] if self._labels else str(label)
        return {"box": [round(float(side), 1) for side in box], "score": round(score, 3), "label": name}


def _positive(settings: Mapping[str, Any], name: str, default: int) -> int:
    value = settings.get(name, default)
    if not isinstance(value, int) or value < 1:
        raise ValueError(f"setting `{name}` is {value!r}; it is a whole number, 1 or more")
    return value


def _check_share(name: str, value: float) -> None:
    if not 0 <= value <= 1:
        raise ValueError(f"{name} is {value}; it is a share, from 0 to 1")
