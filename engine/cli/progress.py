"""A bar on stderr while a call runs: on a terminal only, and not where the answer itself runs through it."""

from __future__ import annotations

import sys
import time
from types import TracebackType

from engine.cli.console import printable


class Bar:
    """A spinner until the tool says how far it is, then a bar: done/total, elapsed, time left.

    Args:
        title: what runs.
        shown: False makes every method do nothing.
    """

    def __init__(self, title: str, *, shown: bool) -> None:
        self._title = printable(title)
        self._shown = shown
        self._items = 0
        self.started_s = time.monotonic()

    def __enter__(self) -> Bar:
        if not self._shown:
            return self
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            Progress,
            SpinnerColumn,
            TextColumn,
            TimeElapsedColumn,
            TimeRemainingColumn,
        )

        self._progress = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            TextColumn("{task.fields[count]}", markup=False),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=Console(file=sys.stderr),
            transient=True,
        )
        self._task = self._progress.add_task(self._title, total=None, count="")
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._shown:
            self._progress.stop()

    @property
    def elapsed_s(self) -> float:
        """Since the call began."""
        return time.monotonic() - self.started_s

    def item(self) -> None:
        """One more item; counts where the tool does not say how far it is."""
        self._items += 1
        if self._shown and self._progress.tasks[0].total is None:
            self._progress.update(self._task, count=f"{self._items} items")

    def progress(self, done: float, total: float) -> None:
        """The tool said how far it is. A total of 0: it does not know."""
        if not self._shown:
            return
        if total > 0:
            self._progress.update(self._task, completed=done, total=total, count=f"{done:g}/{total:g}")
        else:
            self._progress.update(self._task, count=f"{done:g}")
