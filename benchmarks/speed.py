"""Holdfast and its peers in turn, round by round, and whether each ratio is reached.

    python -m benchmarks.speed                     # measure: a table here, JSON and plots in results/
    python -m benchmarks.speed --only call --only http-run --rounds 3
    python -m benchmarks.speed --readme            # measure nothing: write the README's table from the last run

Exits 1 if a row does not hold or could not be measured, unless `--no-judge`.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import msgspec
from rich.console import Console
from rich.progress import Progress, TextColumn, TimeElapsedColumn

from benchmarks import measure, plots
from benchmarks.harness import ROOT
from benchmarks.machine import facts, file_system
from benchmarks.probes import Plan
from benchmarks.rows import ROWS, checks_of, probes_for
from benchmarks.speed_report import (
    Speed,
    Trouble,
    judge,
    replace_section,
    shown,
    spreads,
    to_markdown,
    to_terminal,
)

RESULTS = Path(__file__).resolve().parent / "results"
DISTRIBUTIONS = ("holdfast", "aiohttp", "uvloop", "pebble", "loky", "ray", "numpy")
CLIP = ROOT / "plugins" / "motion_tracker" / "sample.mp4"
CLIP_VARIABLE = "HOLDFAST_BENCH_CLIP"
_FOLDER = Path("/var/tmp")  # kept over a restart (FHS), so on a disk; /tmp may be memory
_ROUNDS = 5


class Rounds:
    """Measures round by round, and says where it is."""

    def __init__(self, probes: Sequence[str], rounds: int, plan: Plan) -> None:
        self.figures: list[dict[str, float]] = []
        self.troubles: list[Trouble] = []
        self._probes = probes
        self._rounds = rounds
        self._plan = plan

    def run(self) -> None:
        """All of them."""
        console = Console(stderr=True)
        columns = (*Progress.get_default_columns(), TimeElapsedColumn(), TextColumn("{task.fields[now]}"))
        with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
            task = progress.add_task("speed", total=self._rounds * len(self._probes), now="")
            for number in range(1, self._rounds + 1):
                self.figures.append({})
                for probe in self._probes:
                    now = f"round {number} of {self._rounds}: {probe}"
                    progress.update(task, now=now)
                    started_s = time.monotonic()
                    told = self._measure(probe, number)
                    progress.advance(task)
                    if not console.is_terminal:
                        took_s = time.monotonic() - started_s
                        print(f"{now}, {took_s:.1f} s: {told}", file=sys.stderr, flush=True)

    def _measure(self, probe: str, number: int) -> str:
        """Run one probe; returns what it found, or said, in words."""
        figures = self.figures[-1]
        try:
            found = measure.run(probe, self._plan)
        except measure.NotMeasured as exc:
            self.troubles.append(Trouble(probe, number, str(exc)))
            return str(exc)
        figures.update({f"{probe}.{name}": value for name, value in found.items()})
        return ", ".join(f"{name} {shown(name, value)}" for name, value in found.items())


def main(words: Sequence[str] | None = None) -> int:
    """Measure, or show the last run again. Returns the exit code."""
    options = _options(words)
    if options.readme or options.markdown or options.plots:
        return _show_again(options)
    speed = _measure(options)
    whole = not options.only
    if options.json or whole:  # a part does not replace the whole
        file: Path = options.json or RESULTS / "speed.json"
        file.write_bytes(msgspec.json.format(msgspec.json.encode(speed)) + b"\n")
    if whole:
        plots.draw(speed, RESULTS / "plots")
    console = Console()
    to_terminal(console if console.is_terminal else Console(width=160), speed)
    return 0 if options.no_judge or (not speed.troubles and all(judged.holds for judged in speed.checks)) else 1


def _measure(options: argparse.Namespace) -> Speed:
    checks = checks_of(options.only or ROWS)
    clip: Path = options.clip
    if not clip.is_file():
        sys.exit(f"there is no clip {clip}; correct --clip or {CLIP_VARIABLE}")
    rounds_wanted = options.rounds or (1 if options.quick else _ROUNDS)
    load_before = os.getloadavg()[0]
    with tempfile.TemporaryDirectory(prefix="holdfast-bench-", dir=options.folder) as folder:
        disk = file_system(Path(folder))
        if disk in ("tmpfs", "ramfs"):
            sys.exit(
                f"{options.folder} is memory ({disk}), and the log belongs on a disk; choose another --folder"
            )
        plan = Plan(folder, str(clip.absolute()), options.quick)
        rounds = Rounds(probes_for(checks), rounds_wanted, plan)
        rounds.run()
    return Speed(
        machine=facts(DISTRIBUTIONS),
        commit=_commit(),
        disk=disk,
        clip=clip.name,
        load_before=load_before,
        quick=options.quick,
        rounds=rounds_wanted,
        checks=[judge(check, rounds.figures) for check in checks],
        figures=spreads(rounds.figures),
        troubles=rounds.troubles,
    )


def _show_again(options: argparse.Namespace) -> int:
    file: Path = options.json or RESULTS / "speed.json"
    try:
        speed = msgspec.json.decode(file.read_bytes(), type=Speed)
    except FileNotFoundError:
        print(f"there is no {file}; measure first: python -m benchmarks.speed", file=sys.stderr)
        return 2
    if options.plots:
        for picture in plots.draw(speed, RESULTS / "plots"):
            print(picture)
    if options.markdown:
        print(to_markdown(speed))
    if options.readme:
        readme = ROOT / "README.md"
        try:
            text = replace_section(readme.read_text("utf-8"), to_markdown(speed))
        except ValueError as exc:
            print(f"{readme}: {exc}", file=sys.stderr)
            return 2
        readme.write_text(text, "utf-8")
    return 0


def _commit() -> str | None:
    """The commit that was measured, marked where files differ from it; None outside of a checkout."""
    command = ["git", "describe", "--always", "--dirty", "--exclude=*", "--abbrev=12"]
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return None
    return done.stdout.strip() or None


def _options(words: Sequence[str] | None, env: Mapping[str, str] = os.environ) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.speed", description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add(
        "--only",
        action="append",
        choices=ROWS,
        metavar="ROW",
        help=f"only this one; again for more: {', '.join(ROWS)}",
    )
    add("--rounds", type=int, metavar="N", help=f"by default {_ROUNDS}")
    add("--quick", action="store_true", help="a third of the time for each, and one round: to try it out")
    add("--no-judge", action="store_true", help="exit 0 whatever the ratios are")
    add(
        "--clip",
        type=Path,
        default=env.get(CLIP_VARIABLE) or CLIP,
        help=f"to track; else ${CLIP_VARIABLE}, else a drawn one",
    )
    add("--folder", type=Path, default=_FOLDER, help=f"on a disk, for logs and the like; by default {_FOLDER}")
    add("--json", type=Path, metavar="FILE", help="instead of results/speed.json")
    add("--markdown", action="store_true", help="measure nothing: print the README's table")
    add("--readme", action="store_true", help="measure nothing: write that table into the README")
    add("--plots", action="store_true", help="measure nothing: draw the plots again")
    options = parser.parse_args(words)
    if options.rounds is not None and options.rounds < 1:
        parser.error("--rounds wants 1 or more")
    options.clip = Path(options.clip)
    return options


if __name__ == "__main__":
    sys.exit(main())
