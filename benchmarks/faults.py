"""Ten faults in the called code, each against Holdfast and its peers, in one run.

    python -m benchmarks.faults                    # measure: a table here, JSON in results/faults.json
    python -m benchmarks.faults --markdown         # the README's table, from the last run's JSON

Exits 1 if a cell could not be measured, or if Holdfast did not hold in one of its own.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import msgspec
from rich.console import Console
from rich.progress import Progress, TextColumn

from benchmarks import harness
from benchmarks.cells import (
    CALL_LIMIT_S,
    FAULTS,
    GRACE_S,
    HANG_LIMIT_S,
    MEMORY_LIMIT_MIB,
    NEXT_CALL_S,
    PEERS,
    Cell,
)
from benchmarks.machine import facts
from benchmarks.report import Results, summary, to_markdown, to_markdown_in_full, to_terminal

RESULTS = Path(__file__).resolve().parent / "results" / "faults.json"
DISTRIBUTIONS = ("holdfast", "pebble", "loky")
_RUN_S = 240.0  # for everything
_CELL_S = 60.0
_LIMITS = {
    "hang_limit_s": HANG_LIMIT_S,
    "call_limit_s": CALL_LIMIT_S,
    "grace_s": GRACE_S,
    "next_call_s": NEXT_CALL_S,
    "memory_limit_mib": MEMORY_LIMIT_MIB,
}


def main() -> int:
    """Measure, or show the last run again. Returns the exit code."""
    options = _options()
    if options.markdown:
        try:
            results = msgspec.json.decode((options.json or RESULTS).read_bytes(), type=Results)
        except FileNotFoundError as exc:
            print(f"there is no {exc.filename}; measure first: python -m benchmarks.faults", file=sys.stderr)
            return 2
        print(to_markdown(results) if options.markdown == "summary" else to_markdown_in_full(results))
        return 0
    cells = _measure(options.peer or list(PEERS), options.fault or list(FAULTS))
    results = Results(facts(DISTRIBUTIONS), _LIMITS, summary(cells), cells)
    if options.json or not (options.peer or options.fault):  # a part does not replace the whole
        (options.json or RESULTS).write_bytes(msgspec.json.format(msgspec.json.encode(results)) + b"\n")
    console = Console()
    to_terminal(console if console.is_terminal else Console(width=160), results)
    return 0 if all(_holds(cell) for cell in cells) else 1


def _measure(peers: list[str], faults: list[str]) -> list[Cell]:
    cells = []
    deadline_s = time.monotonic() + _RUN_S
    with Progress(*Progress.get_default_columns(), TextColumn("{task.fields[now]}"), transient=True) as progress:
        task = progress.add_task("faults", total=len(peers) * len(faults), now="")
        for fault in faults:
            for peer in peers:
                progress.update(task, now=f"{FAULTS[fault]}, {PEERS[peer]}")
                left_s = max(0.0, deadline_s - time.monotonic())
                cells.append(harness.run(peer, fault, min(_CELL_S, left_s)))
                progress.advance(task)
    return cells


def _holds(cell: Cell) -> bool:
    if cell.error:
        return False
    if cell.peer != "holdfast":
        return True
    restarted = cell.seen.restarted is not None and cell.seen.restarted.ok
    held = (cell.host_lives, cell.next_works, restarted, cell.host_end == "exited 0", not cell.left_behind)
    return all(held) and cell.hang_ended is not False and cell.memory_held is not False


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.faults", description=__doc__.partition("\n")[0])
    parser.add_argument("--peer", action="append", choices=PEERS, help="only this one; again for more")
    parser.add_argument("--fault", action="append", choices=FAULTS, help="only this one; again for more")
    parser.add_argument("--json", type=Path, metavar="FILE", help="instead of results/faults.json")
    parser.add_argument(
        "--markdown",
        nargs="?",
        const="summary",
        choices=("summary", "full"),
        help="measure nothing: print the kept results, in short or with every answer",
    )
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
