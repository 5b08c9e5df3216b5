"""The GPU check: its verdicts as a table, and the real path with real children, some of them hostile.

What the machine does not have is faked: `nvidia-smi` on PATH, torch on PYTHONPATH, the PCI bus as a folder.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import select
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any, TypeVar

import psutil
import pytest
import uvloop
from blockbuster import blockbuster_ctx

from engine.errors import ReasonCode
from engine.loader.child import run_child
from engine.loader.findings import Finding, combine
from engine.loader.gpu import GpuCheck, classify
from engine.loader.gpu_probe import GpuProbe, SmiEvidence, TorchEvidence

T = TypeVar("T")

GPU = SmiEvidence("answered", ("NVIDIA H200",))
NONE = SmiEvidence("answered")
NO_SMI = SmiEvidence("missing")
SMI_FAILS = SmiEvidence("failed", message="couldn't communicate with the NVIDIA driver")
SMI_HANGS = SmiEvidence("timeout")
WORKS = TorchEvidence("answered", available=True, version="2.13.0", cuda="13.0")
REFUSED = TorchEvidence("answered", version="2.13.0", cuda="13.0", message="driver is too old")
CPU = TorchEvidence("answered", version="2.13.0+cpu")
ROCM = TorchEvidence("answered", version="2.13.0", hip="6.4")
ROCM_WORKS = TorchEvidence("answered", available=True, version="2.13.0", hip="6.4")
MISSING = TorchEvidence("missing", message="torch")
INCOMPLETE = TorchEvidence("incomplete", message="sympy")
BROKEN = TorchEvidence("broken", message="it died of SIGSEGV")
HANGS = TorchEvidence("timeout")
NOT_STARTED = TorchEvidence("not_started", message="out of memory")
PCI = ("0000:01:00.0",)

# nvidia-smi, on the PCI bus, torch → codes in order, words of the combined reason
VERDICTS: list[tuple[SmiEvidence, tuple[str, ...], TorchEvidence, list[str], str]] = [
    (GPU, PCI, WORKS, [], ""),
    (NO_SMI, (), WORKS, [], ""),
    (SMI_HANGS, PCI, WORKS, [], ""),
    (NO_SMI, (), ROCM_WORKS, [], ""),
    # no hardware, whatever else is missing
    (NO_SMI, (), REFUSED, ["gpu_absent"], "nvidia-smi is not installed; no NVIDIA device on the PCI bus"),
    (NONE, (), REFUSED, ["gpu_absent"], "nvidia-smi lists none; no NVIDIA device"),
    (SMI_FAILS, (), REFUSED, ["gpu_absent"], "nvidia-smi fails: couldn't communicate"),
    (NO_SMI, (), CPU, ["gpu_absent", "torch_cpu_build"], "run it on a machine with a GPU · torch 2.13.0+cpu"),
    (NO_SMI, (), MISSING, ["gpu_absent", "torch_missing"], "pip install torch"),
    (NO_SMI, (), BROKEN, ["gpu_absent"], "this plugin needs one"),
    (NO_SMI, (), HANGS, ["gpu_absent"], "no NVIDIA GPU was found"),
    (NO_SMI, (), NOT_STARTED, ["gpu_absent"], "no NVIDIA GPU was found"),
    (NO_SMI, (), ROCM, ["gpu_absent", "torch_cpu_build"], "built for AMD's ROCm"),
    # hardware, but its driver does not work
    (NO_SMI, PCI, REFUSED, ["gpu_driver"], "on the PCI bus (0000:01:00.0), but nvidia-smi is not installed"),
    (NO_SMI, PCI, CPU, ["gpu_driver", "torch_cpu_build"], "--gpus all"),
    (NO_SMI, PCI, MISSING, ["gpu_driver", "torch_missing"], "install NVIDIA's driver"),
    (NONE, PCI, REFUSED, ["gpu_driver"], "nvidia-smi lists none; torch: driver is too old"),
    (SMI_FAILS, PCI, REFUSED, ["gpu_driver"], "couldn't communicate with the NVIDIA driver"),
    (SMI_FAILS, PCI, HANGS, ["gpu_driver", "gpu_check_timeout"], "repair NVIDIA's driver"),
    (SMI_HANGS, PCI, REFUSED, ["gpu_check_timeout"], "nvidia-smi did not answer within 20 s"),
    (SMI_HANGS, (), REFUSED, ["gpu_check_timeout"], "nvidia-smi did not answer within 20 s"),
    (SMI_HANGS, (), MISSING, ["gpu_check_timeout", "torch_missing"], "dmesg"),
    # hardware and driver, but torch cannot use them
    (GPU, PCI, CPU, ["torch_cpu_build"], "torch 2.13.0+cpu is built for CPU only; install a CUDA build"),
    (GPU, (), CPU, ["torch_cpu_build"], "built for CPU only"),
    (GPU, PCI, ROCM, ["torch_cpu_build"], "built for AMD's ROCm, not for CUDA"),
    (GPU, PCI, MISSING, ["torch_missing"], "package `torch` is missing; pip install torch"),
    (GPU, PCI, INCOMPLETE, ["torch_missing"], "the module `sympy` that it imports is missing"),
    (GPU, PCI, HANGS, ["gpu_check_timeout"], "torch did not say within 20 s"),
    (GPU, PCI, NOT_STARTED, ["gpu_check_timeout"], "could not be started (out of memory)"),
    (GPU, PCI, REFUSED, ["gpu_driver"], "nvidia-smi lists NVIDIA H200, but torch.cuda.is_available() is False: d"),
    (GPU, PCI, BROKEN, ["gpu_driver"], "cannot be imported with CUDA: it died of SIGSEGV"),
]  # fmt: skip


@pytest.mark.parametrize(("smi", "devices", "torch", "codes", "words"), VERDICTS)
def test_each_cause_has_its_own_code(
    smi: SmiEvidence, devices: tuple[str, ...], torch: TorchEvidence, codes: list[str], words: str
) -> None:
    findings = classify(GpuProbe(smi=smi, torch=torch, devices=devices))
    assert [finding.reason_code.value for finding in findings] == codes
    for finding in findings:
        assert finding.check == "gpu"
        assert ";" in finding.reason
    if codes:
        cause = combine(findings)
        assert cause.reason_code == codes[0]
        assert words in cause.reason


def test_a_gpu_that_the_environment_hides_is_said_to_be_hidden() -> None:
    (finding,) = classify(GpuProbe(smi=GPU, torch=REFUSED, devices=PCI, visible_devices=""))
    assert finding.reason_code is ReasonCode.GPU_DRIVER
    assert 'CUDA_VISIBLE_DEVICES="" hides it: unset it and restart the engine' in finding.reason


# Real children


class Machine:
    """A pretended machine: what `nvidia-smi`, torch and the PCI bus do on it."""

    def __init__(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.root = root
        for name in ("bin", "python", "pci", "proc"):
            (root / name).mkdir()
        monkeypatch.setenv("PATH", str(root / "bin"))
        monkeypatch.setenv("PYTHONPATH", str(root / "python"))
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        self.torch("raise ModuleNotFoundError(\"No module named 'torch'\", name='torch')")

    def nvidia_smi(self, script: str) -> None:
        file = self.root / "bin" / "nvidia-smi"
        file.write_text(f"#!/bin/sh\n{script}\n")
        file.chmod(0o755)

    def torch(self, code: str) -> None:
        package = self.root / "python" / "torch"
        package.mkdir(exist_ok=True)
        (package / "__init__.py").write_text(code)

    def device(self, address: str, vendor: str, kind: str) -> None:
        folder = self.root / "pci" / address
        folder.mkdir()
        (folder / "vendor").write_text(f"{vendor}\n")
        (folder / "class").write_text(f"{kind}\n")

    def check(self, timeout_s: float = 20.0) -> GpuCheck:
        return GpuCheck(timeout_s=timeout_s, pci_devices=self.root / "pci", proc_gpus=self.root / "proc" / "gpus")


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    return Machine(tmp_path, monkeypatch)


Run = Callable[[Coroutine[Any, Any, T]], T]


@pytest.fixture(autouse=True, scope="module")
def warm_uvloop() -> None:
    """What its first loop opens, libuv's pipe for signals, stays for as long as the process."""
    uvloop.new_event_loop().close()


