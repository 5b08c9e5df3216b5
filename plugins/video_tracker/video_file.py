"""Reading videos and images that strangers send: whole ones are decoded, others refused.

Everything here raises `ValueError` (or `cv2.error`, from OpenCV itself) for bad input and nothing
else. This file is the same in every bundled plugin that reads video.
"""

import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

# FFmpeg reads these once, when the first file is opened. It must not write to stderr about a
# stranger's broken file, nor let a playlist sent as a video open anything but local files.
os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")
os.environ.setdefault("OPENCV_FFMPEG_CAPTURE_OPTIONS", "protocol_whitelist;file")

import cv2
import numpy as np
from numpy.typing import NDArray

Image = NDArray[np.uint8]

cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)

# How much of its declared length a whole video may lack: containers without a frame count declare
# a duration, which is rounded and may include the last frame of the sound.
MISSING_SHARE = 0.02
MISSING_FRAMES = 3


@dataclass(frozen=True, slots=True)
class Frame:
    """One decoded frame: `image` (H, W, 3) uint8 BGR, `index` from 0, `time_s` from the start."""

    index: int
    time_s: float
    image: Image


class VideoFile:
    """A video that can be decoded at least once, from its first frame.

    `frames_declared` is what the container says, 0 where it says nothing; `fps` likewise.
    Raises `ValueError` when `path` is no file, is empty, or holds no video that FFmpeg can open.
    """

    def __init__(self, path: Path, threads: int = 1) -> None:
        self._name = path.name
        if not path.is_file():
            raise ValueError(f"there is no video file `{path.name}`; send the file itself")
        if not path.stat().st_size:
            raise ValueError(f"`{path.name}` is empty (0 bytes); send the whole video file")
        self._capture = cv2.VideoCapture(str(path), cv2.CAP_FFMPEG, [cv2.CAP_PROP_N_THREADS, threads])
        if not self._capture.isOpened():
            raise ValueError(
                f"`{path.name}` cannot be opened as a video: it is none, or its index is missing "
                "because the file was cut short; send a whole MP4, MKV, WebM or AVI file"
            )
        self.fps = _positive(self._capture.get(cv2.CAP_PROP_FPS))
        self.frames_declared = round(_positive(self._capture.get(cv2.CAP_PROP_FRAME_COUNT)))

    def frames(self) -> Iterator[Frame]:
        """Decode to the end, then release the file; to be called once.

        Raises `ValueError` when nothing can be decoded, and, at the end, when the video is cut
        short: both the number of frames and the time of the last one fall short of what the
        container declares, by more than `MISSING_FRAMES` and `MISSING_SHARE`. Either alone may
        be an estimate (a variable frame rate, a count derived from the duration). A stream that
        declares no length, such as raw H.264, cannot be checked.
        """
        count, time_s = 0, 0.0
        try:
            while True:
                decoded, image = self._capture.read()
                if not decoded:
                    break
                time_s = self._time_s(count, time_s)
                yield Frame(count, time_s, np.asarray(image, np.uint8))
                count += 1
        finally:
            self._capture.release()
        if not count:
            raise ValueError(
                f"no frame of `{self._name}` can be decoded: the data is damaged or cut short, or "
                "its codec is not supported; send a whole H.264, VP9 or MPEG-4 video"
            )
        if self._cut_short(count, time_s):
            raise ValueError(
                f"`{self._name}` is cut short: it declares {self.frames_declared} frames and only "
                f"{count} can be decoded; send the whole file"
            )

    def _time_s(self, index: int, before_s: float) -> float:
        """The frame's own time stamp; by the frame rate where stamps are missing or go back."""
        stamp_s = self._capture.get(cv2.CAP_PROP_POS_MSEC) / 1000
        if math.isfinite(stamp_s) and (stamp_s > before_s or index == 0):
            return max(stamp_s, 0.0)
        return before_s + 1 / self.fps if self.fps and index else before_s

    def _cut_short(self, count: int, last_s: float) -> bool:
        allowed = max(MISSING_FRAMES, math.ceil(self.frames_declared * MISSING_SHARE))
        if count + allowed >= self.frames_declared or not self.fps:
            return False
        return last_s + (allowed + 1) / self.fps < self.frames_declared / self.fps


def decode_image(data: bytes) -> Image:
    """One encoded image (JPEG, PNG, WebP, BMP, TIFF …) as (H, W, 3) uint8 BGR.

    Raises `ValueError` when `data` is empty, no image, or a JPEG or PNG that is cut short: OpenCV
    would fill what is missing with grey.
    """
    if not data:
        raise ValueError("the image is empty (0 bytes); send the whole encoded file")
    if _image_cut_short(data):
        raise ValueError("the image is cut short: its end is missing; send the whole encoded file")
    image = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)
    if image is None:
        raise ValueError(f"these {len(data)} bytes are no image that OpenCV can decode; send a JPEG or PNG file")
    return np.asarray(image, np.uint8)


def ffmpeg_is_built_in() -> bool:
    """Whether this build of OpenCV can read videos through FFmpeg."""
    return cv2.CAP_FFMPEG in cv2.videoio_registry.getStreamBackends()


def _image_cut_short(data: bytes) -> bool:
    if data.startswith(b"\xff\xd8"):
        # SOS (ff da) cannot occur inside coded data, where ff is always followed by 00 or RSTn
        # (ITU-T T.81, B.1.1.5); EOI (ff d9) has to follow the last one.
        return data.find(b"\xff\xd9", max(data.rfind(b"\xff\xda"), 2)) < 0
    return data.startswith(b"\x89PNG") and b"IEND" not in data[-64:]


def _positive(value: float) -> float:
    return value if math.isfinite(value) and value > 0 else 0.0
