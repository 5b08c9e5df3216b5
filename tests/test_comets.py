"""Processes that fork and exit without pause, so that none lives long enough to be looked for."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import psutil
import pytest
from support import descendants, hosting, until, write_honest, write_plugin
from zoo import above, spares

from engine.worker import reaper

LIFE_S = 30  # they end by themselves, later than anybody here waits for them
COMET = f"""
#include <signal.h>
#include <time.h>
#include <unistd.h>
int main(void) {{
    struct timespec now, end;
    signal(SIGCHLD, SIG_IGN);
    clock_gettime(CLOCK_MONOTONIC, &end);
    for (int count = 0;; count++) {{
        if (fork() > 0) _exit(0);
        if (count == 50) write(1, ".", 1), close(1);
        clock_gettime(CLOCK_MONOTONIC, &now);
        if (now.tv_sec > end.tv_sec + {LIFE_S}) _exit(0);
    }}
}}
"""
COMETS = """
import os, signal, subprocess
class Plugin:
    def __init__(self, context): pass
    def validate(self): pass
    def launch(self, program: str, count: int) -> None:
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)
        source, sink = os.pipe()
        for _ in range(count):
            subprocess.Popen([program], stdin=-3, stdout=sink, stderr=-3, start_new_session=True)
        flying = b""
        while len(flying) < count:
            flying += os.read(source, count)
"""


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The comet. In C: one in Python takes so long to fork that any sweep hits it."""
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("there is no C compiler (cc) to build the comet with")
    folder = tmp_path_factory.mktemp("comet")
    (folder / "comet.c").write_text(COMET)
    subprocess.run([compiler, "-O1", "-static", "-w", "-o", folder / "comet", folder / "comet.c"], check=True)
    return folder / "comet"


def comets() -> list[str]:
    """Those that are alive, and what is left of the dead ones, below this process."""
    found = []
    for pid in descendants():
        try:
            process = psutil.Process(pid)
            if process.status() == psutil.STATUS_ZOMBIE or process.name() == "comet":
                found.append(f"{pid} {process.status()}")
        except psutil.NoSuchProcess:
            continue
    return found


@pytest.mark.parametrize("count", [1, 12])
async def test_comets_end_with_their_worker_while_other_plugins_are_restarted(
    count: int, program: Path, plugins: Path, data_dir: Path
) -> None:
    write_plugin(plugins, "comets", COMETS, ["launch"])
    write_honest(plugins)
    async with hosting(plugins, data_dir) as engine:
        await engine.run("comets", "launch", {"program": str(program), "count": count})
        assert (await engine.restart("comets")).state == "INITIALIZED"
        for _ in range(3):
            assert (await engine.restart("honest")).state == "INITIALIZED"
        await until(lambda: not comets())
        await until(lambda: len(descendants() - spares()) == len(above(engine)) + 2)
    assert not descendants()


def test_a_sweep_stops_when_its_time_is_over_and_tells_of_everybody_who_ended() -> None:
    ended: list[int] = []
    assert not reaper.end_orphans(lambda _: False, 0.0, lambda pid, _: ended.append(pid))
    assert not ended