@pytest.fixture(params=["asyncio", "uvloop"])
def on_loop(request: pytest.FixtureRequest) -> Iterator[Run[Any]]:
    """Runs a coroutine on either event loop; blocking it is an error."""

    async def watched(work: Coroutine[Any, Any, T]) -> T:
        with blockbuster_ctx():
            return await work

    def run(work: Coroutine[Any, Any, T]) -> T:
        factory = uvloop.new_event_loop if request.param == "uvloop" else asyncio.new_event_loop
        with asyncio.Runner(loop_factory=factory) as runner:
            return runner.run(watched(work))

    before = set(psutil.Process().children())
    yield run
    assert set(psutil.Process().children()) <= before  # every child was reaped


def torch_that(available: str = "False", cuda: str | None = "13.0", before: str = "") -> str:
    return f"""
{before}
__version__ = "2.13.0"
class version:
    cuda, hip = {cuda!r}, None
class cuda:
    @staticmethod
    def is_available():
        return {available}
    @staticmethod
    def init():
        raise RuntimeError("Found no NVIDIA driver on your system")
"""


LISTS_ONE = 'echo "GPU 0: NVIDIA H200 (UUID: GPU-1)"; echo "  MIG 1g.18gb Device 0: (UUID: MIG-1)"'


def test_a_working_gpu_gives_no_finding(machine: Machine, on_loop: Run[list[Finding]]) -> None:
    machine.nvidia_smi(LISTS_ONE)
    machine.torch(torch_that("True"))
    assert on_loop(machine.check().findings()) == []


