"""The log's thread as a neighbour of the event loop: how often, and how long, it keeps the interpreter.

A thread that works without a pause gives the interpreter up only when it is asked to, and that is after 5 ms
(`sys.getswitchinterval`): each call whose answer arrives meanwhile is late by as much. So what counts is how often
the log works, not for how long: few large batches make fewer calls late than many small ones, and each costs some
hand-overs of the interpreter and an fsync. Smaller parts would make more calls late, each by less.
"""

from __future__ import annotations

from collections.abc import Iterator
from time import sleep

PART_EVENTS = 4096
# Asleep, not `sleep(0)`: that would take the interpreter back before a waiting thread has woken up.
PAUSE_S = 50e-6
# From the first event after a quiet moment until it is written: a single call, or a worker's start, is over by
# then, and did not compete with the writing.
FIRST_S = 0.005
# From one batch to the next: the longest where more than 10 000 events come in a second. What is not written yet
# is lost with the engine, and nobody has seen it.
GATHER_S = 0.02
GATHER_MAX_S = 0.2
GATHER_EVENT_S = 1e-4


def parts(count: int) -> Iterator[slice]:
    """Slices of `count` events, in order, with a pause between: how many to treat at a time."""
    for start in range(0, count, PART_EVENTS):
        if start:
            sleep(PAUSE_S)
        yield slice(start, min(count, start + PART_EVENTS))


def gather_s(count: int) -> float:
    """How long to wait for more after a batch of `count` events."""
    return min(max(GATHER_S, count * GATHER_EVENT_S), GATHER_MAX_S)
