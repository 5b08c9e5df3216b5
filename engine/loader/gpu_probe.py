"""Evidence about the GPU: what the kernel sees, what nvidia-smi says, what torch says in a child."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from pathlib import Path
from typing import Literal

import msgspec

from engine.loader.child import ChildResult, run_child
from engine.loader.toml_source import printable

PCI_DEVICES = Path("/sys/bus/pci/devices")
PROC_GPUS = Path("/proc/driver/nvidia/gpus")

_MESSAGE_LIMIT = 300


class SmiEvidence(msgspec.Struct, frozen=True):
    """What `nvidia-smi -L` did. `gpus` are the names it lists, `message` what it said when it failed."""

    state: Literal["answered", "missing", "failed", "timeout"]
    gpus: tuple[str, ...] = ()
    message: str = ""


class TorchEvidence(msgspec.Struct, frozen=True):
    """What `import torch` and `torch.cuda.is_available()` did in a child.

    missing: no module torch. incomplete: a module that torch needs is missing. broken: it raised otherwise,
    or the child died. not_started: the child could not be started.
    """

    state: Literal["answered", "missing", "incomplete", "broken", "timeout", "not_started"]
    available: bool = False
    version: str = ""
    cuda: str | None = None  # the CUDA version torch was built for; None: built for CPU only
    hip: str | None = None  # the same for AMD's ROCm
    message: str = ""


class GpuProbe(msgspec.Struct, frozen=True):
    """All evidence of one look at this machine."""

    smi: SmiEvidence
    torch: TorchEvidence
    devices: tuple[str, ...] = ()  # NVIDIA GPUs on the PCI bus or known to the kernel's driver, by address
    visible_devices: str | None = None  # CUDA_VISIBLE_DEVICES of the engine
    timeout_s: float = 20.0


class _Answer(msgspec.Struct):
    """One line of JSON from the child, `_PROBE` below."""

    error: str = ""
    missing: str = ""
    available: bool = False
    version: str = ""
    cuda: str | None = None
    hip: str | None = None
    message: str = ""


_MARK = "holdfast-gpu-probe "
_DECODER = msgspec.json.Decoder(_Answer)

# Runs as `python -P -c`. PR_SET_PDEATHSIG (1): if the engine is killed, this goes with it. It writes its
# answer straight to descriptor 1, whatever torch did to sys.stdout, and then waits to be killed: unloading
# CUDA can take seconds, or crash. Texts are cut so that the answer fits what `run_child` keeps.
_PROBE = """
import ctypes, json, os, signal, sys, warnings
try:
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)
except Exception:
    pass
if os.getppid() != int(sys.argv[1]):
    os._exit(1)
answer = {}
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    try:
        import torch
        version = getattr(torch, "version", None)
        answer["version"] = str(getattr(torch, "__version__", ""))[:100]
        for name in ("cuda", "hip"):
            built = getattr(version, name, None)
            answer[name] = None if built is None else str(built)[:100]
        answer["available"] = bool(torch.cuda.is_available())
        if not answer["available"] and (answer["cuda"] or answer["hip"]):
            try:
                torch.cuda.init()
            except Exception as exc:
                answer["message"] = str(exc)[:500]
    except ModuleNotFoundError as exc:
        answer["missing"] = str(exc.name or exc)[:200]
    except BaseException as exc:
        answer["error"] = (type(exc).__name__ + ": " + str(exc))[:500]
said = [str(w.message) for w in caught if "cuda" in str(w.message).lower()]
if said:
    answer["message"] = said[-1][:500]
sys.stdout = sys.stderr = None
os.write(1, ("\\n" + MARK + json.dumps(answer) + "\\n").encode())
while True:
    signal.pause()
