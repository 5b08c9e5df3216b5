"""A plugin that takes and gives video frames, arrays of 1080 × 1920 × 3 bytes."""

from __future__ import annotations

from typing import Any

import numpy as np


class Frames:
    """Its tools look at one pixel: what is measured is how the frame travels."""

    def __init__(self, _context: Any) -> None:
        self._answer = np.zeros((1080, 1920, 3), np.uint8)

    def validate(self) -> None:
        """Nothing to check."""

    def number(self, frame: np.ndarray) -> int:
        """A frame in, a number out."""
        return int(frame[540, 960, 1])

    def picture(self, frame: np.ndarray) -> np.ndarray:
        """A frame in, another one out: not the same memory, which would have nowhere to go."""
        self._answer[540, 960, 1] = frame[540, 960, 1]
        return self._answer
