"""The log's thread as a neighbour of the event loop: how often it keeps the interpreter.

A thread that works without a pause gives the interpreter up only when it is asked to, and that is after 5 ms
(`sys.getswitchinterval`): each call whose answer arrives meanwhile is late by as much. A batch makes some five
calls late whatever its size, and costs an fsync. So there are few of them, and large ones.
"""

from __future__ import annotations

from collections.abc import Iterator
from time import sleep

# Of a batch, treated at a time: between two of them, whoever waits gets its turn without having to ask.
PART_EVENTS = 4096
# Asleep, not `sleep(0)`: that would take the interpreter back before a waiting thread has woken up.
PAUSE_S = 50e-6
# From the first event after a quiet moment until it is written: most single calls and starts of workers are over
# by then, and did not compete with the writing.
QUIET_GATHER_S = 0.005
# From one batch to the next: the longest where more than 10 000 events come in a second. Calls are answered before
# their events are written; what is not written yet is lost with the engine, and no subscriber has seen it.
GATHER_S = 0.02
GATHER_MAX_S = 0.2
GATHER_EVENT_S = 1e-4  # and so 10 000


def parts(count: int) -> Iterator[slice]:
    """Slices of `count` events, in order, with a pause between: how many to treat at a time."""
    for start in range(0, count, PART_EVENTS):
        if start:
            sleep(PAUSE_S)
        yield slice(start, min(count, start + PART_EVENTS))


def gather_s(count: int) -> float:
    """How long to wait for more after a batch of `count` events."""
    return min(max(GATHER_S, count * GATHER_EVENT_S), GATHER_MAX_S)
