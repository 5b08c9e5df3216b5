"""What this kernel can keep plugins from. The worker's side, `engine.worker.contain`, does it."""

from __future__ import annotations

import functools

import msgspec

from engine.worker import landlock, seccomp


class Support(msgspec.Struct, frozen=True):
    """What the kernel offers. The data folder is apart: whether it is hidden, `Spawner.exposed` says."""

    landlock_abi: int  # 0: none
    seccomp: bool

    @property
    def tracing(self) -> bool:
        """Whether workers are kept from tracing, and looking into, processes that they did not start."""
        return self.landlock_abi >= landlock.MIN_ABI

    @property
    def signals(self) -> bool:
        """Whether workers are kept from signalling them."""
        return self.landlock_abi >= landlock.SCOPE_ABI

    @property
    def limits(self) -> bool:
        """Whether workers are kept from changing their limits and priorities."""
        return self.seccomp

    @property
    def network(self) -> bool:
        """Whether `network = false` can be had."""
        return self.seccomp

    @property
    def filesystem(self) -> bool:
        """Whether `filesystem = "read-only"` and `"listed"` can be had."""
        return self.landlock_abi >= landlock.READ_ONLY_ABI

    @property
    def landlock_name(self) -> str:
        """`Landlock 7`, or `no Landlock`."""
        return f"Landlock {self.landlock_abi}" if self.landlock_abi else "no Landlock"

    def missing(self) -> list[str]:
        """What plugins are not kept from by default, in words; empty where the kernel can do all of it."""
        gaps = {
            "signals to the engine (Landlock of Linux 6.12)": self.signals,
            "ptrace of the engine (Landlock of Linux 5.19)": self.tracing,
            "changing the engine's limits (seccomp)": self.limits,
        }
        return [text for text, held in gaps.items() if not held]

    def text(self, exposed: str | None) -> str:
        """One line for people. `exposed` is the spawner's."""
        gaps = self.missing() + ([f"reading the data folder: {exposed}"] if exposed else [])
        kernel = f"{self.landlock_name}, {'seccomp' if self.seccomp else 'no seccomp'}"
        hidden = ", data folder hidden" if exposed == "" else ""
        return f"{kernel}{hidden}" + (f"; not prevented: {'; '.join(gaps)}" if gaps else "")


@functools.cache
def supported() -> Support:
    """What this kernel offers."""
    return Support(landlock.abi(), seccomp.supported())