# nvidia-smi's script, torch's code, code of the first finding, words of its reason
CHILDREN: dict[str, tuple[str | None, str | None, str, str]] = {
    "nothing": (None, None, "gpu_absent", "nvidia-smi is not installed"),
    "smi lists none": ("echo No devices found.; exit 6", None, "gpu_absent", "nvidia-smi lists none"),
    "smi fails": (
        "echo NVIDIA-SMI has failed; echo Install a driver.; exit 9",
        None, "gpu_absent", "fails: it ended with exit code 9: NVIDIA-SMI has failed Install a driver",
    ),
    "smi dies": ("kill -SEGV $$", None, "gpu_absent", "nvidia-smi fails: it died of SIGSEGV"),
    "torch missing": (LISTS_ONE, None, "torch_missing", "pip install torch"),
    "torch incomplete": (LISTS_ONE, "import hf_nowhere", "torch_missing", "module `hf_nowhere`"),
    "cpu build": (LISTS_ONE, torch_that(cuda=None), "torch_cpu_build", "torch 2.13.0 is built for CPU only"),
    "no driver": (LISTS_ONE, torch_that(), "gpu_driver", "is False: Found no NVIDIA driver on your system"),
    "warning": (
        LISTS_ONE,
        torch_that('__import__("warnings").warn("CUDA initialization: the driver\\nis too old.")'),
        "gpu_driver", "is False: CUDA initialization: the driver is too old",
    ),
    "import raises": (
        LISTS_ONE, "raise OSError('libcudart.so.13: cannot open shared object file')",
        "gpu_driver", "OSError: libcudart.so.13: cannot open shared object file",
    ),
    "is_available raises": (LISTS_ONE, torch_that("1 / 0"), "gpu_driver", "ZeroDivisionError"),
    "segfault": (LISTS_ONE, "import ctypes; ctypes.string_at(0)", "gpu_driver", "it died of SIGSEGV"),
    "os._exit": (LISTS_ONE, "import os; os._exit(0)", "gpu_driver", "it ended with exit code 0"),
    "sys.exit": (LISTS_ONE, "raise SystemExit('stop')", "gpu_driver", "SystemExit: stop"),
    "not torch": (LISTS_ONE, "", "gpu_driver", "AttributeError"),
    "huge message": (LISTS_ONE, "raise RuntimeError('é\U0001f525' * 10**6)", "gpu_driver", "RuntimeError: é"),
    "output closed": (LISTS_ONE, "import os; os.close(1); os.close(2)", "gpu_driver", "it ended with exit code"),
}  # fmt: skip


@pytest.mark.parametrize("case", CHILDREN)
def test_what_a_child_does_becomes_the_reason(machine: Machine, on_loop: Run[list[Finding]], case: str) -> None:
    script, code, reason_code, words = CHILDREN[case]
    if script is not None:
        machine.nvidia_smi(script)
    if code is not None:
        machine.torch(code)
    finding = on_loop(machine.check().findings())[0]
    assert finding.reason_code.value == reason_code, finding.reason
    assert words in finding.reason
    assert finding.reason.isprintable()
    assert len(finding.reason) < 600


