"""The command line: `holdfast`, and `python -m engine`."""

from __future__ import annotations


def main() -> None:
    """Run the command line and end the process with its exit code."""
    from engine.cli.streams import open_closed_streams

    open_closed_streams()
    from engine.cli.app import run_command_line

    raise SystemExit(run_command_line())
