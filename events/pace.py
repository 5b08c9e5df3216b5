"""The log's thread as a neighbour of the event loop: how often, and how long, it keeps the interpreter.

A thread that works without a pause gives the interpreter up only when it is asked to, and that is after 5 ms
(`sys.getswitchinterval`): each call whose answer arrives meanwhile is late by as much. So the work on a batch is
cut into parts of one or two milliseconds, with a pause between in which whoever waits gets its turn. Smaller ones
would make more calls late, each by less; and each hand-over of the interpreter costs as much as a dozen events.
"""

from __future__ import annotations

from collections.abc import Iterator
from time import sleep

PART_EVENTS = 1024
# Asleep, not `sleep(0)`: that would take the interpreter back before a waiting thread has woken up.
PAUSE_S = 50e-6
# From one batch to the next: an event after a quiet moment is written at once, a stream of them in groups, because
# each batch costs some hand-overs and an fsync. The more there were, the more it pays to wait.
GATHER_S = 0.02
GATHER_MAX_S = 0.05
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
