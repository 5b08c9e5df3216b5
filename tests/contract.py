"""The nine strict items of the contract, and the summary that names them after a test run."""

from __future__ import annotations

from collections import Counter

import pytest

CONTRACT = {
    1: "All plugin code runs in a worker process",
    2: "Five states, one table, one-way and final within an incarnation",
    3: "FAILED is not UNAVAILABLE, and both carry a reason",
    4: "Health never fails",
    5: "The registry is thread-safe",
    6: "Timeout and memory are enforced while the call runs",
    7: "A caller's bad input is the caller's error",
    8: "A broken plugin is visible, never hidden",
    9: "An event that was seen is never lost, changed or renumbered",
}
MARKER = "contract(*items): the items of the contract that the test proves"


def items_of(node: pytest.Item) -> set[int]:
    """The items a test is marked with.

    Raises:
        pytest.UsageError: a number that the contract does not have.
    """
    items = {item for marker in node.iter_markers("contract") for item in marker.args}
    if unknown := items - CONTRACT.keys():
        raise pytest.UsageError(f"{node.nodeid}: the contract has no item {sorted(unknown)}")
    return items


class Summary:
    """Counts outcomes per item, and prints a line for each."""

    def __init__(self) -> None:
        self._items: dict[str, set[int]] = {}
        self._outcomes: Counter[tuple[int, str]] = Counter()

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        """Learn which test proves what."""
        self._items = {item.nodeid: items_of(item) for item in items}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Count one phase of one test."""
        if report.when == "call" or report.outcome != "passed":
            for item in self._items.get(report.nodeid, ()):
                self._outcomes[item, report.outcome] += 1

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        """Print the contract."""
        if not self._outcomes:
            return
        terminalreporter.section("the contract")
        for item, text in CONTRACT.items():
            counts = {outcome: count for (of, outcome), count in self._outcomes.items() if of == item}
            told = ", ".join(f"{count} {outcome}" for outcome, count in sorted(counts.items())) or "not run"
            terminalreporter.write_line(f"{item}. {text}: {told}")
