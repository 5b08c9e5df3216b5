"""A trivial plugin: it imports nothing heavy."""

from __future__ import annotations

import itertools
import time
from typing import Any


class Plain:
    """Its tools take next to no time, or have no end."""

    def __init__(self, context: Any) -> None:
        self._log = context.log

    def validate(self) -> None:
        """Nothing to check."""

    def noop(self, n: int) -> int:
        """The number it was given: a caller sees that the answer is its own."""
        return n

    def spin(self) -> None:
        """An endless loop."""
        while True:
            pass

    def spin_in_c(self) -> int:
        """An endless loop that holds the GIL."""
        return sum(itertools.repeat(0))

    def emit(self, lines: int, per_s: float) -> int:
        """Log lines at a steady rate; each becomes an event."""
        started_s = time.monotonic()
        for number in range(lines):
            ahead_s = started_s + number / per_s - time.monotonic()
            if ahead_s > 0:
                time.sleep(ahead_s)
            self._log.info("line %d of %d", number + 1, lines)
        return lines
