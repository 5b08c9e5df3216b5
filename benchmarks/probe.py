"""One probe, in this process: writes its figures to FOLDER/figures.json.

python -m benchmarks.probe NAME FOLDER        # the plan is FOLDER/plan.json
"""

from __future__ import annotations

import sys
from pathlib import Path

import msgspec

from benchmarks.probes import PROBES, Plan


def main(name: str, folder: Path) -> None:
    """Measure."""
    plan = msgspec.json.decode((folder / "plan.json").read_bytes(), type=Plan)
    figures = PROBES[name](plan)
    (folder / "figures.json").write_bytes(msgspec.json.encode(figures))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
