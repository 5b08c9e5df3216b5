"""What all requests together may hold, so that many clients cannot take what one may not."""

from __future__ import annotations

from engine.api.errors import busy


class Budget:
    """A number of bytes that requests share.

    Args:
        limit_bytes: that may be held at the same time.
        setting: the limit's name, for the message.
    """

    def __init__(self, limit_bytes: int, setting: str) -> None:
        self.held_bytes = 0
        self._limit_bytes = limit_bytes
        self._setting = setting

    def take(self, count_bytes: int) -> None:
        """Raises Problem: 503, others hold too much now."""
        if self.held_bytes + count_bytes > self._limit_bytes:
            raise busy(
                f"the calls of this server hold all {self._limit_bytes} bytes they may together; "
                f"retry when some have ended, or raise `{self._setting}`"
            )
        self.held_bytes += count_bytes

    def give(self, count_bytes: int) -> None:
        """What was taken is not held any more."""
        self.held_bytes -= count_bytes


class Share:
    """What one request holds of a budget."""

    def __init__(self, budget: Budget) -> None:
        self.held_bytes = 0
        self._budget = budget

    def take(self, count_bytes: int) -> None:
        """Raises Problem: 503, others hold too much now."""
        self._budget.take(count_bytes)
        self.held_bytes += count_bytes

    def release(self) -> None:
        """Give all of it back."""
        held_bytes, self.held_bytes = self.held_bytes, 0
        self._budget.give(held_bytes)
