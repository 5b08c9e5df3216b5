"""The five states and the table of transitions between them: data, one row per line."""

from __future__ import annotations

from enum import StrEnum
from typing import NamedTuple


class State(StrEnum):
    """Where a plugin stands in its life. FAILED and UNAVAILABLE are final within an incarnation."""

    LOADED = "LOADED"
    INITIALIZED = "INITIALIZED"
    RUNNING = "RUNNING"
    FAILED = "FAILED"
    UNAVAILABLE = "UNAVAILABLE"


class Trigger(StrEnum):
    """What may happen to a plugin."""

    INITIALIZE = "initialize"
    RUN = "run"
    FAIL = "fail"
    BECOME_UNAVAILABLE = "become_unavailable"


class Row(NamedTuple):
    """One row of the table."""

    trigger: Trigger
    sources: tuple[State, ...]
    dest: State
    when: str


ENTRY = State.LOADED

TRANSITIONS = (
    Row(Trigger.INITIALIZE, (State.LOADED,), State.INITIALIZED, "import, __init__ and validate() succeeded"),
    Row(Trigger.RUN, (State.INITIALIZED,), State.RUNNING, "the first tool call begins"),
    Row(
        Trigger.FAIL,
        (State.LOADED, State.INITIALIZED, State.RUNNING),
        State.FAILED,
        "any exception, crash, timeout, memory breach or protocol breach",
    ),
    Row(Trigger.BECOME_UNAVAILABLE, (State.LOADED,), State.UNAVAILABLE, "something it needs is missing"),
)

IN_SERVICE = frozenset({State.INITIALIZED, State.RUNNING})
FINAL = frozenset({State.FAILED, State.UNAVAILABLE})
EXPLAINED = FINAL  # the states that always carry a reason
