"""One cell of the faults table: a peer, a fault, and what was seen of the two."""

from __future__ import annotations

import msgspec

PEERS = {
    "holdfast": "Holdfast",
    "pebble": "pebble",
    "loky": "loky",
    "executor": "ProcessPoolExecutor",
}

FAULTS = {  # name in misbehave.py → what it is
    "raises": "raise",
    "exits": "sys.exit",
    "exits_at_once": "os._exit",
    "segfaults": "segfault",
    "aborts": "abort",
    "loops": "endless loop",
    "loops_in_c": "endless loop in C",
    "allocates": "3 GiB allocation",
    "returns_a_lock": "unencodable result",
    "raises_unspeakable": "exception whose __str__ raises",
}
HANGS = ("loops", "loops_in_c")
MEMORY = "allocates"

MEMORY_LIMIT_MIB = 1024
MEMORY_TOLERANCE_MIB = 102  # a tenth: what counts as held
HANG_LIMIT_S = 2.0  # for a call that hangs
CALL_LIMIT_S = 30.0  # for every other one
GRACE_S = 5.0  # past its limit, a call or a worker that still runs counts as not ended
NEXT_CALL_S = 5.0  # an honest call that takes longer counts as blocked


class Answer(msgspec.Struct, frozen=True, omit_defaults=True):
    """What a call told its caller. `kind` is the type of the error, empty where it returned."""

    ok: bool
    kind: str
    text: str
    after_s: float
    ended: bool = True  # False: the caller gave up waiting, the call had not ended

    def line(self) -> str:
        """As one line."""
        return " ".join(f"{self.kind}: {self.text}".split()) if self.kind else self.text


class Seen(msgspec.Struct):
    """What the host itself saw, written as it goes: a host that dies has left what it saw before."""

    ready: bool = False
    fault: Answer | None = None
    quiet_after_s: float | None = None  # of a hang: until nothing below the host was busy any more; None: never
    next_call: Answer | None = None
    same_plugin: Answer | None = None  # Holdfast only: the broken plugin's own next call
    restarted: Answer | None = None  # Holdfast only: that plugin's call after `restart`
    done: bool = False


class Cell(msgspec.Struct):
    """One cell as measured.

    Attributes:
        host_end: how the host process ended: `exited 0`, `SIGSEGV`, or `killed by the harness` at its deadline.
        peak_mib: the largest resident memory of any one process below the host.
        left_behind: processes that outlived by more than a second a host that ended by itself.
    """

    peer: str
    fault: str
    seen: Seen
    host_end: str
    peak_mib: int
    left_behind: int
    wall_s: float
    error: str = ""

    @property
    def host_lives(self) -> bool:
        """The host came through the fault and everything that it was asked to do afterwards."""
        return self.seen.done

    @property
    def next_works(self) -> bool:
        """The next honest call was answered with its value, within `NEXT_CALL_S`."""
        return self.seen.next_call is not None and self.seen.next_call.ok

    @property
    def hang_ended(self) -> bool | None:
        """The caller was answered, and the worker that hung is idle or gone. None: this fault does not hang."""
        if self.fault not in HANGS:
            return None
        return self.seen.fault is not None and self.seen.fault.ended and self.seen.quiet_after_s is not None

    @property
    def memory_held(self) -> bool | None:
        """No process got past the limit. None: this fault takes none."""
        if self.fault != MEMORY:
            return None
        fault = self.seen.fault
        return fault is not None and not fault.ok and self.peak_mib <= MEMORY_LIMIT_MIB + MEMORY_TOLERANCE_MIB

    @property
    def told(self) -> str:
        """What the caller was told."""
        return self.error or (self.seen.fault.line() if self.seen.fault else "nothing: the host did not live")
