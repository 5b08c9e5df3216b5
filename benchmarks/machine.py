"""The machine that a run was made on, and what ran there: figures mean nothing without it."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterable
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import msgspec


class Machine(msgspec.Struct, frozen=True):
    """The facts. `versions` is by distribution."""

    date: str
    cores: int
    cpu: str
    memory_gib: int
    kernel: str
    python: str
    versions: dict[str, str]

    def line(self) -> str:
        """As one line."""
        parts = [f"{self.cores} cores of {self.cpu}", f"{self.memory_gib} GiB", f"Linux {self.kernel}"]
        parts.append(f"Python {self.python}")
        parts += [f"{name} {number}" for name, number in self.versions.items()]
        return ", ".join([*parts, self.date])


def facts(distributions: Iterable[str]) -> Machine:
    """The facts of this machine, now."""
    return Machine(
        date=datetime.now(UTC).date().isoformat(),
        cores=len(os.sched_getaffinity(0)),
        cpu=_cpu(),
        memory_gib=round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30),
        kernel=platform.release(),
        python=platform.python_version(),
        versions={name: version(name) for name in distributions},
    )


def _cpu() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.machine())


def file_system(folder: Path) -> str:
    """The kind of file system that a folder is on, such as `ext4`."""
    mounts = [line.split() for line in Path("/proc/mounts").read_text().splitlines()]
    # A later mount hides an earlier one at the same place.
    over = [fields for fields in mounts if folder.resolve().is_relative_to(_unescaped(fields[1]))]
    return max(enumerate(over), key=lambda found: (len(_unescaped(found[1][1])), found[0]))[1][2]


def _unescaped(place: str) -> str:
    """A mount point, in which spaces stand as octal numbers (fstab(5))."""
    return place.replace("\\040", " ").replace("\\011", "\t").replace("\\012", "\n").replace("\\134", "\\")
