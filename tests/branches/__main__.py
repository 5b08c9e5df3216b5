"""Which lines and branches of verdict and wire code no test reaches: `make coverage`.

Both sides are noted by `sitecustomize`, which tells why, and judged by coverage.py: the files, and that nothing
may be missing in them, stand in pyproject.toml under [tool.coverage]. Arguments go to pytest, and replace the
tests that are run otherwise. Exit 1 where a test failed, 2 where something is missing.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import coverage
from branches import sitecustomize

ROOT = Path(__file__).resolve().parents[2]
TESTS = (
    *("calls", "cgroup", "channel", "containment", "crashes", "faults", "fork_server_loss", "hostile_answers"),
    *(
        "memory_limit",
        "reasons",
        "sandbox",
        "spare",
        "tool_signatures",
        "verdict",
        "verdict_start",
        "verdict_worker",
        "wire_values",
        "wire_worker",
    ),
    *("worker_arguments", "zoo"),
)
# These are about the interpreter's own hooks, which are taken here.
TAKEN = [
    "tests/test_spare.py::test_a_finder_that_cannot_stand_the_rehearsal_breaks_no_start",
    *(
        f"tests/test_zoo.py::test_a_hostile_plugin_is_named_and_removed_and_the_others_stay_in_service[{row}]"
        for row in ("recurses", "traces_everything")
    ),
]


def main(arguments: list[str]) -> int:
    """Run the tests, then print the table."""
    with tempfile.TemporaryDirectory(prefix="holdfast-branches-") as name:
        folder = Path(name)
        files = measured()
        for module in ("sitecustomize", "notes_again"):
            shutil.copy(Path(__file__).with_name(f"{module}.py"), folder)
        (folder / "files").write_text("\n".join(files))
        with (folder / "arcs").open("wb") as pages:
            pages.truncate(len(files) * sitecustomize.PAIRS)
        tests = arguments or [f"tests/test_{test}.py" for test in TESTS]
        skipped = [f"--deselect={test}" for test in TAKEN]
        command = [sys.executable, "-m", "pytest", "-q", "-p", "notes_again", *tests, *skipped]
        ran = subprocess.run(command, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(folder)}, check=False)
        together = coverage.Coverage(data_file=None, config_file=str(ROOT / "pyproject.toml"))
        together.get_data().add_arcs(noted(folder / "arcs", files))
        reached = together.report(show_missing=True, skip_covered=True)
        if ran.returncode:
            return 1
        return 0 if reached >= together.get_option("report:fail_under") else 2  # type: ignore[operator]


def measured() -> list[str]:
    """The files, as they stand in a frame."""
    patterns = coverage.Coverage(config_file=str(ROOT / "pyproject.toml")).get_option("run:include")
    assert isinstance(patterns, list)
    return [str(path) for pattern in patterns for path in sorted(ROOT.glob(pattern))]


def noted(pages: Path, files: list[str]) -> dict[str, set[tuple[int, int]]]:
    """The pairs of lines that ran, by file."""
    found: dict[str, set[tuple[int, int]]] = {name: set() for name in files}
    content = pages.read_bytes()
    place = content.find(1)
    while place >= 0:
        file, pair = divmod(place, sitecustomize.PAIRS)
        before, line = divmod(pair, 2 * sitecustomize.LINES)
        found[files[file]].add((before - sitecustomize.LINES, line - sitecustomize.LINES))
        place = content.find(1, place + 1)
    return found


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
