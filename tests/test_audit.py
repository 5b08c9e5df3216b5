"""The audit file: complete, chained, without secrets, and checked."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import subprocess
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import msgspec
import pytest

import events.audit
from events.audit import AuditLog, verify
from events.audit_lines import Chain
from events.bus import EventBus
from events.envelope import (
    DATA_TYPES,
    CallFinished,
    CallStarted,
    EngineStopping,
    EventData,
    Gap,
    PluginFacts,
    PluginLog,
    Restarted,
    Transition,
)
from events.log import EventLog
from events.projections import HealthProjection
from events.redact import has_secret_name, redactor

LONG_S = 20.0
TOKEN = 'tok-4f9a"quoted\\and more'


class Rig:
    """A bus, a log and an audit, as the engine puts them together."""

    def __init__(self, folder: Path, *, retain_events: int | None = None) -> None:
        self.path = folder / "audit.jsonl"
        self.log = EventLog.open(folder / "events.db", source="test", retain_events=retain_events)
        self.bus = EventBus(HealthProjection(self.log.load()[0]), last=self.log.last)
        self.bus.subscribe(self.log)
        self.audit = AuditLog.open(self.path, redact=[TOKEN, ""])
        self.audit.attach(self.log)

    def publish(self, *data: EventData, plugin: str | None = "ocr") -> None:
        for item in data:
            self.bus.publish(item, plugin)
        assert self.log.flush(LONG_S)

    def calls(self, count: int) -> None:
        self.publish(*(CallStarted("read", f"r{number}") for number in range(count)))

    def lines(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.path.read_text().splitlines()]

    def close(self) -> None:
        self.log.close()
        self.audit.close()


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[Rig]:
    made = Rig(tmp_path)
    yield made
    made.close()


def working(audit: AuditLog) -> bool:
    return audit.state.ok


def numbers(lines: list[dict[str, Any]]) -> list[int]:
    return [line["sequence"] for line in lines if "sequence" in line]


# What a line says


def test_each_durable_event_is_one_line_that_a_person_and_jq_can_read(rig: Rig) -> None:
    rig.publish(Transition(None, "LOADED", None, 1, plugin=PluginFacts("1.0")))
    rig.publish(EngineStopping(), plugin=None)
    first, second = rig.lines()
    assert list(first) == ["sequence", "time", "level", "event", "plugin", "data", "prev"]
    assert first["sequence"] == 1
    assert first["event"] == "plugin.transition"
    assert first["plugin"] == "ocr"
    assert first["time"].endswith("Z")
    assert first["data"]["to"] == "LOADED"
    assert first["data"]["from"] is None
    assert first["data"]["plugin"]["version"] == "1.0"
    assert "plugin" not in second


def test_prev_is_the_sha256_of_all_bytes_of_the_line_before_with_its_newline(rig: Rig) -> None:
    rig.calls(5)
    raw = rig.path.read_bytes().splitlines(keepends=True)
    assert json.loads(raw[0])["prev"] == "0" * 64
    for before, line in pairwise(raw):
        assert json.loads(line)["prev"] == hashlib.sha256(before).hexdigest()


@pytest.mark.parametrize(
    ("data", "level"),
    [
        (Transition("LOADED", "INITIALIZED", "initialize", 1), "info"),
        (Transition("RUNNING", "FAILED", "fail", 1, "tool_timeout", "why"), "error"),
        (Transition("LOADED", "UNAVAILABLE", "become_unavailable", 1, "gpu_absent", "why"), "warning"),
        (CallFinished("t", "r", True, 1.0), "info"),
        (CallFinished("t", "r", False, 1.0, "ValueError", "rejected"), "info"),
        (CallFinished("t", "r", False, 1.0, "SIGSEGV", "worker_signal", broke=True), "error"),
        (Gap(1, 1, "disk full"), "error"),
    ],
)
def test_the_level_follows_from_what_happened(rig: Rig, data: EventData, level: str) -> None:
    rig.publish(data)
    assert [line["level"] for line in rig.lines()] == [level]


def test_no_secret_appears_in_any_string(rig: Rig) -> None:
    rig.publish(
        PluginLog("output", "info", f"got {TOKEN} and {TOKEN}"),
        PluginLog("output", "info", "sent Authorization: Bearer abc.DEF-123"),
        Transition(None, "LOADED", None, 1, plugin=PluginFacts(description=TOKEN, tools=("a", f"b{TOKEN}"))),
        plugin=f"plugin-{TOKEN}",
    )
    text = rig.path.read_text()
    assert "tok-4f9a" not in text
    assert "abc.DEF-123" not in text
    log, header, entry = rig.lines()
    assert log["data"]["message"] == "got [redacted] and [redacted]"
    assert header["data"]["message"] == "sent Authorization: Bearer [redacted]"
    assert entry["data"]["plugin"]["tools"] == ["a", "b[redacted]"]
    assert entry["plugin"] == "plugin-[redacted]"
    assert verify(rig.path).ok


@pytest.mark.parametrize(
    "name", ["token", "Authorization", "db_password", "x-api-key", "API_KEY", "cookie", "client.secret"]
)
def test_fields_with_the_name_of_a_secret_are_redacted_whatever_they_hold(name: str) -> None:
    process = redactor([])
    fields = process(
        None, "info", {"event": "e", "data": {name: "x", "deep": [{name: {"y": 1}}, {name: 1234}], "n": 1}}
    )
    assert fields["data"] == {name: "[redacted]", "deep": [{name: "[redacted]"}] * 2, "n": 1}


@pytest.mark.parametrize("name", ["tokens_used", "author", "passwords", "keyboard", "secretary"])
def test_fields_that_only_sound_like_secrets_are_kept(name: str) -> None:
    assert redactor([])(None, "info", {"data": {name: "x"}}) == {"data": {name: "x"}}


def test_a_secret_as_json_writes_it_is_found_and_one_in_the_chain_does_not_break_it(tmp_path: Path) -> None:
    """Lines are searched as JSON, and only what looks suspicious is taken apart."""
    for secret in ('a"b\\c', "größe\n", "0"):
        folder = tmp_path / f"{len(secret)}-{ord(secret[0])}"
        log = EventLog.open(folder / "events.db", source="test")
        audit = AuditLog.open(folder / "audit.jsonl", redact=[secret])
        audit.attach(log)
        bus = EventBus(HealthProjection())
        bus.subscribe(log)
        for _ in range(3):
            bus.publish(PluginLog("output", "info", f"<{secret}>"), "ocr")
        log.close()
        audit.close()
        lines = [json.loads(line) for line in audit.path.read_text().splitlines()]
        assert [line["data"]["message"] for line in lines] == ["<[redacted]>"] * 3
        assert verify(audit.path, last=3).ok


def test_no_field_of_an_event_has_the_name_of_a_secret() -> None:
    """Field names are ours, so the audit does not look at them in every line."""
    for kind in (*DATA_TYPES.values(), PluginFacts):
        assert not [
            field.encode_name for field in msgspec.structs.fields(kind) if has_secret_name(field.encode_name)
        ]


# Surviving


def test_a_reopened_audit_goes_on_with_the_chain(tmp_path: Path) -> None:
    for _ in range(3):
        rig = Rig(tmp_path)
        rig.calls(4)
        rig.close()
    assert verify(rig.path, last=12) == events.audit.AuditReport(True, 12, 12)


def test_what_is_durable_and_not_audited_is_caught_up_at_the_next_start(tmp_path: Path) -> None:
    rig = Rig(tmp_path)
    rig.calls(10)
    rig.close()
    whole = rig.path.read_bytes()
    rig.path.write_bytes(b"".join(whole.splitlines(keepends=True)[:3]))
    rig = Rig(tmp_path)
    assert rig.path.read_bytes() == whole
    rig.close()


@pytest.mark.parametrize("keep", [0, 3, 9], ids=["first line", "middle", "last line"])
@pytest.mark.parametrize(
    "tear", [b'{"sequence":4,"ti', b"\x00" * 300, b'{"a":1}\n{"torn'], ids=["half", "zeros", "two"]
)
def test_a_torn_end_is_kept_aside_noted_in_the_chain_and_written_anew(
    tmp_path: Path, keep: int, tear: bytes
) -> None:
    rig = Rig(tmp_path)
    rig.calls(10)
    rig.close()
    whole = rig.path.read_bytes().splitlines(keepends=True)
    rig.path.write_bytes(b"".join(whole[:keep]) + tear)
    report = verify(rig.path)
    assert not report.ok
    assert report.bad_line == keep + 1
    rig = Rig(tmp_path)
    [aside] = tmp_path.glob("audit.jsonl.torn-*")
    assert aside.read_bytes() == tear
    lines = rig.lines()
    assert (lines[keep]["event"], lines[keep]["moved_to"]) == ("audit.torn_line_moved", aside.name)
    assert numbers(lines) == list(range(1, 11))
    assert verify(rig.path, last=10).ok
    rig.close()


def test_a_torn_line_longer_than_the_part_read_first_is_moved_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rig = Rig(tmp_path)
    rig.calls(10)
    rig.close()
    with rig.path.open("ab") as file:
        file.write(b"x" * 5000)
    monkeypatch.setattr(events.audit, "TAIL_BYTES", 16)
    rig = Rig(tmp_path)
    rig.close()
    assert [found.stat().st_size for found in tmp_path.glob("audit.jsonl.torn-*")] == [5000]
    assert verify(rig.path, last=10).ok


def test_a_deleted_file_is_noticed_and_written_anew_from_the_log(rig: Rig) -> None:
    rig.calls(5)
    rig.path.unlink()
    rig.calls(5)
    assert numbers(rig.lines()) == list(range(1, 11))
    assert verify(rig.path, last=10).ok
    assert working(rig.audit)
    assert rig.audit.fault is not None
    assert rig.audit.fault.count == 1
    assert "was deleted" in rig.audit.fault.last


def test_a_rotated_file_is_continued_by_a_new_one_that_names_its_end(rig: Rig) -> None:
    rig.calls(5)
    old = rig.path.rename(rig.path.with_suffix(".1"))
    rig.calls(5)
    continued, *rest = rig.lines()
    assert continued["event"] == "audit.continued"
    assert continued["continues"] == hashlib.sha256(old.read_bytes().splitlines(keepends=True)[-1]).hexdigest()
    assert numbers(rest) == [6, 7, 8, 9, 10]
    assert verify(old, last=5).ok
    assert verify(rig.path, last=10).ok


def test_a_log_that_was_replaced_is_noted_and_audited_from_its_first_event(tmp_path: Path) -> None:
    rig = Rig(tmp_path)
    rig.calls(5)
    rig.close()
    EventLog.repair(rig.log.path)
    rig = Rig(tmp_path)
    rig.calls(2)
    rig.close()
    lines = rig.lines()
    assert (lines[5]["event"], lines[5]["had"], lines[5]["after"]) == ("audit.log_replaced", 5, 0)
    assert numbers(lines) == [1, 2, 3, 4, 5, 1, 2]
    assert verify(rig.path, last=2).ok


def test_where_the_log_has_let_events_go_a_note_stands_for_each_hole(tmp_path: Path) -> None:
    rig = Rig(tmp_path)
    for _ in range(3):
        rig.publish(Restarted(1), *[CallStarted("read", "r")] * 9)
    rig.close()
    rig.path.unlink()
    rig = Rig(tmp_path, retain_events=5)
    while rig.log.first == 1:
        rig.publish(Restarted(1))
    rig.close()
    rig.path.unlink()
    rig = Rig(tmp_path)
    lines = rig.lines()
    notes = [(line["after"], line["had"]) for line in lines if line["event"] == "audit.events_not_kept"]
    assert notes[:2] == [(10, 1), (20, 11)]
    assert set(range(rig.log.first, rig.log.durable + 1)) | {1, 11, 21} == set(numbers(lines))
    assert verify(rig.path, last=rig.log.durable).ok
    rig.calls(2)
    assert verify(rig.path, last=rig.log.durable).ok
    rig.close()


@pytest.mark.parametrize("step", ["__call__", "take"])
def test_lines_that_memory_does_not_suffice_for_leave_the_chain_sound(
    step: str, rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    def short(*_: Any) -> bytes:
        raise MemoryError

    rig.calls(5)
    with monkeypatch.context() as patch:
        patch.setattr(Chain, step, short)
        rig.calls(5)
    assert rig.log.faults["audit"].last.startswith("MemoryError")
    rig.calls(1)
    assert working(rig.audit)
    assert numbers(rig.lines()) == list(range(1, 12))
    assert verify(rig.path, last=11).ok


def test_a_failed_write_is_counted_and_caught_up_and_the_log_goes_on(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    rig.calls(5)
    real = os.write

    def full(fd: int, data: memoryview) -> int:
        if fd != rig.audit._fd:
            return real(fd, data)
        if len(data) > 40:  # half of it fits
            return real(fd, data[:40])
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", full)
        rig.calls(5)
        rig.calls(5)
        assert rig.log.state.ok
        assert rig.log.durable == 15
        assert not working(rig.audit)
        assert "No space left on device" in (rig.audit.state.error or "")
        assert rig.audit.state.last == 5
        assert rig.audit.state.faults >= 2
    rig.calls(1)
    assert working(rig.audit)
    assert numbers(rig.lines()) == list(range(1, 17))
    assert verify(rig.path, last=16).ok


def test_an_end_that_the_disk_does_not_take_is_counted_and_named(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    rig.calls(5)
    own = rig.audit._fd

    def broken(fd: int) -> None:
        if fd == own:
            raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "fsync", broken)
    rig.close()
    assert rig.audit.state.faults == 1
    assert "Input/output error" in (rig.audit.state.error or "")
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(own)


def test_a_really_full_disk_does_not_disturb_the_log(tmp_path: Path) -> None:
    folder = tmp_path / "small"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(folder)]
    mounted = subprocess.run(mount, capture_output=True, text=True, check=False)
    if mounted.returncode:
        pytest.skip(f"no tmpfs can be mounted here: {mounted.stderr.strip()}")
    try:
        with EventLog.open(tmp_path / "events.db", source="test") as log:
            audit = AuditLog.open(folder / "audit.jsonl")
            audit.attach(log)
            bus = EventBus(HealthProjection())
            bus.subscribe(log)
            for number in range(2000):
                bus.publish(CallStarted("read", str(number)), "ocr")
            assert log.flush(LONG_S)
            assert log.state.ok
            assert not working(audit)
            subprocess.run(["mount", "-o", "remount,size=4m", str(folder)], check=True)
            audit.catch_up()
            assert working(audit)
            assert verify(folder / "audit.jsonl", last=2000).ok
            audit.close()
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def test_an_audit_that_cannot_be_opened_says_so_and_starts_once_it_can(tmp_path: Path) -> None:
    (tmp_path / "in the way").write_text("")
    audit = AuditLog.open(tmp_path / "in the way" / "audit.jsonl")
    assert not working(audit)
    with EventLog.open(tmp_path / "events.db", source="test") as log:
        audit.attach(log)
        bus = EventBus(HealthProjection())
        bus.subscribe(log)
        bus.publish(EngineStopping())
        assert log.flush(LONG_S)
        (tmp_path / "in the way").unlink()
        bus.publish(EngineStopping())
        assert log.flush(LONG_S)
    assert working(audit)
    assert verify(audit.path, last=2).ok
    audit.close()


def test_a_long_catch_up_takes_the_logs_thread_only_a_part_at_a_time(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    rig.calls(100)
    monkeypatch.setattr(events.audit, "CATCH_UP_EVENTS", 30)
    rig.path.unlink()
    rig.calls(1)
    reached = rig.audit.state.last
    assert reached < 101
    assert reached % 30 == 0
    rig.audit.catch_up()
    assert verify(rig.path, last=101).ok


# Verifying

Tamper = Callable[[list[bytes]], list[bytes]]


def altered(lines: list[bytes]) -> list[bytes]:
    return [*lines[:4], lines[4].replace(b'"read"', b'"rEad"'), *lines[5:]]


def renumbered(lines: list[bytes]) -> list[bytes]:
    return [*lines[:4], lines[4].replace(b'"sequence":5', b'"sequence":7'), *lines[5:]]


def relinked(lines: list[bytes]) -> list[bytes]:
    line = json.loads(lines[4])
    line["prev"] = "f" * 64
    return [*lines[:4], json.dumps(line).encode() + b"\n", *lines[5:]]


def without(number: int) -> Tamper:
    return lambda lines: lines[: number - 1] + lines[number:]


def swapped(lines: list[bytes]) -> list[bytes]:
    return [*lines[:4], lines[5], lines[4], *lines[6:]]


def moved_back(lines: list[bytes]) -> list[bytes]:
    return [*lines[:2], *lines[3:8], lines[2], *lines[8:]]


def repeated(lines: list[bytes]) -> list[bytes]:
    return [*lines[:5], lines[4], *lines[5:]]


def forged(lines: list[bytes]) -> list[bytes]:
    line = json.loads(lines[5])
    line["data"]["tool"] = "forged"
    return [*lines[:5], json.dumps(line).encode() + b"\n", *lines[5:]]


def not_json(lines: list[bytes]) -> list[bytes]:
    return [*lines[:4], b"hello\n", *lines[5:]]


def torn(lines: list[bytes]) -> list[bytes]:
    return [*lines[:-1], lines[-1][:30]]


@pytest.mark.parametrize(
    ("tamper", "trouble", "bad_line"),
    [
        (altered, "altered", 5),
        (renumbered, "altered", 5),
        (relinked, "altered", 5),
        (without(1), "missing", 1),
        (without(5), "missing", 5),
        (lambda lines: lines[:3] + lines[7:], "missing", 4),
        (swapped, "reordered", 5),
        (moved_back, "reordered", 3),
        (repeated, "inserted", 6),
        (forged, "inserted", 6),
        (not_json, "not_json", 5),
        (torn, "torn", 10),
    ],
    ids=[
        "altered", "renumbered", "relinked", "first missing", "missing", "several missing", "swapped",
        "moved back", "repeated", "forged", "not json", "torn",
    ],
)  # fmt: skip
def test_verify_names_the_first_bad_line_and_what_is_wrong_with_it(
    rig: Rig, tamper: Tamper, trouble: str, bad_line: int
) -> None:
    rig.calls(10)
    assert verify(rig.path, last=10).ok
    tampered = rig.path.with_name("tampered.jsonl")
    tampered.write_bytes(b"".join(tamper(rig.path.read_bytes().splitlines(keepends=True))))
    report = verify(tampered)
    assert (report.ok, report.trouble, report.bad_line) == (False, trouble, bad_line), report
    assert report.lines == len(tampered.read_bytes().splitlines())


def test_every_changed_byte_is_found(rig: Rig) -> None:
    """Of each line but the last, which no later line remembers."""
    rig.calls(4)
    whole, tampered = rig.path.read_bytes(), rig.path.with_name("tampered.jsonl")
    remembered = whole.rindex(b"\n", 0, -1)
    for position in range(0, remembered, 7):
        changed = bytearray(whole)
        changed[position] ^= 0x01
        tampered.write_bytes(changed)
        assert not verify(tampered).ok, position


def test_an_end_that_was_cut_off_shows_against_the_logs_last_number(rig: Rig) -> None:
    rig.calls(10)
    cut = rig.path.with_name("cut.jsonl")
    cut.write_bytes(b"".join(rig.path.read_bytes().splitlines(keepends=True)[:7]))
    assert verify(cut).ok
    report = verify(cut, last=10)
    assert (report.ok, report.trouble, report.bad_line, report.last) == (False, "missing", 8, 7)


def test_a_gap_accounts_for_the_numbers_it_stands_for(rig: Rig) -> None:
    rig.calls(2)
    rig.log.close()
    folder = rig.path.parent
    other = EventLog.open(folder / "other.db", source="test", backlog=10)
    bus = EventBus(HealthProjection())
    bus.subscribe(other)
    with other._changed:  # the writer cannot take anything meanwhile
        for number in range(30):
            bus.publish(CallStarted("read", str(number)), "ocr")
    assert other.flush(LONG_S)
    audit = AuditLog.open(folder / "other.jsonl")
    audit.attach(other)
    assert verify(folder / "other.jsonl", last=30).ok
    assert len((folder / "other.jsonl").read_bytes().splitlines()) == 11
    other.close()
    audit.close()


def test_an_empty_file_is_sound_until_the_log_says_otherwise(tmp_path: Path) -> None:
    (tmp_path / "audit.jsonl").touch()
    assert verify(tmp_path / "audit.jsonl").ok
    assert not verify(tmp_path / "audit.jsonl", last=1).ok
