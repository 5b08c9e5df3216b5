"""The command line, as the processes that people and scripts start."""

from __future__ import annotations

import json
import os
import pty
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest
from support import write_plugin

from engine.cli.app import run_command_line

ROOT = Path(__file__).resolve().parent.parent
TOKEN = "a-secret-of-the-server"

PLUGIN = """
import os, time
from collections.abc import Iterator
from pathlib import Path

class Plugin:
    def __init__(self, context): pass
    def validate(self): pass
    def echo(self, text: str, times: int = 1) -> list: return [text] * times
    def total(self, numbers: list[int]) -> int: return sum(numbers)
    def size(self, file: Path) -> int: return len(file.read_bytes())
    def blob(self) -> bytes: return bytes(range(256))
    def nothing(self) -> None: pass
    def count(self, n: int, *, progress) -> Iterator[dict]:
        for k in range(n):
            yield {"n": k}
            progress(k + 1, n)
    def stumble(self) -> Iterator[int]:
        yield 1
        raise RuntimeError("two is too much")
    def hang(self) -> Iterator[int]:
        yield os.getpid()
        time.sleep(3600)
    def escape(self) -> None: raise KeyError("\\x1b[31mred\\nalert")
"""
TOOLS = ("echo", "total", "size", "blob", "nothing", "count", "stumble", "hang", "escape")