def test_a_child_that_prints_megabytes_is_understood_all_the_same(
    machine: Machine, on_loop: Run[list[Finding]]
) -> None:
    machine.nvidia_smi(LISTS_ONE)
    noise = 'import sys; sys.stdout.write("x" * 5_000_000 + "\\n"); sys.stderr.write("y" * 5_000_000)'
    machine.torch(torch_that("True", before=noise))
    assert on_loop(machine.check().findings()) == []


def test_output_is_kept_bounded(on_loop: Run[Any]) -> None:
    argv = [sys.executable, "-c", "print('x' * 3_000_000); print('end')"]
    result = on_loop(run_child(argv, timeout_s=20))
    assert result.exit_code == 0
    assert len(result.output) <= 16 * 1024
    assert result.output.endswith("x\nend\n")


@pytest.mark.parametrize("program", ["no-such-program", "true"])
def test_no_descriptor_of_another_thread_is_closed(on_loop: Run[Any], program: str) -> None:
    # A descriptor that is closed twice is by then often another one's: of the log, or of a worker.
    over = threading.Event()
    lost: list[str] = []

    def hold() -> None:
        while not over.is_set():
            held = [os.open("/proc/self/stat", os.O_RDONLY) for _ in range(8)]
            files = [os.fstat(fd).st_ino for fd in held]
            time.sleep(0)
            for fd, file in zip(held, files, strict=True):
                try:
                    if os.fstat(fd).st_ino != file:
                        lost.append("it is another file now")
                    os.close(fd)
                except OSError as exc:
                    lost.append(str(exc))

    async def children() -> None:
        for _ in range(150):
            with contextlib.suppress(FileNotFoundError):
                await run_child([program], timeout_s=20)

    threads = [threading.Thread(target=hold) for _ in range(2)]
    for thread in threads:
        thread.start()
    try:
        on_loop(children())
    finally:
        over.set()
        for thread in threads:
            thread.join()
    assert lost == []


def ends(pid: int) -> bool:
    """Whether a process that was killed is gone; the kernel may take a moment."""
    try:
        descriptor = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    try:
        return bool(select.select([descriptor], [], [], 20)[0])
    finally:
        os.close(descriptor)


HANGS_WITH_CHILD = """
import os, pathlib, signal, time
for number in signal.SIGTERM, signal.SIGINT, signal.SIGHUP:
    signal.signal(number, signal.SIG_IGN)
pid = os.fork()
if pid:
    pathlib.Path({pids!r}).write_text(f"{{os.getpid()}} {{pid}}")
time.sleep(600)
"""


def test_a_check_that_hangs_is_stopped_with_everything_it_started(
    machine: Machine, on_loop: Run[list[Finding]]
) -> None:
    pids = machine.root / "pids"
    machine.nvidia_smi(LISTS_ONE)
    machine.torch(HANGS_WITH_CHILD.format(pids=str(pids)))
    (finding,) = on_loop(machine.check(timeout_s=3).findings())
    assert finding.reason_code is ReasonCode.GPU_CHECK_TIMEOUT
    assert "torch did not say within 3 s" in finding.reason
    assert [ends(int(pid)) for pid in pids.read_text().split()] == [True, True]


def test_an_nvidia_smi_that_hangs_is_a_timeout_and_not_an_absent_gpu(
    machine: Machine, on_loop: Run[list[Finding]]
) -> None:
    machine.nvidia_smi("exec /bin/sleep 600")
    finding = on_loop(machine.check(timeout_s=0.5).findings())[0]
    assert finding.reason_code is ReasonCode.GPU_CHECK_TIMEOUT
    assert "nvidia-smi did not answer within 0.5 s" in finding.reason


def test_the_answer_does_not_wait_for_torch_to_unload(machine: Machine, on_loop: Run[list[Finding]]) -> None:
    machine.nvidia_smi(LISTS_ONE)
    machine.torch(torch_that("True", before="import atexit, time; atexit.register(time.sleep, 600)"))
    started = time.monotonic()
    assert on_loop(machine.check(timeout_s=30).findings()) == []
    assert time.monotonic() - started < 25


def test_a_gpu_on_the_pci_bus_tells_a_missing_driver_from_missing_hardware(
    machine: Machine, on_loop: Run[list[Finding]]
) -> None:
    machine.device("0000:00:1f.0", "0x8086", "0x030000")  # another maker's GPU
    machine.device("0000:00:02.0", "0x10de", "0x0c0330")  # NVIDIA's USB controller
    (machine.root / "pci" / "0000:00:03.0").mkdir()  # one that cannot be read
    assert on_loop(machine.check().findings())[0].reason_code is ReasonCode.GPU_ABSENT
    machine.device("0000:01:00.0", "0x10de", "0x030200")
    first = on_loop(machine.check().findings())[0]
    assert first.reason_code is ReasonCode.GPU_DRIVER
    assert "an NVIDIA GPU is on the PCI bus (0000:01:00.0)" in first.reason


