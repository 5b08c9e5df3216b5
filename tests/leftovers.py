"""What a test may not leave behind: processes, descriptors, temporary files, shared memory."""

from __future__ import annotations

import tempfile
from pathlib import Path

import msgspec
from support import descendants, held


class Leftovers(msgspec.Struct, frozen=True):
    """What there is of each kind."""

    processes: frozenset[int]  # below this one, zombies too
    descriptors: frozenset[tuple[str, int]]  # of this process: what they refer to, each with a number
    temp_files: frozenset[str]
    shared_memory: frozenset[str]  # files in /dev/shm and System V segments; memfds are descriptors

    @classmethod
    def now(cls) -> Leftovers:
        """A look at this process, the temporary folder and the machine's shared memory."""
        segments = [line.split()[1] for line in Path("/proc/sysvipc/shm").read_text().splitlines()[1:]]
        return cls(
            processes=frozenset(descendants()),
            descriptors=frozenset((kind, n) for kind, count in held().items() for n in range(count)),
            temp_files=frozenset(map(str, Path(tempfile.gettempdir()).iterdir())),
            shared_memory=frozenset([*map(str, Path("/dev/shm").iterdir()), *segments]),
        )

    def since(self, before: Leftovers) -> str:
        """What was not there at an earlier look, for the message of a failed test; "" if nothing."""
        return "; ".join(
            f"{name}: {sorted(map(str, came))}"
            for name in self.__struct_fields__
            if (came := getattr(self, name) - getattr(before, name))
        )