"""


async def probe_gpu(*, timeout_s: float, pci_devices: Path = PCI_DEVICES, proc_gpus: Path = PROC_GPUS) -> GpuProbe:
    """Look at this machine: all at once, within `timeout_s` (seconds) each. Raises nothing of its own."""
    async with asyncio.TaskGroup() as group:
        smi = group.create_task(_ask_nvidia_smi(timeout_s))
        torch = group.create_task(_ask_torch(timeout_s))
        devices = group.create_task(asyncio.to_thread(_nvidia_devices, pci_devices, proc_gpus))
    return GpuProbe(
        smi=smi.result(),
        torch=torch.result(),
        devices=devices.result(),
        visible_devices=os.environ.get("CUDA_VISIBLE_DEVICES"),
        timeout_s=timeout_s,
    )


async def _ask_nvidia_smi(timeout_s: float) -> SmiEvidence:
    try:
        result = await run_child(["nvidia-smi", "-L"], timeout_s=timeout_s)
    except FileNotFoundError:
        return SmiEvidence("missing")
    except OSError as error:
        return SmiEvidence("failed", message=f"it cannot be run: {error.strerror}")
    if result.timed_out:
        return SmiEvidence("timeout")
    lines = [line.strip() for line in result.output.splitlines() if line.strip()]
    # "GPU 0: NVIDIA H200 (UUID: GPU-…)"; MIG instances follow on lines of their own.
    gpus = tuple(
        printable(line.partition(": ")[2].partition(" (UUID")[0]) for line in lines if line.startswith("GPU ")
    )
    if gpus:
        return SmiEvidence("answered", gpus)
    if result.exit_code == 0 or any(line.lower().startswith("no devices") for line in lines):
        return SmiEvidence("answered")
    return SmiEvidence("failed", message=_last_words([" ".join(lines)] if lines else [], result))


async def _ask_torch(timeout_s: float) -> TorchEvidence:
    code = _PROBE.replace("MARK", repr(_MARK))
    argv = [sys.executable, "-P", "-c", code, str(os.getpid())]
    try:
        result = await run_child(argv, timeout_s=timeout_s, until=_MARK.encode())
    except OSError as error:
        return TorchEvidence("not_started", message=f"{sys.executable or 'python'}: {error.strerror}")
    if result.timed_out:
        return TorchEvidence("timeout")
    lines = [line.strip() for line in result.output.splitlines() if line.strip()]
    answer = _answer_in(lines)
    if answer is None:
        return TorchEvidence("broken", message=_last_words(lines, result))
    if answer.missing:
        state: Literal["missing", "incomplete"] = "missing" if answer.missing == "torch" else "incomplete"
        return TorchEvidence(state, message=printable(answer.missing))
    if answer.error:
        return TorchEvidence("broken", version=answer.version, message=_short(answer.error))
    return TorchEvidence(
        "answered",
        available=answer.available,
        version=printable(answer.version),
        cuda=answer.cuda and printable(answer.cuda),
        hip=answer.hip and printable(answer.hip),
        message=_short(answer.message),
    )


def _answer_in(lines: list[str]) -> _Answer | None:
    for line in reversed(lines):
        if line.startswith(_MARK):
            try:
                return _DECODER.decode(line.removeprefix(_MARK))
            except msgspec.MsgspecError:
                return None
    return None


def _last_words(lines: list[str], result: ChildResult) -> str:
    """How a child ended, and the last line it wrote."""
    code = result.exit_code
    ended = "it was stopped" if code is None else f"it ended with exit code {code}"
    if code is not None and code < 0:
        ended = f"it died of {_signal_name(-code)}"
    return _short(f"{ended}: {lines[-1]}" if lines else ended)


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def _short(text: str) -> str:
    """Free text of torch, CUDA or nvidia-smi, on one line and bounded."""
    return printable(" ".join(text.split()), _MESSAGE_LIMIT).rstrip(" .")


def _nvidia_devices(pci_devices: Path, proc_gpus: Path) -> tuple[str, ...]:
    """Addresses of NVIDIA display controllers (PCI vendor 0x10de, base class 0x03). Reads files."""
    found = set(_names(proc_gpus))
    for name in _names(pci_devices):
        device = pci_devices / name
        try:
            vendor, kind = (device / "vendor").read_text().strip(), (device / "class").read_text().strip()
        except (OSError, ValueError):
            continue
        if vendor == "0x10de" and kind.startswith("0x03"):
            found.add(name)
    return tuple(sorted(found))


def _names(folder: Path) -> list[str]:
    try:
        return os.listdir(folder)  # noqa: PTH208 - names, not paths
    except OSError:
        return []
