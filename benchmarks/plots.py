"""The plots of a run: one PNG each, bars with the rounds' spread, and lines at what is to be reached."""

from __future__ import annotations

from collections.abc import Iterable
from importlib import import_module
from pathlib import Path
from typing import Any

from benchmarks.probes import PROBES
from benchmarks.rows import PLOTS, Plot, probe_of
from benchmarks.speed_report import Judged, Speed, shown, stem

_OURS, _PEERS, _LIMIT = "#2a6f97", "#adb5bd", "#c1121f"
_BASES = {
    "socketpair",
    "echo",
    "pebble",
    "executor",
    "loky",
    "ray",
    "copy",
    "least",
    "least-uvloop",
    "least-start",
    "python",
}


def draw(speed: Speed, folder: Path) -> list[Path]:
    """Write a picture for each plot that has figures; returns the files."""
    plt = _pyplot()
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for plot in PLOTS:
        if all(name in speed.figures for name in plot.figures):
            written.append(folder / f"{plot.name}.png")
            _draw(plt, plot, speed, written[-1])
    return written


def limits(plot: Plot, speed: Speed) -> list[tuple[str, float]]:
    """What the figures of a plot are to reach, in their own unit: of each condition on one of them."""
    return [
        (f"{'at least' if judged.at_least else 'at most'}: {judged.what}", value)
        for judged in speed.checks
        if judged.figure in plot.figures and (value := _limit(judged, speed)) is not None
    ]


def _limit(judged: Judged, speed: Speed) -> float | None:
    if judged.base is None:
        return judged.reach or None
    base = speed.figures.get(judged.base)
    return None if base is None else base.median * judged.reach


def labels(figures: Iterable[str]) -> list[str]:
    """What bars are called: by probe, and by figure where one probe has several."""
    names = list(figures)
    several = len({probe_of(name) for name in names}) < len(names)
    titles = []
    for name in names:
        title, of_it = PROBES[probe_of(name)].title, stem(name)
        titles.append(f"{title}, {of_it}" if several and of_it else title)
    return titles


def _pyplot() -> Any:
    import_module("matplotlib").use("Agg")
    return import_module("matplotlib.pyplot")


def _draw(plt: Any, plot: Plot, speed: Speed, file: Path) -> None:
    found = [speed.figures[name] for name in plot.figures]
    colours = [_PEERS if _is_base(name) else _OURS for name in plot.figures]
    figure, axes = plt.subplots(figsize=(8, 1.4 + 0.42 * len(found)), dpi=120, layout="constrained")
    values = [spread.median for spread in found]
    errors = [[s.median - s.low for s in found], [s.high - s.median for s in found]]
    places = range(len(found))
    axes.barh(places, values, xerr=errors, color=colours, height=0.62, ecolor="#495057", capsize=3)
    axes.set_yticks(places, labels(plot.figures))
    axes.invert_yaxis()
    for place, (name, spread) in enumerate(zip(plot.figures, found, strict=True)):
        text = f"  {shown(name, spread.median)}"
        axes.annotate(text, (spread.high, place), va="center", fontsize=8)
    for number, (text, value) in enumerate(limits(plot, speed)):
        axes.axvline(value, color=_LIMIT, linestyle=("--", ":", "-.")[number % 3], linewidth=1, label=text)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize=7, loc="best")
    axes.margins(x=0.18)
    axes.set_xlim(left=0)
    axes.set_title(plot.title, loc="left", fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    machine = speed.machine
    axes.set_xlabel(
        f"median of {speed.rounds} rounds, with the least and the most · {machine.cores} cores of {machine.cpu} · "
        f"{machine.date}",
        fontsize=7,
    )
    figure.savefig(file)
    plt.close(figure)


def _is_base(name: str) -> bool:
    probe, _, figure = name.partition(".")
    return probe.removesuffix("-frame") in _BASES or figure.startswith(("bare_", "least_", "in_process"))
