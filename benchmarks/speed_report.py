"""A run's figures, judged: pure functions from rounds to ratios, verdicts and tables."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from statistics import median

import msgspec
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from benchmarks.machine import Machine
from benchmarks.probes import PROBES
from benchmarks.rows import ROWS, Check, probe_of

BEGIN = "<!-- speed: written by `python -m benchmarks.speed --readme` from results/speed.json -->"
END = "<!-- end of speed -->"
_HEADS = ("what", "Holdfast", "beside it", "ratio", "rounds", "to reach", "the least", "")
_STEMS = {
    "worker": "one worker",
    "engine": "the engine",
    "bare": "bare handler",
    "least": "the least",
    "copy": "one copy",
    "in_process": "in-process",
    "python_p50": "python -c pass",
    "with_1": "1 plugin",
    "with_10": "10 plugins",
    "with_100": "100 plugins",
}
_UNITS = {"us": "µs", "ms": "ms", "s": "s", "mib": "MiB", "cores": "cores", "bytes": "bytes"}


class Spread(msgspec.Struct, frozen=True):
    """A figure, or a ratio, over the rounds."""

    median: float
    low: float
    high: float
    rounds: tuple[float, ...]

    @classmethod
    def of(cls, rounds: Sequence[float]) -> Spread:
        """Of one value or more."""
        return cls(median(rounds), min(rounds), max(rounds), tuple(rounds))


class Judged(msgspec.Struct, frozen=True):
    """One condition as it came out.

    Attributes:
        ratio: of the figure to its base, round by round; the figure itself where there is no base.
        holds: False also where a round could not be measured.
        least: the same ratio without Holdfast.
    """

    row: str
    what: str
    figure: str
    base: str | None
    reach: float
    at_least: bool
    ratio: Spread | None
    holds: bool
    least: Spread | None = None


class Trouble(msgspec.Struct, frozen=True):
    """A probe that failed in a round, and the last thing that it said."""

    probe: str
    round: int
    said: str


class Speed(msgspec.Struct, frozen=True):
    """A run, as its JSON file holds it."""

    machine: Machine
    commit: str | None
    disk: str  # the file system that the log was written to
    clip: str
    load_before: float  # the machine's load average, of a minute: what else ran there
    quick: bool
    rounds: int
    checks: list[Judged]
    figures: dict[str, Spread]
    troubles: list[Trouble]


def spreads(rounds: Iterable[Mapping[str, float]]) -> dict[str, Spread]:
    """Each figure over the rounds in which it was measured."""
    found: dict[str, list[float]] = {}
    for figures in rounds:
        for name, value in figures.items():
            found.setdefault(name, []).append(value)
    return {name: Spread.of(values) for name, values in found.items()}


def judge(check: Check, rounds: Sequence[Mapping[str, float]]) -> Judged:
    """Whether a condition holds: by the median of the ratios, each of two figures of the same round."""
    ratio = _ratios(check.figure, check.base, rounds)
    least = None if check.least is None else _ratios(*check.least, rounds)
    holds = ratio is not None and len(ratio.rounds) == len(rounds) and _holds(check, ratio)
    return Judged(
        check.row, check.what, check.figure, check.base, check.reach, check.at_least, ratio, holds, least
    )


def _ratios(figure: str, base: str | None, rounds: Iterable[Mapping[str, float]]) -> Spread | None:
    """Of the rounds that measured both."""
    found = [ratio for figures in rounds if (ratio := _ratio(figure, base, figures)) is not None]
    return Spread.of(found) if found else None


def _ratio(figure: str, base: str | None, figures: Mapping[str, float]) -> float | None:
    value = figures.get(figure)
    if value is None or base is None:
        return value
    divisor = figures.get(base)
    return value / divisor if divisor else None


def _holds(check: Check, ratio: Spread) -> bool:
    if check.at_least:
        return (ratio.low if check.worst else ratio.median) >= check.reach
    return (ratio.high if check.worst else ratio.median) <= check.reach


def shown(figure: str, value: float) -> str:
    """A figure with its unit, to three digits or so."""
    name = figure.rpartition(".")[2]
    if name.endswith("_per_s") or name == "per_s":
        return f"{_number(value)}/s"
    unit = _UNITS.get(name.rpartition("_")[2], "")
    return f"{_number(value)} {unit}".rstrip()


def _number(value: float) -> str:
    if value == 0 or abs(value) >= 100:
        return f"{value:,.0f}".replace(",", " ")
    return f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}"


def cells(judged: Judged, figures: Mapping[str, Spread]) -> tuple[str, ...]:
    """A condition as the fields of a table's line, under `_HEADS`."""
    sign = "≥" if judged.at_least else "≤"
    mine = figures.get(judged.figure)
    value = shown(judged.figure, mine.median) if mine else "–"
    verdict = "holds" if judged.holds else "does not hold" if judged.ratio else "not measured"
    if judged.base is None:
        span = _span(judged.ratio, lambda number: shown(judged.figure, number))
        least = shown(judged.figure, judged.least.median) if judged.least else ""
        return judged.what, value, "", "", span, f"{sign} {shown(judged.figure, judged.reach)}", least, verdict
    base = figures.get(judged.base)
    beside = f"{_title(judged)} {shown(judged.base, base.median)}" if base else "–"
    ratio, least = _times(judged.ratio) or "–", _times(judged.least)
    reach = f"{sign} {judged.reach:g} ×"
    return judged.what, value, beside, ratio, _span(judged.ratio, _number), reach, least, verdict


