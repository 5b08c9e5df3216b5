"""Several calls on their way to one worker: order, what each is told when the worker breaks, whose arena it is."""

from __future__ import annotations

import asyncio
import json
import math
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import msgspec
import pytest
from msgspec import msgpack
from support import hosting, next_event, until, write_honest, write_plugin
from test_wire_worker import bare_worker, start_of

from engine.errors import Cause, ReasonCode
from engine.outcome import Broke, Refused
from engine.sandbox import arena, calls, frames, values, wire
from engine.sandbox.calls import Calls, Sent
from engine.sandbox.channel import Channel, ProtocolBreach
from engine.sandbox.replies import Broken, Rejected, Value
from events.envelope import CallFinished, CallStarted

MIB = 1 << 20


class Wire:
    """A channel to nobody."""

    def __init__(self) -> None:
        self.sent: list[wire.Call | wire.Taken] = []

    def write(self, frame: bytes) -> None:
        """At once."""
        self.sent.append(wire.from_engine.decode(frame[wire.HEADER.size :]))

    write_soon = write

    def send(self, message: wire.Message) -> None:
        """A message."""
        self.write(wire.frame(message))


class Owner:
    """A worker that is told."""

    def __init__(self) -> None:
        self.overdue_after: asyncio.Future[float] = asyncio.get_running_loop().create_future()
        self.overdue = self.overdue_after.set_result

    def broke(self, _sent: Sent, failed: wire.Failed) -> Cause:
        """The plugin leaves service."""
        return Cause(ReasonCode.TOOL_EXCEPTION, failed.message)


class Call:
    """A call that notes what becomes of it."""

    request_id, announce, holds_up = "", False, False

    def __init__(self, arguments: dict[str, Any] | None = None, timeout_s: float = 60.0) -> None:
        self.tool = "work"
        self.arguments: Any = arguments or {}
        self.timeout_s = timeout_s
        self.told: list[Any] = []

    def begins(self) -> None:
        """Its turn."""
        self.told.append("begins")

    def replied(self, reply: Any) -> None:
        """It is over."""
        self.told.append(reply)

    def turned_away(self, cause: Cause) -> None:
        """It had no turn."""
        self.told.append(cause)

    def began(self) -> None:
        """Its arguments were accepted."""
        self.told.append("began")

    def item(self, value: Any, *_: Any) -> None:
        """An item."""
        self.told.append(value)

    def take_held_s(self) -> float:
        """Nobody held it up."""
        return 0.0


class Rig:
    """Calls between a test and no worker."""

    def __init__(self, arenas: list[int]) -> None:
        self.wire, self.owner = Wire(), Owner()
        self.arena_in, self.arena_out = (arena.Arena(fd, writable=True) for fd in arenas)
        self.calls = Calls(self.owner, cast(Channel, self.wire), self.arena_in, self.arena_out)

    def result(self, call_id: int, value: Any = None) -> None:
        """The worker answers."""
        self.calls.on_message(wire.Result(call_id, msgspec.Raw(values.Encoder(self.arena_out).encode(value))))

    def one_over(self) -> None:
        """After a short call, others may be sent ahead."""
        self.calls.begin(cast(Any, Call()))
        self.result(1)
        self.wire.sent.clear()


