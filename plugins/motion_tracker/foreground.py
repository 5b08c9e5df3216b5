"""Which parts of a fixed camera's picture move: background subtraction on a reduced picture."""

import math

import cv2
import numpy as np
from numpy.typing import NDArray

Image = NDArray[np.uint8]
Floats = NDArray[np.float32]

# MOG2 (Zivkovic, ICPR 2004) with OpenCV's own defaults for history (frames) and the squared
# distance, in variances, beyond which a pixel is foreground. What stands still becomes background
# once its weight exceeds 0.1, OpenCV's 1 - backgroundRatio: after some 50 frames at this rate.
# OpenCV's automatic rate, 1 / 2n at frame n, would take in objects that move early in a video.
HISTORY_FRAMES = 500
LEARNING_RATE = 1 / HISTORY_FRAMES
VARIANCE_THRESHOLD = 16
# MOG2 marks shadows 127 and foreground 255.
FOREGROUND = 200
# Opening removes specks of one pixel; closing joins the parts of an object, which windows and
# shadows cut up. Sides of the kernels in pixels of the reduced picture.
OPEN_PX = 3
CLOSE_PX = 9
# The thumbnail by which changes of exposure are seen, how fast its background adapts per frame,
# and the powers beyond which a change is no exposure but another picture.
THUMBNAIL_PX = (32, 18)
TONE_RATE = 0.05
GAMMA_RANGE = (0.33, 3.0)


class Foreground:
    """A background model of one camera. Feed it the frames in order.

    The work is done on a picture reduced by a whole factor so that its longer side is at most
    `analysis_px`; boxes are given in pixels of the full frame. What the first frame shows is
    background until it moves. A frame of another size starts the model anew.
    """

    def __init__(self, analysis_px: int = 480) -> None:
        self._analysis_px = analysis_px
        self._open = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (OPEN_PX, OPEN_PX))
        self._close = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (CLOSE_PX, CLOSE_PX))
        self._start((0, 0))

    def _start(self, shape: tuple[int, int]) -> None:
        self._shape = shape
        self._model = cv2.createBackgroundSubtractorMOG2(HISTORY_FRAMES, VARIANCE_THRESHOLD, detectShadows=True)
        self._tone: Floats | None = None

    def regions(self, image: Image, min_area: int) -> tuple[Floats, Floats]:
        """The moving regions of at least `min_area` pixels: boxes (N, 4), scores (N,).

        `image` is (H, W, 3) uint8 BGR. A box is x1, y1, x2, y2 in pixels of `image`, x2 and y2
        exclusive; its score is the share of the box that moves, in 0..1.
        """
        height, width = image.shape[:2]
        if self._shape != (height, width):
            self._start((height, width))
        factor = max(1, math.ceil(max(height, width) / self._analysis_px))
        size = (max(1, width // factor), max(1, height // factor))
        small = _reduced(image, size) if factor > 1 else image
        mask = self._model.apply(self._levelled(small), learningRate=LEARNING_RATE)
        mask = cv2.threshold(mask, FOREGROUND, 255, cv2.THRESH_BINARY)[1]
        mask = cv2.morphologyEx(mask, cv2.MORPH_OPEN, self._open)
        mask = cv2.morphologyEx(mask, cv2.MORPH_CLOSE, self._close)
        stats = cv2.connectedComponentsWithStats(mask)[2][1:]  # without the background
        scale = np.array([width / size[0], height / size[1]], np.float32)
        areas = stats[:, cv2.CC_STAT_AREA]
        stats = stats[areas * float(scale.prod()) >= min_area].astype(np.float32)
        near, sides = stats[:, :2] * scale, stats[:, 2:4] * scale
        scores = stats[:, 4] / np.maximum(stats[:, 2] * stats[:, 3], 1)
        return np.concatenate([near, near + sides], axis=1), scores

    def _levelled(self, small: Image) -> Image:
        """The frame with the camera's automatic exposure undone.

        A large bright object makes a camera darken the whole picture within a second, faster than
        a background model may learn. A camera's tone curve maps black to black and white to white,
        so a change of exposure is taken as a power: background = frame ** gamma, both in 0..1. The
        median of that gamma over a thumbnail holds as long as objects cover less than half of it.
        """
        grey = cv2.cvtColor(_reduced(small, THUMBNAIL_PX), cv2.COLOR_BGR2GRAY).astype(np.float32)
        tone = np.log((grey + np.float32(0.5)) / 256)
        if self._tone is None:
            self._tone = tone
            return small
        gamma = float(np.clip(np.median(self._tone / tone), *GAMMA_RANGE))
        self._tone += TONE_RATE * (tone * np.float32(gamma) - self._tone)
        curve = np.rint(255 * (np.arange(256) / 255) ** gamma).astype(np.uint8)
        return np.asarray(cv2.LUT(small, curve), np.uint8)


def _reduced(image: Image, size: tuple[int, int]) -> Image:
    return np.asarray(cv2.resize(image, size, interpolation=cv2.INTER_AREA), np.uint8)