def _times(ratio: Spread | None) -> str:
    return f"{_number(ratio.median)} ×" if ratio else ""


def stem(figure: str) -> str:
    """What a figure is of its probe, in words: its name without the unit."""
    name = figure.rpartition(".")[2]
    short = name.removesuffix("per_s").rstrip("_") if name.endswith("per_s") else name.rpartition("_")[0]
    return _STEMS.get(short, short)


def _title(judged: Judged) -> str:
    """What a base is called beside its figure."""
    base = judged.base or ""
    return stem(base) if probe_of(base) == probe_of(judged.figure) else PROBES[probe_of(base)].title


def _span(spread: Spread | None, show: Callable[[float], str]) -> str:
    return f"{show(spread.low)} – {show(spread.high)}" if spread else "–"


def to_terminal(console: Console, speed: Speed) -> None:
    """Print every condition, then every other figure, then what failed."""
    table = Table(expand=True)
    for head in _HEADS:
        table.add_column(head)
    row = ""
    for judged in speed.checks:
        if judged.row != row:
            row = judged.row
            table.add_section()
            table.add_row(f"[bold]{escape(ROWS[row])}[/]")
        fields = [escape(field) for field in cells(judged, speed.figures)]
        style = "green" if judged.holds else "red"
        table.add_row(*fields[:-1], f"[{style}]{fields[-1]}[/]")
    console.print(table)
    console.print(others(speed), markup=False)
    for trouble in speed.troubles:
        console.print(f"round {trouble.round}, {trouble.probe}: {trouble.said}", markup=False, style="red")
    console.print(summary(speed), markup=False)


def others(speed: Speed) -> str:
    """The figures that no condition names, in one paragraph."""
    named = {name for check in speed.checks for name in (check.figure, check.base)}
    rest = (name for name in speed.figures if name not in named)
    return "; ".join(f"{name} {shown(name, speed.figures[name].median)}" for name in rest)


def summary(speed: Speed) -> str:
    """How many hold, where and when."""
    held = sum(judged.holds for judged in speed.checks)
    quick = ", quick" if speed.quick else ""
    commit = f", commit {speed.commit}" if speed.commit else ""
    return (
        f"{held} of {len(speed.checks)} hold; medians of {speed.rounds} rounds{quick}. "
        f"Measured on {speed.machine.line()}, log on {speed.disk}{commit}; "
        f"load average before: {speed.load_before:.1f}."
    )


def to_markdown(speed: Speed) -> str:
    """The README's table: a line for each condition."""
    lines = [_line((*_HEADS[:-1], "holds")), _line(["---"] * len(_HEADS))]
    for judged in speed.checks:
        fields = cells(judged, speed.figures)
        lines.append(
            _line((*fields[:-1], "yes" if judged.holds else f"**{fields[-1].replace('does not hold', 'no')}**"))
        )
    return "\n".join([*lines, "", summary(speed)])


def replace_section(text: str, section: str) -> str:
    """The text with what stands between the two marks replaced.

    Raises:
        ValueError: the marks are not there, once each and in order.
    """
    found, count = re.subn(
        re.escape(BEGIN) + r".*?" + re.escape(END), lambda _: f"{BEGIN}\n{section}\n{END}", text, flags=re.DOTALL
    )
    if count != 1:
        raise ValueError(f"the text has no single section between `{BEGIN}` and `{END}`")
    return found


def _line(fields: Iterable[str]) -> str:
    return "| " + " | ".join(field.replace("|", "\\|") for field in fields) + " |"