def counting(machine: Machine) -> Callable[[], int]:
    """A torch that leaves a mark for each look at it."""
    marks = machine.root / "marks"
    marks.write_text("")
    machine.nvidia_smi(LISTS_ONE)
    machine.torch(torch_that("True", before=f"open({str(marks)!r}, 'a').write('x')"))
    return lambda: len(marks.read_text())


def test_one_look_serves_all_callers_until_a_refresh_asks_again(machine: Machine, on_loop: Run[list[int]]) -> None:
    looks = counting(machine)

    async def scenario() -> list[int]:
        check = machine.check()
        await asyncio.gather(*(check.findings() for _ in range(5)))
        await check.findings()
        seen = [await asyncio.to_thread(looks)]
        await asyncio.gather(*(check.findings(refresh=True) for _ in range(5)), check.findings())
        return [*seen, await asyncio.to_thread(looks)]

    assert on_loop(scenario()) == [1, 2]


def test_a_refresh_never_answers_from_a_look_that_began_before_it(machine: Machine, on_loop: Run[Any]) -> None:
    looks = counting(machine)

    async def scenario() -> int:
        check = machine.check()
        first = asyncio.create_task(check.findings())
        while not await asyncio.to_thread(looks):
            pass  # until its look is under way
        await check.findings(refresh=True)
        await first
        return await asyncio.to_thread(looks)

    assert on_loop(scenario()) == 2


def test_a_caller_that_is_cancelled_takes_nothing_from_the_others(machine: Machine, on_loop: Run[Any]) -> None:
    looks = counting(machine)

    async def scenario() -> int:
        check = machine.check()
        leaving, staying = (asyncio.create_task(check.findings()) for _ in range(2))
        await asyncio.sleep(0)
        leaving.cancel()
        assert await staying == []
        with pytest.raises(asyncio.CancelledError):
            await leaving
        return await asyncio.to_thread(looks)

    assert on_loop(scenario()) == 1


def test_when_the_last_caller_leaves_the_children_go_too_and_the_next_one_starts_afresh(
    machine: Machine, on_loop: Run[Any]
) -> None:
    pids = machine.root / "pids"
    os.mkfifo(machine.root / "ready")
    machine.nvidia_smi(LISTS_ONE)
    ready = f"\nopen({str(machine.root / 'ready')!r}, 'w').close() if pid else None\n"
    code = HANGS_WITH_CHILD.format(pids=str(pids)).replace("\ntime.sleep", f"{ready}time.sleep")
    machine.torch(code)

    async def scenario() -> list[bool]:
        check = machine.check()
        caller = asyncio.create_task(check.findings())
        await asyncio.to_thread((machine.root / "ready").read_text)  # opens when the child has written its pids
        caller.cancel()
        with pytest.raises(asyncio.CancelledError):
            await caller
        started = await asyncio.to_thread(pids.read_text)
        state = [await asyncio.to_thread(ends, int(pid)) for pid in started.split()]
        await asyncio.to_thread(machine.torch, torch_that("True"))
        assert await check.findings() == []
        return state

    assert on_loop(scenario()) == [True, True]


ENGINE = """
import asyncio, sys
from pathlib import Path
from engine.loader.gpu import GpuCheck
asyncio.run(GpuCheck(timeout_s=600, pci_devices=Path("nowhere")).findings())
"""


def test_a_check_does_not_outlive_an_engine_that_was_killed(machine: Machine) -> None:
    ready = machine.root / "ready"
    os.mkfifo(ready)
    machine.torch(f"import os, time; open({str(ready)!r}, 'w').write(str(os.getpid())); time.sleep(600)")
    checkout = str(Path(__file__).parent.parent)
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([os.environ["PYTHONPATH"], checkout])}
    with subprocess.Popen([sys.executable, "-c", ENGINE], env=env, cwd=machine.root) as engine:
        child = os.pidfd_open(int(ready.read_text()))
        engine.kill()
    ended, _, _ = select.select([child], [], [], 20)
    os.close(child)
    assert ended
