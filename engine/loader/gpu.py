"""Whether this machine has a GPU that a plugin can use, and if not, which of the possible reasons it is."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

from engine.errors import ReasonCode
from engine.loader.findings import Finding
from engine.loader.gpu_probe import PCI_DEVICES, PROC_GPUS, GpuProbe, probe_gpu


def classify(probe: GpuProbe) -> list[Finding]:
    """What stands between a plugin and a working GPU, most fundamental first; nothing if torch can use one.

    Hardware comes before driver, driver before torch: each later step is of no use without the earlier.
    torch's own success outweighs everything else: containers often lack nvidia-smi.
    """
    if probe.torch.state == "answered" and probe.torch.available:
        return []
    found = [_hardware_or_driver(probe), _torch(probe)]
    findings = [finding for finding in found if finding is not None]
    return findings or [_driver_refuses(probe)]


def _hardware_or_driver(probe: GpuProbe) -> Finding | None:
    smi = probe.smi
    if smi.gpus:
        return None
    place = f"an NVIDIA GPU is on the PCI bus ({', '.join(probe.devices[:4])})"
    if smi.state == "timeout":
        seen = f"{place}, but " if probe.devices else ""
        return _finding(
            ReasonCode.GPU_CHECK_TIMEOUT,
            f"{seen}nvidia-smi did not answer within {probe.timeout_s:g} s; check the driver (dmesg), or "
            "raise gpu_check_timeout_s, then restart the plugin",
        )
    if not probe.devices:
        said = {
            "missing": "nvidia-smi is not installed",
            "answered": "nvidia-smi lists none",
            "failed": f"nvidia-smi fails: {smi.message}",
        }[smi.state]
        return _finding(
            ReasonCode.GPU_ABSENT,
            f"no NVIDIA GPU was found ({said}; no NVIDIA device on the PCI bus); this plugin needs one: run "
            "it on a machine with a GPU",
        )
    said, step = {
        "missing": (
            "nvidia-smi is not installed",
            "install NVIDIA's driver, or start the container with its GPUs (--gpus all)",
        ),
        "answered": ("nvidia-smi lists none", "load NVIDIA's driver, or give the container its GPUs"),
        "failed": (
            f"nvidia-smi fails: {smi.message}",
            "repair NVIDIA's driver (a reboot loads an updated one)",
        ),
    }[smi.state]
    if probe.torch.state in ("answered", "broken") and probe.torch.message:
        said = f"{said}; torch: {probe.torch.message}"
    return _finding(ReasonCode.GPU_DRIVER, f"{place}, but {said}; {step}")


def _torch(probe: GpuProbe) -> Finding | None:
    """What is wrong with torch itself. Without hardware, only what installing something could mend."""
    torch = probe.torch
    has_hardware = bool(probe.smi.gpus or probe.devices)
    if torch.state == "missing":
        return _finding(ReasonCode.TORCH_MISSING, "package `torch` is missing; pip install torch")
    if torch.state == "incomplete":
        fact = f"torch is installed, but the module `{torch.message}` that it imports is missing"
        return _finding(ReasonCode.TORCH_MISSING, f"{fact}; pip install --force-reinstall torch")
    if torch.state == "answered" and torch.cuda is None:
        built = "AMD's ROCm, not for CUDA" if torch.hip else "CPU only"
        fact = f"torch {torch.version} is built for {built}"
        return _finding(ReasonCode.TORCH_CPU_BUILD, f"{fact}; install a CUDA build of torch")
    if not has_hardware:
        return None
    if torch.state == "timeout":
        fact = f"torch did not say within {probe.timeout_s:g} s whether CUDA is available"
        step = "raise gpu_check_timeout_s or check the driver (dmesg), then restart the plugin"
        return _finding(ReasonCode.GPU_CHECK_TIMEOUT, f"{fact}; {step}")
    if torch.state == "not_started":
        fact = f"the check of torch could not be started ({torch.message})"
        step = "free memory or processes, then restart the plugin"
        return _finding(ReasonCode.GPU_CHECK_TIMEOUT, f"{fact}; {step}")
    return None


def _driver_refuses(probe: GpuProbe) -> Finding:
    """nvidia-smi lists a GPU and torch is built for CUDA, and yet torch cannot use it."""
    torch = probe.torch
    seen = f"nvidia-smi lists {', '.join(dict.fromkeys(probe.smi.gpus))}"
    if torch.state == "broken":
        fact = f"{seen}, but torch cannot be imported with CUDA: {torch.message}"
        return _finding(ReasonCode.GPU_DRIVER, f"{fact}; repair the driver, or reinstall torch for it")
    fact = f"{seen}, but torch.cuda.is_available() is False"
    if torch.message:
        fact += f": {torch.message}"
    if probe.visible_devices is not None and probe.visible_devices.strip() in ("", "-1", "NoDevFiles"):
        step = f'CUDA_VISIBLE_DEVICES="{probe.visible_devices}" hides it: unset it and restart the engine'
    else:
        step = f"install a driver that supports CUDA {torch.cuda}, or a torch built for the one installed"
    return _finding(ReasonCode.GPU_DRIVER, f"{fact}; {step}")


def _finding(code: ReasonCode, reason: str) -> Finding:
    return Finding(check="gpu", reason_code=code, reason=reason)


class _Flight:
    """One probe, how many callers wait for it, and when it began to look (only then is it too late to join)."""

    def __init__(self, probe: Callable[[], Awaitable[GpuProbe]]) -> None:
        self.waiters = 0
        self.started = math.inf
        self._probe = probe
        self.task = asyncio.create_task(self._look(), name="gpu-probe")

    async def _look(self) -> GpuProbe:
        self.started = time.monotonic()
        return await self._probe()


class GpuCheck:
    """The GPU's state, looked up once for all plugins and again when a restart asks. For one event loop.

    A probe belongs to its callers: it runs as long as one of them waits, and its children end with it.
    """

    def __init__(
        self, *, timeout_s: float = 20.0, pci_devices: Path = PCI_DEVICES, proc_gpus: Path = PROC_GPUS
    ) -> None:
        """`timeout_s` (seconds) bounds each of the two questions, which are asked at once."""
        self._timeout_s = timeout_s
        self._pci_devices = pci_devices
        self._proc_gpus = proc_gpus
        self._flight: _Flight | None = None
        self._known: list[Finding] | None = None
        self._known_since = -math.inf

    async def findings(self, *, refresh: bool = False) -> list[Finding]:
        """What keeps plugins from a GPU; empty if nothing does.

        Cached. With `refresh`, the answer is from a look that began after this call did.
        """
        asked = time.monotonic() if refresh else -math.inf
        while self._known is None or self._known_since < asked:
            await self._wait_for_probe()
        return list(self._known)

    async def _wait_for_probe(self) -> None:
        if self._flight is None:
            self._flight = _Flight(self._probe)
        flight = self._flight
        flight.waiters += 1
        try:
            probe = await asyncio.shield(flight.task)
        finally:
            flight.waiters -= 1
            if self._flight is flight and (flight.task.done() or flight.waiters == 0):
                self._flight = None
            if flight.waiters == 0 and not flight.task.done():
                flight.task.cancel()
                await asyncio.wait([flight.task])  # its children are gone before the last caller is
        if flight.started > self._known_since:
            self._known, self._known_since = classify(probe), flight.started

    async def _probe(self) -> GpuProbe:
        return await probe_gpu(timeout_s=self._timeout_s, pci_devices=self._pci_devices, proc_gpus=self._proc_gpus)