@pytest.fixture
async def rig(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Every call is a short one."""
    monkeypatch.setattr(calls, "_SHORT_S", math.inf)
    fds = [arena.create(MIB), arena.create(MIB)]
    rig = Rig(fds)
    yield rig
    rig.calls.broken(Broken(Cause(ReasonCode.RESTARTED, "")))
    for shared in (rig.arena_in, rig.arena_out):
        assert shared.release()
        os.close(shared.fd)


def ids(rig: Rig) -> Iterator[int]:
    """Of the calls that were sent."""
    return (message.call_id for message in rig.wire.sent if isinstance(message, wire.Call))


async def test_a_call_that_was_sent_ahead_begins_when_the_one_before_is_over(rig: Rig) -> None:
    rig.one_over()
    first, second = Call(), Call()
    rig.calls.begin(cast(Any, first))
    assert rig.calls.send_ahead(cast(Any, second))
    assert list(ids(rig)) == [2, 3]
    assert (first.told, second.told, rig.calls.ahead) == (["begins"], [], 1)
    rig.result(2, "two")
    assert (first.told, second.told, rig.calls.ahead) == (["begins", Value("two")], ["begins"], 0)
    rig.result(3, "three")
    assert second.told == ["begins", Value("three")]
    assert rig.calls.free


async def test_nothing_is_sent_ahead_before_a_short_call_nor_more_than_a_few(rig: Rig) -> None:
    rig.calls.begin(cast(Any, Call()))
    takes = [rig.calls.takes_ahead]  # nobody knows yet how long they take
    rig.result(1)
    takes.append(rig.calls.takes_ahead)  # there is nothing to be ahead of
    rig.calls.begin(cast(Any, Call()))
    for _ in range(calls._SENT):
        takes.append(rig.calls.takes_ahead)
        rig.calls.send_ahead(cast(Any, Call()))
    assert takes == [False, False, *[True] * (calls._SENT - 1), False]


async def test_a_call_after_a_long_one_waits_for_its_turn(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calls, "_SHORT_S", 0.0)
    rig.one_over()
    rig.calls.begin(cast(Any, Call()))
    assert not rig.calls.takes_ahead


async def test_a_call_behind_one_that_takes_long_waits_for_its_turn(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(calls, "_SHORT_S", 1e6)
    rig.one_over()
    rig.calls.begin(cast(Any, Call()))
    before = rig.calls.takes_ahead
    running = rig.calls.running
    assert running is not None
    running.since_s -= 1e6
    assert (before, rig.calls.takes_ahead) == (True, False)


@pytest.mark.parametrize(
    "arguments",
    [{"data": bytes(arena.THRESHOLD_BYTES)}, {"list": [0] * arena.THRESHOLD_BYTES}, {"what": object()}],
    ids=["in the arena", "encoded into the arena", "without an encoding"],
)
async def test_a_call_that_needs_the_arena_or_has_no_encoding_waits_for_its_turn(
    rig: Rig, arguments: dict[str, Any]
) -> None:
    rig.one_over()
    rig.calls.begin(cast(Any, Call()))
    assert not rig.calls.send_ahead(cast(Any, Call(arguments)))
    large = Call()
    large.arguments = wire.Encoded("json", b" " * MIB)
    assert not rig.calls.send_ahead(cast(Any, large)), "its time would be counted from the wrong moment"
    announced = Call()
    announced.announce = True
    assert not rig.calls.send_ahead(cast(Any, announced))
    assert list(ids(rig)) == [2]


@pytest.mark.contract(6)
async def test_the_time_of_a_call_that_was_sent_ahead_begins_with_its_turn(rig: Rig) -> None:
    rig.one_over()
    rig.calls.begin(cast(Any, Call(timeout_s=60)))
    assert rig.calls.send_ahead(cast(Any, Call(timeout_s=1e-6)))
    for _ in range(10):
        await asyncio.sleep(0)
    assert not rig.owner.overdue_after.done()
    rig.result(2)
    async with asyncio.timeout(10):
        assert await rig.owner.overdue_after == 1e-6


async def test_a_call_that_is_due_later_is_not_ended_with_the_timer_of_the_one_before(rig: Rig) -> None:
    rig.calls.begin(cast(Any, Call(timeout_s=0.001)))
    rig.result(1)
    rig.calls.begin(cast(Any, Call(timeout_s=0.05)))
    async with asyncio.timeout(10):
        assert await rig.owner.overdue_after == 0.05


async def test_a_deadline_that_comes_when_nothing_runs_is_nobodys(rig: Rig) -> None:
    rig.calls.begin(cast(Any, Call(timeout_s=0.001)))
    rig.result(1)
    assert rig.calls._timer is not None
    await until(lambda: rig.calls._timer is None)
    assert not rig.owner.overdue_after.done()
    rig.calls.begin(cast(Any, Call(timeout_s=0.001)))
    async with asyncio.timeout(10):
        assert await rig.owner.overdue_after == 0.001


async def test_a_call_that_breaks_the_plugin_turns_those_behind_it_away(rig: Rig) -> None:
    rig.one_over()
    first, behind = Call(), [Call(), Call()]
    rig.calls.begin(cast(Any, first))
    assert all(rig.calls.send_ahead(cast(Any, call)) for call in behind)
    rig.calls.on_message(wire.Failed(2, "exception", "ValueError", "no"))
    cause = Cause(ReasonCode.TOOL_EXCEPTION, "no")
    assert first.told == ["begins", Broken(cause, "ValueError")]
    assert [call.told for call in behind] == [[cause], [cause]]
    with pytest.raises(ProtocolBreach, match="call 3, which does not run"):
        rig.result(3)


async def test_a_call_that_the_worker_had_begun_is_told_so_though_nothing_was_heard_of_it(rig: Rig) -> None:
    rig.one_over()
    sent = [Call(), Call(), Call()]
    rig.calls.begin(cast(Any, sent[0]))
    assert all(rig.calls.send_ahead(cast(Any, call)) for call in sent[1:])
    rig.arena_out.note = 3
    rig.calls.ended()
    broken = Broken(Cause(ReasonCode.TOOL_TIMEOUT, "late"))
    rig.calls.broken(broken)
    assert [call.told for call in sent] == [["begins", broken], ["begins", broken], [broken.cause]]


async def test_nothing_is_sent_behind_a_call_whose_consumer_may_hold_it_up(rig: Rig) -> None:
    rig.one_over()
    rig.calls.begin(cast(Any, Call()))
    stream = Call()
    stream.holds_up = True
    assert rig.calls.send_ahead(cast(Any, stream))
    assert not rig.calls.takes_ahead


async def test_an_answer_that_came_in_time_counts_though_it_is_read_late(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(calls, "_READ_S", 60)
    call = Call(timeout_s=0.001)
    rig.calls.begin(cast(Any, call))
    running = rig.calls.running
    assert running is not None
    await until(lambda: running.late)
    rig.result(1, "in time")
    assert call.told == ["begins", Value("in time")]


@pytest.mark.parametrize(
    ("said", "kind"),
    [
        (b"\xdd" + (300_000).to_bytes(4, "big") + b"\x90" * 300_000, "too_large"),
        (b"\x81\xc0\xc0", "invalid"),
    ],
    ids=["too many values", "a key that is null"],
)
async def test_an_item_or_a_result_that_no_caller_could_be_shown_breaks_the_plugin(
    rig: Rig, said: bytes, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    kinds: list[str] = []

    def broke(_sent: Sent, failed: wire.Failed) -> Cause:
        kinds.append(failed.kind)
        return Cause(ReasonCode.RESULT_INVALID, failed.message)

    monkeypatch.setattr(rig.owner, "broke", broke)
    messages: list[wire.Item | wire.Result] = [wire.Item(1, msgspec.Raw(said)), wire.Result(2, msgspec.Raw(said))]
    for number, message in enumerate(messages, 1):
        call = Call()
        rig.calls.begin(cast(Any, call))
        rig.calls.on_message(message)
        assert kinds == [kind] * number
        assert isinstance(call.told[-1], Broken)


CLOSES = """
import os
from pathlib import Path
class Plugin:
    def __init__(self, context): ...
    def validate(self): ...
    def close(self) -> int:
        closed = 0
        for fd in Path("/proc/self/fd").iterdir():
            if fd.is_file() and "memfd" in os.readlink(fd):
                os.close(int(fd.name))
                closed += 1
        return closed
"""


async def test_a_plugin_that_has_closed_the_arenas_goes_on_with_short_calls(plugins: Path, data_dir: Path) -> None:
    write_plugin(plugins, "closes", CLOSES, ["close"])
    async with hosting(plugins, data_dir) as engine:
        told = [(await engine.run("closes", "close")).value for _ in range(3)]
        assert told == [2, 0, 0]
        assert engine.health("closes").state == "RUNNING"


async def test_a_worker_is_woken_before_what_takes_long_to_copy(rig: Rig) -> None:
    for size in (MIB - 1, MIB):
        rig.calls.begin(cast(Any, Call({"data": bytes(size)})))
        rig.result(rig.calls._last_id)
    assert [type(message) for message in rig.wire.sent] == [wire.Call, wire.Taken, wire.Call]


async def test_a_worker_is_woken_once_for_a_call_of_many_parts(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calls, "_LARGE_BYTES", MIB // 4)
    rig.calls.begin(cast(Any, Call({"parts": [bytes(MIB // 4)] * 3})))
    assert [type(message) for message in rig.wire.sent] == [wire.Taken, wire.Call]


async def test_what_a_refused_call_put_into_the_arena_is_nobodys(rig: Rig) -> None:
    refused = Call({"data": bytes(2 * MIB)})
    rig.calls.begin(cast(Any, refused))
    await asyncio.sleep(0)
    begins, reply = refused.told
    assert begins == "begins"
    assert isinstance(reply, Rejected)
    assert reply.reason_code is ReasonCode.INPUT_TOO_LARGE
    assert rig.calls.free


async def test_the_worker_is_told_that_the_arena_is_free_only_where_a_call_may_wait_for_it(rig: Rig) -> None:
    picture = bytes(arena.THRESHOLD_BYTES)
    rig.one_over()
    rig.calls.begin(cast(Any, Call()))
    rig.result(2, picture)
    rig.calls.begin(cast(Any, Call()))
    assert rig.calls.send_ahead(cast(Any, Call()))
    told = [message.taken for message in rig.wire.sent if isinstance(message, wire.Call)]
    assert told == [1, 2, 2], "the third was sent while the second ran"
    rig.arena_out.reset()
    rig.result(3, picture)
    assert rig.wire.sent[-1] == wire.Taken(3)
    rig.arena_out.reset()
    rig.result(4, picture)
    assert rig.wire.sent[-1] == wire.Taken(3), "the next call will tell"


# The worker's side.

PICTURES = """
from pathlib import Path
class Plugin:
    def __init__(self, context): self.scratch = context.scratch
    def validate(self): pass
    def picture(self, n: int) -> bytes:
        (self.scratch / f"ran-{n}").touch()
        return bytes([n]) * 100_000
    def fails(self, n: int): raise RuntimeError(n)
    def writes(self, n: int): (self.scratch / "wrote").touch()
"""


def call_of(number: int, tool: str = "picture", taken: int = 0) -> wire.Call:
    return wire.Call(number, tool, "json", json.dumps({"n": number}).encode(), taken=taken)


async def test_a_worker_does_not_write_over_a_result_that_was_not_taken(plugins: Path, tmp_path: Path) -> None:
    folder = write_plugin(plugins, "pictures", PICTURES, ["picture"])
    async with bare_worker(tmp_path / "scratch") as worker:
        await worker.say(start_of(folder, worker, "picture"), wire.Go())
        await worker.hear(wire.Ready)
        out = arena.Arena(worker.arena_out, writable=False)
        assert wire.noted_stage(out.note) == "tools", "it has begun no call"
        for number in (1, 2, 3):
            await worker.say(call_of(number))
        for number in (1, 2, 3):
            assert (await worker.hear(wire.Result)).call_id == number
            if number < 3:
                await until(lambda: (worker.scratch / f"ran-{number + 1}").exists() and worker.sleeps)  # noqa: B023
            with pytest.raises(BlockingIOError):
                worker.channel.recv(1)  # it waits for the word
            assert out.copy(0, 100_000) == bytes([number]) * 100_000
            await worker.say(wire.Taken(number))
        assert out.note == 3
        await worker.say(call_of(4, taken=3))
        assert (await worker.hear(wire.Result)).call_id == 4
        await worker.say(call_of(5, taken=4))
        assert (await worker.hear(wire.Result)).call_id == 5, "the call itself says that the last one was taken"
        await worker.say(call_of(6, taken=4))
        worker.channel.close()
        assert await worker.exit_code() == wire.EXIT_CHANNEL_LOST
        assert out.release()


async def test_a_worker_that_was_called_a_moment_ago_sleeps_until_it_is_called_again(
    plugins: Path, tmp_path: Path
) -> None:
    folder = write_plugin(plugins, "pictures", PICTURES, ["writes"])
    async with bare_worker(tmp_path / "scratch") as worker:
        await worker.say(start_of(folder, worker, "writes"), wire.Go())
        await worker.hear(wire.Ready)
        for number in range(1, 30):
            await worker.say(call_of(number, "writes"))
            assert (await worker.hear(wire.Result)).call_id == number
        used_ns = await cpu_ns_at_rest(worker.pid)
        assert used_ns == await cpu_ns_at_rest(worker.pid)
        await worker.say(call_of(30, "writes"))
        assert (await worker.hear(wire.Result)).call_id == 30


async def cpu_ns_at_rest(pid: int) -> int:
    """What a process has used, in nanoseconds, once that no longer grows."""
    seen: list[int] = []

    def rests() -> bool:
        seen.append(int(Path(f"/proc/{pid}/schedstat").read_text().split()[0]))
        return len(seen) > 1 and seen[-1] == seen[-2]

    await until(rests)
    return seen[-1]


async def test_a_worker_runs_nothing_after_a_call_that_broke_the_plugin(plugins: Path, tmp_path: Path) -> None:
    folder = write_plugin(plugins, "fails", PICTURES, ["fails", "writes"])
    async with bare_worker(tmp_path / "scratch") as worker:
        await worker.say(start_of(folder, worker, "fails", "writes"), wire.Go())
        await worker.hear(wire.Ready)
        await worker.say(call_of(1, "fails"))
        await worker.say(call_of(2, "writes"))
        assert (await worker.hear(wire.Failed)).call_id == 1
        worker.channel.shutdown(1)
        assert await worker.exit_code() == 0
        assert not (worker.scratch / "wrote").exists()


LATE = """
import atexit, os
from collections.abc import Iterator
class Plugin:
    def __init__(self, context): self.log = context.log
    def validate(self): pass
    def keeps(self, progress) -> None:
        self.progress = progress
    def late(self) -> None:
        self.progress(1, 2)
    def forks(self) -> int:
        child = os.fork()
        if child == 0:
            self.log.warning("said by a child")
            self.progress(2, 2)
            os._exit(7)
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    def items(self) -> Iterator[int]:
        child = os.fork()
        yield 1
        if child:
            yield os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    def cleans_up(self, path: str) -> None:
        def clean():
            self.log.info("cleaning up")
            open(path, "x").close()
        atexit.register(clean)
"""


@pytest.mark.contract(2)
async def test_what_a_plugin_says_too_late_or_from_a_child_harms_nobody(
    plugins: Path, data_dir: Path, tmp_path: Path
) -> None:
    write_plugin(plugins, "late", LATE, ["keeps", "late", "forks", "items", "cleans_up"])
    async with hosting(plugins, data_dir) as engine:
        seen: list[Any] = []
        for tool in ("keeps", "late", "late"):
            outcome = await engine.run("late", tool, on_progress=lambda *step: seen.append(step))
            assert outcome.ok, outcome
        assert (await engine.run("late", "forks")).value == 7
        assert (await engine.run("late", "items")).value == [1, wire.EXIT_CHANNEL_LOST]
        said = await next_event(engine, "plugin.log", "late")
        assert said.data.message == "said by a child"  # type: ignore[union-attr]
        cleaned = tmp_path / "cleaned"
        assert (await engine.run("late", "cleans_up", {"path": str(cleaned)})).ok
        assert (await engine.restart("late")).state == "INITIALIZED"
        assert cleaned.exists(), "a line that nobody hears any more ends nothing"
        assert not seen


# With an engine.

SHORT = """
import os, time
class Plugin:
    def __init__(self, context): pass
    def validate(self): pass
    def echo(self, n: int, data: bytes = b"", size: int = 10, once: str = ".") -> list:
        while not os.path.exists(once):
            time.sleep(0.001)
        if n < 0:
            os._exit(3)
        return [n, len(data), bytes([n % 256]) * size]
"""


async def test_every_one_of_many_calls_gets_its_own_answer(
    plugins: Path, data_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(calls, "_SHORT_S", math.inf)
    write_plugin(plugins, "short", SHORT, ["echo"], limits="queue = 1000")
    async with hosting(plugins, data_dir) as engine:
        assert (await engine.run("short", "echo", {"n": 0})).ok
        pool = engine.registry.get("short").pool
        assert pool is not None

        async def call(n: int) -> None:
            data, size = bytes(70_000 if n % 7 == 0 else n), 100_000 if n % 3 == 0 else 10
            outcome = await engine.run("short", "echo", {"n": n, "data": data, "size": size})
            assert outcome.value == [n, len(data), bytes([n % 256]) * size]

        callers = asyncio.gather(*(call(n) for n in range(300)))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert pool.waiting > 0
        await callers
        assert pool.waiting == 0


@pytest.mark.contract(2, 9)
async def test_a_crash_belongs_to_the_call_that_ran_and_those_behind_it_never_began(
    plugins: Path, data_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(calls, "_SHORT_S", math.inf)
    write_plugin(plugins, "short", SHORT, ["echo"])
    write_honest(plugins)
    async with hosting(plugins, data_dir) as engine:
        assert (await engine.run("short", "echo", {"n": 1})).ok
        numbers = [1, 2, -1, 4, 5, 6, 7, 8, 9, 10, 11, 12]
        outcomes = await asyncio.gather(
            *(engine.run("short", "echo", {"n": n}, request_id=f"call{n}-{i}") for i, n in enumerate(numbers))
        )
        assert [outcome.ok for outcome in outcomes[:2]] == [True, True], "what was answered stays answered"
        assert isinstance(outcomes[2], Broke)
        assert outcomes[-1].reason_code == "worker_exit"
        for outcome in outcomes[3:]:
            assert isinstance(outcome, Refused)
            assert outcome.reason_code == "worker_exit"
            assert "`short` is FAILED" in outcome.error
        begun, finished = [], []
        await next_event(engine, "worker.exited", "short")
        last = engine.bus.last
        async for event in engine.events():
            if isinstance(event.data, CallStarted):
                begun.append(event.data.request_id)
            elif isinstance(event.data, CallFinished):
                finished.append(event.data.request_id)
            if event.sequence >= last:
                break
        assert begun[1:] == finished[1:] == ["call1-0", "call2-1", "call-1-2"]
        assert engine.health("short").in_flight == 0
        assert (await engine.run("honest", "echo")).ok


@pytest.mark.contract(2)
async def test_a_call_that_comes_after_the_death_of_the_worker_is_not_blamed_for_it(
    plugins: Path, data_dir: Path
) -> None:
    write_plugin(plugins, "short", SHORT, ["echo"])
    async with hosting(plugins, data_dir) as engine:
        assert (await engine.run("short", "echo", {"n": 1})).ok
        pool = engine.registry.get("short").pool
        assert pool is not None
        (worker,) = pool.workers
        ended: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        worker._spawned = worker._spawned._replace(status=ended)
        os.kill(worker.pid, signal.SIGKILL)
        await until(lambda: worker.gone)
        calling = asyncio.create_task(engine.run("short", "echo", {"n": 2}))
        await asyncio.sleep(0)
        assert pool.waiting == 1
        ended.set_result(signal.SIGKILL)
        outcome = await calling
        assert isinstance(outcome, Refused)
        assert outcome.reason_code == "killed_externally"


async def test_calls_that_were_sent_ahead_count_as_waiting(
    plugins: Path, data_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(calls, "_SHORT_S", math.inf)
    write_plugin(plugins, "short", SHORT, ["echo"], limits="queue = 2")
    async with hosting(plugins, data_dir) as engine:
        assert (await engine.run("short", "echo", {"n": 1})).ok
        outcomes = await asyncio.gather(*(engine.run("short", "echo", {"n": n}) for n in range(5)))
        assert [outcome.ok for outcome in outcomes] == [True] * 3 + [False] * 2
        assert {outcome.reason_code for outcome in outcomes[3:]} == {"queue_full"}


@pytest.mark.contract(9)
async def test_what_a_worker_said_before_it_died_is_heard_before_it_is_judged(
    plugins: Path, data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(calls, "_SHORT_S", math.inf)
    monkeypatch.setattr(frames, "_BUFFER_BYTES", 1024)
    write_plugin(plugins, "short", SHORT, ["echo"])
    async with hosting(plugins, data_dir) as engine:
        assert (await engine.run("short", "echo", {"n": 1})).ok
        pool = engine.registry.get("short").pool
        assert pool is not None
        (worker,) = pool.workers
        # Known at once how it ended, and more was said than is read at a time.
        ended: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        ended.set_result(3 << 8)
        worker._spawned = worker._spawned._replace(status=ended)
        once = tmp_path / "sent"
        arguments = ({"n": n, "size": 60_000, "once": str(once)} for n in (1, 2, 3, -1))
        callers = [asyncio.create_task(engine.run("short", "echo", given)) for given in arguments]
        for _ in range(3):
            await asyncio.sleep(0)
        assert pool.waiting == 3, "all are sent"
        once.touch()
        while is_alive(worker.pid):  # and nothing is read meanwhile
            pass
        outcomes = [await caller for caller in callers]
        assert [outcome.ok for outcome in outcomes] == [True, True, True, False]
        assert outcomes[-1].reason_code == "worker_exit"


def is_alive(pid: int) -> bool:
    """Whether it runs, rather than waits to be collected."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_messages_to_a_worker_are_calls_and_what_was_taken() -> None:
    for message in (wire.Call(1, "work", "json", b"{}", taken=7), wire.Taken(7)):
        assert wire.from_engine.decode(msgpack.encode(message)) == message
