"""The cells as tables: for the terminal, and in Markdown."""

from __future__ import annotations

from collections.abc import Iterable

import msgspec
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from benchmarks.cells import FAULTS, HANGS, MEMORY, MEMORY_LIMIT_MIB, PEERS, Cell
from benchmarks.machine import Machine

_TOLD_CHARS = 150
_NOTE = (
    "Holdfast's next call is another plugin's. The plugin that broke is FAILED, by design: its own next call "
    "worked in {untouched}, each refusal giving the reason, and after `restart` in {restarted}."
)


class Results(msgspec.Struct, frozen=True):
    """A run, as its JSON file holds it."""

    machine: Machine
    limits: dict[str, float]
    summary: dict[str, dict[str, str]]
    cells: list[Cell]


def summary(cells: Iterable[Cell]) -> dict[str, dict[str, str]]:
    """By peer: the README's table, row by row."""
    by_peer: dict[str, list[Cell]] = {}
    for cell in cells:
        by_peer.setdefault(cell.peer, []).append(cell)
    return {peer: _column(of_peer) for peer, of_peer in by_peer.items()}


def _column(cells: list[Cell]) -> dict[str, str]:
    hangs = [cell.hang_ended for cell in cells if cell.hang_ended is not None]
    memory = next((cell for cell in cells if cell.fault == MEMORY), None)
    segfault = next((cell.told for cell in cells if cell.fault == "segfaults"), "")
    return {
        "host lives": _share(cell.host_lives for cell in cells),
        "next call works": _share(cell.next_works for cell in cells),
        "hang ended": _share(ended is True for ended in hangs),
        f"memory held to {MEMORY_LIMIT_MIB} MiB": "–" if memory is None else _held(memory),
        "host ends by itself": _share(cell.host_end == "exited 0" for cell in cells),
        "a segfault reads": shorten(segfault, 220),
    }


def note(cells: Iterable[Cell]) -> str:
    """What became of the Holdfast plugins that broke; empty where Holdfast was not measured."""
    seen = [cell.seen for cell in cells if cell.peer == "holdfast"]
    if not seen:
        return ""
    untouched = _share(one.same_plugin.ok for one in seen if one.same_plugin is not None)
    restarted = _share(one.restarted.ok for one in seen if one.restarted is not None)
    return _NOTE.format(untouched=untouched, restarted=restarted)


def to_terminal(console: Console, results: Results) -> None:
    """Print every cell, then the summary."""
    table = Table(expand=True)
    for head, width in (("fault", 12), ("", 19), ("host lives", 5), ("next call", 5), ("hang, memory", 9)):
        table.add_column(head, width=width)
    table.add_column("the caller is told", ratio=1)
    for fault, title in FAULTS.items():
        for number, cell in enumerate(cell for cell in results.cells if cell.fault == fault):
            marks = (_mark(cell.host_lives), _mark(cell.next_works), _extra(cell))
            table.add_row("" if number else title, PEERS[cell.peer], *marks, escape(shorten(cell.told, 200)))
        table.add_section()
    console.print(table)
    table = Table(title="Summary", title_justify="left", title_style="bold", expand=True)
    table.add_column("", width=20)
    for peer in results.summary:
        table.add_column(PEERS[peer], ratio=1)
    for row in _rows(results):
        table.add_row(*map(escape, row))
    console.print(table)
    console.print(note(results.cells), markup=False)
    console.print(results.machine.line(), markup=False)


def to_markdown(results: Results) -> str:
    """The README's table."""
    heads = ["ten faults in the called code", *(PEERS[peer] for peer in results.summary)]
    lines = [_line(heads), _line(["---"] * len(heads)), *(_line(row) for row in _rows(results))]
    return "\n".join([*lines, "", note(results.cells), f"Measured on {results.machine.line()}."])


def to_markdown_in_full(results: Results) -> str:
    """What the caller is told, fault by fault."""
    heads = ["fault", *(PEERS[peer] for peer in results.summary)]
    lines = [_line(heads), _line(["---"] * len(heads))]
    for fault, title in FAULTS.items():
        told = {cell.peer: cell for cell in results.cells if cell.fault == fault}
        lines.append(_line([title, *(_full(told.get(peer)) for peer in results.summary)]))
    return "\n".join([*lines, "", f"Measured on {results.machine.line()}."])


def shorten(text: str, limit: int = _TOLD_CHARS) -> str:
    """The beginning of a text."""
    return text if len(text) <= limit else text[: limit - 1].rstrip() + "…"


def _rows(results: Results) -> list[list[str]]:
    names = list(next(iter(results.summary.values()), {}))
    return [[name, *(column[name] for column in results.summary.values())] for name in names]


def _full(cell: Cell | None) -> str:
    if cell is None:
        return "–"
    trouble = [] if cell.host_lives else ["**host lost**"]
    trouble += [] if cell.next_works else ["**next call does not work**"]
    trouble += ["**not ended**"] if cell.hang_ended is False else []
    trouble += [f"**took {cell.peak_mib} MiB**"] if cell.memory_held is False else []
    return "; ".join([shorten(cell.told), *trouble])


def _line(fields: Iterable[str]) -> str:
    return "| " + " | ".join(field.replace("|", "\\|") for field in fields) + " |"


def _share(held: Iterable[bool]) -> str:
    counted = list(held)
    return f"{sum(counted)}/{len(counted)}" if counted else "–"


def _held(cell: Cell) -> str:
    return f"{'yes' if cell.memory_held else 'no'}, peak {cell.peak_mib} MiB"


def _mark(value: bool | None) -> str:
    return "" if value is None else "[green]yes[/]" if value else "[red]no[/]"


def _extra(cell: Cell) -> str:
    if cell.fault in HANGS:
        return "[green]ended[/]" if cell.hang_ended else "[red]not ended[/]"
    if cell.fault == MEMORY:
        return f"{'[green]held' if cell.memory_held else '[red]not held'}[/], {cell.peak_mib} MiB"
    return ""