def environment(extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """This process's, without settings; byte code is kept, for this file starts Python a hundred times."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("HOLDFAST_")}
    kept.pop("PYTHONDONTWRITEBYTECODE", None)
    return {**kept, "PYTHONPATH": str(ROOT), "TERM": "xterm", "COLUMNS": "120", **(extra or {})}


def holdfast(
    *words: object, cwd: Path, env: Mapping[str, str] | None = None, start: Sequence[str] = ("-m", "engine")
) -> subprocess.CompletedProcess[str]:
    """Run the command line to its end, without a terminal."""
    return subprocess.run(
        [sys.executable, *start, *map(str, words)],
        cwd=cwd,
        env=environment(env),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=50,
        check=False,
    )


def together(
    *commands: Sequence[object], cwd: Path, env: Mapping[str, str] | None = None
) -> list[subprocess.CompletedProcess[str]]:
    """Run command lines side by side; what each came to, in their order."""
    with ThreadPoolExecutor(len(commands)) as threads:
        return list(threads.map(lambda words: holdfast(*words, cwd=cwd, env=env), commands))


@contextmanager
def serving(
    cwd: Path, *words: object, plugins: int = 0, env: Mapping[str, str] | None = None
) -> Iterator[tuple[str, list[str]]]:
    """A server on a free port: its URL, and the lines of its table. It must end with 0 when told to."""
    command = [sys.executable, "-m", "engine", "serve", "--no-bundled", "--port", "0", *map(str, words)]
    with (cwd / "serve.err").open("w+") as errors:
        process = subprocess.Popen(
            command, cwd=cwd, env=environment(env), stdout=subprocess.PIPE, stderr=errors, text=True
        )
        assert process.stdout is not None
        try:
            found = re.search(r"serves at (http://\S+)", process.stdout.readline())
            assert found, (cwd / "serve.err").read_text()
            yield found[1], [process.stdout.readline() for _ in range(plugins + 1 if plugins else 0)]
        finally:
            process.terminate()
            assert process.wait(30) == 0
            process.stdout.close()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A plugins folder with one plugin that does as it is told, and one that cannot work."""
    folder = tmp_path_factory.mktemp("cli") / "plugins"
    write_plugin(folder, "worker", PLUGIN, TOOLS)
    write_plugin(folder, "needy", PLUGIN, ["echo"], head='packages = ["no_such_package_anywhere"]')
    return folder


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[tuple[str, list[str]]]:
    """A server of that folder."""
    with serving(folder.parent, "--plugins", folder, "--data", folder.parent / "data", plugins=2) as running:
        yield running


@pytest.fixture
def url(server: tuple[str, list[str]]) -> str:
    """The address of that server."""
    return server[0]


@pytest.fixture(params=["remote", "local"])
def place(request: pytest.FixtureRequest, folder: Path) -> list[str]:
    """The flags that make `run` ask a server, or an engine of its own."""
    if request.param == "remote":
        return ["--url", request.getfixturevalue("url")]
    return ["--plugins", str(folder), "--no-bundled"]


def one_line(text: str) -> str:
    """The one line that stderr must be."""
    lines = text.splitlines()
    assert len(lines) == 1, text
    assert lines[0].startswith("holdfast: ")
    return lines[0].removeprefix("holdfast: ")


# Help and wrong use.


def test_help_and_version_answer_on_stdout(tmp_path: Path) -> None:
    shown = holdfast("--help", cwd=tmp_path)
    assert (shown.returncode, shown.stderr) == (0, "")
    for command in ("serve", "run", "list", "health", "crashes", "restart", "events", "check", "audit"):
        assert f"\n  {command} " in shown.stdout
    version = holdfast("--version", cwd=tmp_path)
    assert version.returncode == 0
    assert re.fullmatch(r"holdfast \S+\n", version.stdout)


def test_help_loads_neither_the_engine_nor_a_server(tmp_path: Path) -> None:
    code = (
        "import sys; sys.argv = ['holdfast', '--help']\n"
        "from engine.cli.app import run_command_line\n"
        "assert run_command_line() == 0\n"
        "heavy = {'aiohttp', 'uvloop', 'structlog', 'rich', 'engine.engine', 'sqlite3'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    shown = holdfast(cwd=tmp_path, start=("-c", code))
    assert shown.returncode == 0, shown.stderr


WRONG_USE = {
    "serve --prot 1": "--prot",
    "run": "PLUGIN",
    "events --after x": "--after",
    "serve --port 99999": "flag --port wants a whole number from 0 to 65,535, got 99999",
    "serve --config none.toml": "none.toml: there is no such file",
    "list --url localhost": "http://127.0.0.1:8700",
    "run p t word": "`word` is not an argument",
    "run p t a=1 a=2": "argument `a` is there twice",
    "run p t file=@none.mp4": "argument `file`: there is no file none.mp4",
    "run p t file=@.": "not a regular file",
    "run p t --out none/out": "--out none/out lies in a folder that does not exist",
    "run p t --url http://127.0.0.1:1 --plugins .": "give one or the other",
    "audit verify none": "none cannot be read",
}


@pytest.mark.parametrize("words", WRONG_USE)
def test_wrong_use_is_one_line_and_exit_2(
    words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["holdfast", *words.split()])
    assert run_command_line() == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert WRONG_USE[words] in one_line(err)


def test_no_server_is_exit_3_and_says_how_to_start_one(tmp_path: Path) -> None:
    with closing(socket.create_server(("127.0.0.1", 0))) as taken:
        free = f"http://127.0.0.1:{taken.getsockname()[1]}"
    commands = [["list"], ["health", "x"], ["crashes", "x"], ["restart", "x"], ["events"]]
    commands.append(["run", "x", "y"])
    for missing in together(*([*words, "--url", free] for words in commands), cwd=tmp_path):
        assert (missing.returncode, missing.stdout) == (3, "")
        assert f"no server answers at {free} (Connection refused); start one" in one_line(missing.stderr)


# Serve.


def test_serve_prints_its_address_and_the_plugins_table(server: tuple[str, list[str]]) -> None:
    url, table = server
    assert url.startswith("http://127.0.0.1:")
    assert table[0].split() == ["PLUGIN", "STATE", "REASON"]
    rows = {line.split()[0]: line for line in table[1:]}
    assert rows["worker"].split() == ["worker", "INITIALIZED"]
    assert "UNAVAILABLE  package_missing: package `no_such_package_anywhere` is missing" in rows["needy"]


def test_closed_standard_streams_are_no_trouble(tmp_path: Path) -> None:
    command = f"exec {sys.executable} -m engine check {tmp_path / 'plugins'} <&- >&- 2>&-"
    write_plugin(tmp_path / "plugins", "worker", PLUGIN, ["echo"])
    assert (
        subprocess.run(["sh", "-c", command], cwd=tmp_path, env=environment(), timeout=50, check=False).returncode
        == 0
    )
    serve = [sys.executable, "-m", "engine", "serve", "--no-bundled", "--port", "0", "--data", "data"]
    with subprocess.Popen(
        ["sh", "-c", 'exec "$@" <&- 2>&-', "sh", *serve], cwd=tmp_path, env=environment(), stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        assert b"serves at" in process.stdout.readline()
        process.terminate()
        assert process.wait(30) == 0


def test_port_in_use_is_exit_2_with_the_next_step(tmp_path: Path) -> None:
    with closing(socket.create_server(("127.0.0.1", 0))) as taken:
        port = taken.getsockname()[1]
        refused = holdfast("serve", "--no-bundled", "--port", port, "--data", "data", cwd=tmp_path)
    assert refused.returncode == 2
    assert re.search(rf"127\.0\.0\.1:{port}: .*in use; .*another port", one_line(refused.stderr))


def test_damaged_log_is_exit_2_and_moved_aside_only_when_asked(tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    (data / "events.db").write_bytes(b"this is no database" * 100)
    refused = holdfast("serve", "--no-bundled", "--data", data, cwd=tmp_path)
    assert refused.returncode == 2
    assert "--repair-log" in one_line(refused.stderr)
    assert (data / "events.db").read_bytes() == b"this is no database" * 100
    with serving(tmp_path, "--data", data, "--repair-log"):
        pass
    (aside,) = (path for path in data.iterdir() if path.read_bytes() == b"this is no database" * 100)
    assert str(aside) in (tmp_path / "serve.err").read_text()


def test_folders_that_cannot_be_used_are_exit_2(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    data, plugins = together(
        ["serve", "--no-bundled", "--port", "0", "--data", "file"],
        ["serve", "--plugins", "none", "--port", "0", "--data", "data"],
        cwd=tmp_path,
    )
    assert (data.returncode, plugins.returncode) == (2, 2)
    assert f"{tmp_path / 'file'}" in one_line(data.stderr)
    assert "plugins folder none does not exist" in one_line(plugins.stderr)


def test_token_is_asked_for_and_never_shown(tmp_path: Path) -> None:
    with serving(tmp_path, "--data", "data", env={"HOLDFAST_TOKEN": TOKEN}) as (url, _):
        refused = holdfast("list", "--url", url, cwd=tmp_path)
        assert refused.returncode == 2
        assert "HOLDFAST_TOKEN" in one_line(refused.stderr)
        assert holdfast("list", "--url", url, "--token", TOKEN, cwd=tmp_path).returncode == 0
        shown = holdfast("run", "--help", cwd=tmp_path, env={"HOLDFAST_TOKEN": TOKEN})
        assert TOKEN not in shown.stdout
    assert TOKEN not in (tmp_path / "serve.err").read_text()


# Run: the same here and there.


def test_run_prints_the_value_as_json(place: list[str], tmp_path: Path) -> None:
    (tmp_path / "file.bin").write_bytes(bytes(1234))
    calls = {
        "echo text=1 times=2": '["1","1"]\n',  # a form's text is typed by the tool's hints
        "size file=@file.bin": "1234\n",
        "echo text=@@x": '["@x"]\n',
        "total numbers=[1,2,3]": "6\n",
        "nothing": "null\n",
    }
    ran = together(*(["run", "worker", *words.split(), *place] for words in calls), cwd=tmp_path)
    for one, value in zip(ran, calls.values(), strict=True):
        assert (one.returncode, one.stdout, one.stderr) == (0, value, "")


def test_run_json_is_the_outcome_of_the_http_api(place: list[str], tmp_path: Path) -> None:
    ran = holdfast("run", "worker", "echo", "text=a", "--json", *place, cwd=tmp_path)
    outcome = json.loads(ran.stdout)
    assert outcome.pop("duration_ms") > 0
    assert outcome.pop("request_id")
    assert outcome == {"ok": True, "value": ["a"]}


def test_bad_input_is_exit_2_and_names_what_is_wrong(place: list[str], tmp_path: Path) -> None:
    calls = {
        "worker echo txt=a": "there is no argument `txt`; did you mean `text`?",
        "worker echo text=a times=many": "argument `times`",
        "worker ehco": "`worker` has no tool `ehco`; did you mean `echo`?",
        "wroker echo": "there is no plugin `wroker`; did you mean `worker`?",
    }
    ran = together(*(["run", *words.split(), *place] for words in calls), cwd=tmp_path)
    for wrong, said in zip(ran, calls.values(), strict=True):
        assert (wrong.returncode, wrong.stdout) == (2, "")
        assert said in one_line(wrong.stderr)


def test_plugin_out_of_service_is_exit_1_with_its_reason(place: list[str], tmp_path: Path) -> None:
    refused = holdfast("run", "needy", "echo", "text=a", *place, cwd=tmp_path)
    assert (refused.returncode, refused.stdout) == (1, "")
    assert "package `no_such_package_anywhere` is missing" in one_line(refused.stderr)


def test_items_are_lines_of_a_file_or_of_stdout(place: list[str], tmp_path: Path) -> None:
    count = ("run", "worker", "count", *place)
    to_file, to_stdout, as_json = together(
        [*count, "n=3", "--out", "items.jsonl"], [*count, "n=3"], [*count, "n=1", "--json"], cwd=tmp_path
    )
    items = [{"n": n} for n in range(3)]
    assert (to_file.returncode, to_file.stdout) == (0, "")
    assert re.fullmatch(r"worker count: 3 items in items\.jsonl after [\d.]+ s", one_line(to_file.stderr))
    assert [json.loads(line) for line in (tmp_path / "items.jsonl").read_text().splitlines()] == items
    assert [json.loads(line) for line in to_stdout.stdout.splitlines()] == items
    *others, last = map(json.loads, as_json.stdout.splitlines())
    assert [line["item"] for line in others if "item" in line] == [{"n": 0}]
    assert last["outcome"]["ok"] is True


def test_run_ends_quietly_with_whoever_reads_its_items(place: list[str], tmp_path: Path) -> None:
    command = [sys.executable, "-m", "engine", "run", "worker", "count", "n=100000", *place]
    with subprocess.Popen(
        command, cwd=tmp_path, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as reading:
        assert reading.stdout is not None
        assert reading.stderr is not None
        assert reading.stdout.readline() == b'{"n":0}\n'
        reading.stdout.close()
        assert reading.stderr.read() == b""
    assert reading.returncode == 0


def test_no_items_leave_an_empty_file_and_bad_input_an_old_one(place: list[str], tmp_path: Path) -> None:
    for name in ("empty", "kept"):
        (tmp_path / name).write_text("old")
    count = ("run", "worker", "count", *place)
    fine, wrong = together([*count, "n=0", "--out", "empty"], [*count, "n=x", "--out", "kept"], cwd=tmp_path)
    assert (fine.returncode, wrong.returncode) == (0, 2)
    assert (tmp_path / "empty").read_text() == ""
    assert (tmp_path / "kept").read_text() == "old"


def test_plugin_that_breaks_in_mid_stream_is_exit_1_after_its_items(folder: Path, tmp_path: Path) -> None:
    ran = holdfast("run", "worker", "stumble", "--plugins", folder, "--no-bundled", cwd=tmp_path)
    assert (ran.returncode, ran.stdout) == (1, "1\n")
    assert "RuntimeError: two is too much" in ran.stderr


def test_text_of_a_plugin_cannot_drive_the_terminal(folder: Path, tmp_path: Path) -> None:
    ran = holdfast("run", "worker", "escape", "--plugins", folder, "--no-bundled", cwd=tmp_path)
    assert ran.returncode == 1
    assert "\x1b" not in one_line(ran.stderr)


def test_bytes_go_raw_to_a_file(folder: Path, tmp_path: Path) -> None:
    ran = holdfast("run", "worker", "blob", "--out", "b", "--plugins", folder, "--no-bundled", cwd=tmp_path)
    assert ran.returncode == 0, ran.stderr
    assert (tmp_path / "b").read_bytes() == bytes(range(256))


def test_run_falls_back_to_an_engine_of_its_own_and_says_so(folder: Path, tmp_path: Path) -> None:
    code = (
        "import engine.cli.run\n"
        "engine.cli.run.DEFAULT_URL = 'http://127.0.0.1:1'\n"
        "from engine.cli import main\n"
        "main()"
    )
    env = {"HOLDFAST_PLUGIN_DIRS": str(folder)}
    ran = holdfast("run", "worker", "echo", "text=a", cwd=tmp_path, env=env, start=("-c", code))
    assert (ran.returncode, ran.stdout) == (0, '["a"]\n')
    assert "this call runs in an engine of its own" in one_line(ran.stderr)


def test_ctrl_c_is_exit_130_and_leaves_nothing(folder: Path, tmp_path: Path) -> None:
    scratch = tmp_path / "tmp"
    scratch.mkdir()
    process = subprocess.Popen(
        [sys.executable, "-m", "engine", "run", "worker", "hang", "--plugins", folder, "--no-bundled"],
        cwd=tmp_path,
        env=environment({"TMPDIR": str(scratch)}),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    worker_pid = int(process.stdout.readline())
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=20)
    assert process.returncode == 130
    assert one_line(errors) == "interrupted"
    assert not Path(f"/proc/{worker_pid}").exists()
    assert list(scratch.iterdir()) == []


# On a terminal.


def on_terminal(*words: object, cwd: Path, which: str) -> tuple[int, str, str]:
    """Run the command line with stdout or stderr on a terminal: exit code, what it showed, and the other one."""
    ours, theirs = pty.openpty()
    streams: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, which: theirs}
    process = subprocess.Popen(
        [sys.executable, "-m", "engine", *map(str, words)], cwd=cwd, env=environment(), text=True, **streams
    )
    os.close(theirs)
    shown = b""
    try:
        while chunk := os.read(ours, 65536):
            shown += chunk
    except OSError:  # EIO: the last writer is gone
        pass
    finally:
        os.close(ours)
    out, err = process.communicate(timeout=20)
    return process.returncode, shown.decode(), out or err or ""


def test_progress_is_a_bar_on_a_terminal(place: list[str], tmp_path: Path) -> None:
    code, shown, out = on_terminal(
        "run", "worker", "count", "n=4", "--out", "items", *place, cwd=tmp_path, which="stderr"
    )
    assert (code, out) == (0, "")
    assert "4/4" in shown
    assert "━" in shown
    assert "4 items in items after" in shown


def test_table_is_drawn_on_a_terminal_only(url: str, tmp_path: Path) -> None:
    code, shown, _ = on_terminal("list", "--url", url, cwd=tmp_path, which="stdout")
    assert code == 0
    assert "\x1b[" in shown
    assert "─" in shown
    plain = holdfast("list", "--url", url, cwd=tmp_path).stdout
    assert "\x1b" not in plain
    assert "─" not in plain


# A running server.


def test_list_and_health_tell_what_the_server_tells(url: str, tmp_path: Path) -> None:
    commands = [
        ["list", "--json"],
        ["list"],
        ["health", "worker"],
        ["health", "needy", "--json"],
        ["health", "wrk"],
    ]
    as_json, listed, fine, unfit, unknown = together(*([*words, "--url", url] for words in commands), cwd=tmp_path)
    assert {plugin["name"] for plugin in json.loads(as_json.stdout)} == {"worker", "needy"}
    assert listed.returncode == 0
    head = listed.stdout.splitlines()[0].split()
    assert head == ["PLUGIN", "STATE", "OK", "FAILED", "RUNNING", "PID", "REASON"]
    assert fine.returncode == 0
    assert re.search(r"^name +worker$", fine.stdout, re.MULTILINE)
    assert unfit.returncode == 1
    assert json.loads(unfit.stdout)["reason_code"] == "package_missing"
    assert unknown.returncode == 2
    assert "there is no plugin `wrk`; did you mean `worker`?" in one_line(unknown.stderr)


def test_failed_plugin_serves_again_after_a_restart(folder: Path, tmp_path: Path) -> None:
    with serving(tmp_path, "--plugins", folder, "--data", "data", plugins=2) as (url, _):
        broke = holdfast("run", "worker", "stumble", "--url", url, cwd=tmp_path)
        assert (broke.returncode, broke.stdout) == (1, "1\n")
        assert holdfast("health", "worker", "--url", url, cwd=tmp_path).returncode == 1
        restarted = holdfast("restart", "worker", "--url", url, "--json", cwd=tmp_path)
        assert restarted.returncode == 0
        health = json.loads(restarted.stdout)
        assert (health["state"], health["incarnation"]) == ("INITIALIZED", 2)
        assert holdfast("restart", "needy", "--url", url, cwd=tmp_path).returncode == 1


def test_events_are_pages_of_the_log(url: str, tmp_path: Path) -> None:
    lines = holdfast("events", "--url", url, "--json", cwd=tmp_path).stdout.splitlines()
    events = [json.loads(line) for line in lines]
    assert [event["sequence"] for event in events[:5]] == [1, 2, 3, 4, 5]
    assert events[0]["type"] == "holdfast.engine.started"
    later = holdfast("events", "--url", url, "--after", "2", "--plugin", "needy", cwd=tmp_path)
    assert later.returncode == 0
    columns = [line.split()[1:4] for line in later.stdout.splitlines()]
    assert all(int(number) > 2 and name == "needy" for number, name, _ in columns)
    assert "to=UNAVAILABLE reason_code=package_missing" in later.stdout


def test_events_of_an_unknown_plugin_are_waited_for_with_a_warning(url: str, tmp_path: Path) -> None:
    page = holdfast("events", "--url", url, "--plugin", "wrker", cwd=tmp_path)
    assert (page.returncode, page.stdout) == (0, "")
    assert "there is no plugin `wrker`; did you mean `worker`? (this is what the log has" in one_line(page.stderr)
    words = ["events", "--follow", "--plugin", "wrker", "--url", url]
    with subprocess.Popen(
        [sys.executable, "-m", "engine", *words],
        cwd=tmp_path,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as follower:
        assert follower.stderr is not None
        assert "did you mean `worker`? (waiting for it all the same)" in follower.stderr.readline()
        assert follower.poll() is None
        follower.terminate()


@pytest.mark.parametrize("flags", [[], ["--follow"], ["--json", "--follow"]])
def test_events_end_quietly_with_whoever_reads_them(flags: list[str], url: str, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "engine", "events", *flags, "--url", url]
    with subprocess.Popen(
        command, cwd=tmp_path, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as reading:
        assert reading.stdout is not None
        assert reading.stderr is not None
        reading.stdout.close()
        assert reading.stderr.read() == b""
    assert reading.returncode == 0


def test_followed_events_end_with_the_server(folder: Path, tmp_path: Path) -> None:
    with serving(tmp_path, "--plugins", folder, "--data", "data", plugins=2) as (url, _):
        follower = subprocess.Popen(
            [sys.executable, "-m", "engine", "events", "--follow", "--plugin", "worker", "--url", url],
            cwd=tmp_path,
            env=environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert follower.stdout is not None
        seen = ""
        while "to=INITIALIZED" not in seen:
            seen = follower.stdout.readline()
        holdfast("run", "worker", "echo", "text=a", "--url", url, cwd=tmp_path)
        while "plugin.call.finished  tool=echo ok=true" not in seen:
            seen = follower.stdout.readline()
    _, errors = follower.communicate(timeout=20)
    assert follower.returncode == 3
    assert re.search(r"no server answers|go on with --after \d+", one_line(errors))


# Check and audit.


def test_check_is_exit_0_only_if_every_plugin_is_fit(folder: Path, tmp_path: Path) -> None:
    fit = holdfast("check", folder / "worker", cwd=tmp_path)
    assert (fit.returncode, fit.stderr) == (0, "")
    assert fit.stdout.splitlines()[1].split() == ["worker", "INITIALIZED"]
    unfit = holdfast("check", folder, "--json", cwd=tmp_path)
    assert unfit.returncode == 1
    states = {plugin["name"]: plugin["state"] for plugin in json.loads(unfit.stdout)}
    assert states == {"worker": "INITIALIZED", "needy": "UNAVAILABLE"}
    assert "1 of 2 not fit: needy" in one_line(unfit.stderr)
    (tmp_path / "empty").mkdir()
    empty = holdfast("check", "empty", cwd=tmp_path)
    assert empty.returncode == 2
    assert "no plugin in" in one_line(empty.stderr)
    missing = holdfast("check", "missing", cwd=tmp_path)
    assert missing.returncode == 2
    assert "missing does not exist" in one_line(missing.stderr)
    assert "Traceback" not in missing.stderr


def test_check_shows_what_a_plugin_is_warned_of(tmp_path: Path) -> None:
    write_plugin(tmp_path / "plugins", "picky", PLUGIN, {"echo": 'rejects = ["ValueErorr"]'})
    checked = holdfast("check", "plugins", cwd=tmp_path)
    assert checked.returncode == 0
    assert "picky: [tools.echo] rejects `ValueErorr`" in one_line(checked.stderr)
    with serving(tmp_path, "--plugins", "plugins", "--data", "data", plugins=1):
        pass
    assert "picky: [tools.echo] rejects `ValueErorr`" in (tmp_path / "serve.err").read_text()


def test_audit_verify_finds_the_altered_line(tmp_path: Path) -> None:
    with serving(tmp_path, "--data", "data"):
        pass
    audit = tmp_path / "data" / "audit.jsonl"
    sound = holdfast("audit", "verify", audit, cwd=tmp_path)
    assert sound.returncode == 0
    assert ": sound, 2 lines, up to event 2" in sound.stdout
    first, *rest = audit.read_bytes().splitlines(keepends=True)
    audit.write_bytes(b"".join([first.replace(b"engine.started", b"engine.stopped"), *rest]))
    altered = holdfast("audit", "verify", audit, cwd=tmp_path)
    assert altered.returncode == 1
    assert "line 1 is altered" in one_line(altered.stderr)
    report = json.loads(holdfast("audit", "verify", audit, "--json", cwd=tmp_path).stdout)
    assert (report["ok"], report["bad_line"], report["trouble"]) == (False, 1, "altered")
