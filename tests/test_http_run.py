"""Calls over HTTP: what goes in, what comes out, and which status says so."""

from __future__ import annotations

import asyncio
import base64
import json
import os
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from http_support import Lab, connections, form, lines_of, raw_request, rest_of, serving, write_lab
from support import next_event, until, write_plugin

from engine.api.answers import status_of
from engine.api.keys import STALL_S
from engine.errors import ReasonCode, StreamStalled
from engine.outcome import Broke, Completed, Outcome, Refused

NDJSON = {"Accept": "application/x-ndjson"}
FAILED_KEYS = ["ok", "error", "error_type", "reason_code", "state", "request_id"]


def uploads(lab: Lab) -> list[Path]:
    """What lies among the uploads."""
    # `os.walk` takes no offence at a folder that goes while it looks, as `rglob` does.
    root = lab.engine.scratch_root / "uploads"
    return [Path(folder, name) for folder, _, names in os.walk(root) for name in names]


async def test_json_in_and_the_outcome_out(plugins: Path, data_dir: Path) -> None:
    write_lab(plugins)
    async with serving(plugins, data_dir) as lab:
        status, outcome = await lab.run("echo", text="hé", times=2)
        assert status == 200
        assert list(outcome) == ["ok", "value", "duration_ms", "request_id"]
        assert (outcome["ok"], outcome["value"]) == (True, "héhé")
        assert outcome["duration_ms"] > 0
        path = "/v1/plugins/lab/tools/echo/run"
        async with lab.http.post(path, data=b'{"text": "x"}') as response:  # octet-stream by default
            assert response.status == 415
        async with lab.http.post(path, data=b'{"text": "x"}', skip_auto_headers=["Content-Type"]) as response:
            assert response.status == 200


async def test_the_callers_request_id_stands_everywhere(plugins: Path, data_dir: Path) -> None:
    write_lab(plugins)
    async with serving(plugins, data_dir) as lab:
        path, headers = "/v1/plugins/lab/tools/echo/run", {"X-Request-Id": "order/../66"}
        async with lab.http.post(path, json={"text": "x"}, headers=headers) as response:
            assert response.headers["X-Request-Id"] == "order/../66"
            assert (await response.json())["request_id"] == "order/../66"
        event = await next_event(lab.engine, "plugin.call.finished", "lab")
        assert event.data.request_id == "order/../66"  # type: ignore[union-attr]
        for odd in ("x" * 129, "a b", "é"):
            async with lab.http.post(path, json={}, headers={"X-Request-Id": odd}) as response:
                body = await response.json()
                assert (response.status, body["reason_code"]) == (422, "bad_input")
                assert body["request_id"] != odd


@pytest.mark.contract(7)
@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        ({}, ["`text`", "missing", "`str`"]),
        ({"text": 5}, ["`text`", "`str`", "`int`"]),
        ({"txet": "x"}, ["`txet`", "did you mean `text`?"]),
        ({"text": "x", "times": "many"}, ["`times`", "`int`", "`str`"]),
    ],
)
async def test_bad_arguments_are_422_and_leave_the_plugin_alone(
    plugins: Path, data_dir: Path, arguments: dict[str, Any], names: list[str]
) -> None:
    write_lab(plugins)
    async with serving(plugins, data_dir) as lab:
        status, outcome = await lab.run("echo", **arguments)
        assert (status, outcome["reason_code"], outcome["state"]) == (422, "bad_input", "INITIALIZED")
        assert list(outcome) == FAILED_KEYS
        assert all(name in outcome["error"] for name in names), outcome["error"]


@pytest.mark.contract(7)
@pytest.mark.parametrize("body", [b"{", b"[1]", b"\xff\xfe", b"null", b"[" * 100_000, b'{"text": "x"} trailing'])
async def test_a_body_that_is_no_object_is_422(plugins: Path, data_dir: Path, body: bytes) -> None:
    write_lab(plugins)
    async with serving(plugins, data_dir) as lab:
        path, headers = "/v1/plugins/lab/tools/echo/run", {"Content-Type": "application/json"}
        async with lab.http.post(path, data=body, headers=headers) as response:
            assert (response.status, (await response.json())["reason_code"]) == (422, "bad_input")
        assert (await lab.run("echo", text="fine"))[0] == 200


async def test_what_the_tool_rejects_is_422_with_its_words(plugins: Path, data_dir: Path) -> None:
    write_lab(plugins)
    async with serving(plugins, data_dir) as lab:
        status, outcome = await lab.run("picky", text="soup")
    assert (status, outcome["error_type"]) == (422, "ValueError")
    assert "soup is not to my taste" in outcome["error"]


async def test_unknown_names_are_404_with_the_nearest_before_the_body_is_read(
    plugins: Path, data_dir: Path
) -> None:
    write_lab(plugins)
    async with serving(plugins, data_dir, max_json_bytes=100) as lab:
        status, outcome = await lab.run("ecko", text="x" * 1000)
        assert (status, outcome["reason_code"], outcome["state"]) == (404, "unknown_tool", "INITIALIZED")
        assert "did you mean `echo`?" in outcome["error"]
        status, outcome = await lab.run("echo", plugin="lap")
        assert (status, outcome["reason_code"], outcome["state"]) == (404, "unknown_plugin", None)
        assert "did you mean `lab`?" in outcome["error"]


async def test_a_body_too_large_is_413(plugins: Path, data_dir: Path) -> None:
    write_lab(plugins)
    async with serving(plugins, data_dir, max_json_bytes=1000, max_body_bytes=10_000) as lab:
        status, outcome = await lab.run("echo", text="x" * 1000)
        assert (status, outcome["reason_code"]) == (413, "input_too_large")
        assert (await lab.run("echo", text="x" * 900))[0] == 200

        async def chunks() -> Any:
            for _ in range(20):
                yield b" " * 100

        path = "/v1/plugins/lab/tools/echo/run"
        async with lab.http.post(path, data=chunks(), headers={"Content-Type": "application/json"}) as response:
            assert response.status == 413
        large = form({"file": ("a", b"x" * 10_000)})
        async with lab.http.post("/v1/plugins/lab/tools/size/run", data=large) as response:
            assert (response.status, (await response.json())["reason_code"]) == (413, "input_too_large")
        # Without a length the limit is met on the way, and what was kept until then is removed.
        parts = aiohttp.MultipartWriter("form-data")
        parts.append(slowly(100, 200)).set_content_disposition("form-data", name="file", filename="a.bin")
        async with lab.http.post("/v1/plugins/lab/tools/size/run", data=parts) as response:
            assert response.status == 413, await response.text()
        await until(lambda: not uploads(lab))
        text = form({"file": ("a", b"x")}, note="y" * 2000)
        async with lab.http.post("/v1/plugins/lab/tools/size/run", data=text) as response:
            assert response.status == 413


async def slowly(count: int, size: int) -> Any:
    """A body of unknown length."""
    for _ in range(count):
        yield b"z" * size


async def test_foreign_content_types_are_415(plugins: Path, data_dir: Path) -> None:
    write_lab(plugins)
    async with serving(plugins, data_dir) as lab:
        path = "/v1/plugins/lab/tools/echo/run"
        for headers in (
            {"Content-Type": "application/x-www-form-urlencoded"},
            {"Content-Type": "text/plain"},
        ):
            async with lab.http.post(path, data=b"text=x", headers=headers) as response:
                outcome = await response.json()
                assert (response.status, outcome["error_type"]) == (415, "UnsupportedMediaType")
        async with lab.http.post(path, data=b"", headers={"Content-Type": "text/plain"}) as response:
            assert response.status == 422  # no body is no arguments
        async with lab.http.post(path, data=b'{"text": "x"}', compress="gzip") as response:
            assert response.status == 415


async def test_a_full_queue_is_429_with_retry_after(plugins: Path, data_dir: Path, tmp_path: Path) -> None:
    write_lab(plugins, limits="queue = 1")
    gate = tmp_path / "gate"
    async with serving(plugins, data_dir) as lab:
        after = lab.engine.bus.last
        calls = [asyncio.create_task(lab.run("hold", gate=str(gate))) for _ in range(2)]
        await next_event(lab.engine, "plugin.call.started", "lab", after)
        pool = lab.engine.registry.get("lab").pool
        await until(lambda: pool is not None and pool.waiting == 1)
        async with lab.http.post("/v1/plugins/lab/tools/echo/run", json={"text": "x"}) as response:
            assert (response.status, (await response.json())["reason_code"]) == (429, "queue_full")
            assert int(response.headers["Retry-After"]) >= 1
        gate.touch()
        assert [status for status, _ in await asyncio.gather(*calls)] == [200, 200]


async def test_a_crash_is_502_and_then_503_with_the_same_reason(plugins: Path, data_dir: Path) -> None:
    write_lab(plugins)
    async with serving(plugins, data_dir) as lab:
        status, broke = await lab.run("leave")
        assert (status, broke["reason_code"], broke["state"]) == (502, "worker_exit", "FAILED")
        assert list(broke) == FAILED_KEYS
        status, refused = await lab.run("echo", text="x")
        assert (status, refused["reason_code"], refused["state"]) == (503, "worker_exit", "FAILED")


@pytest.mark.contract(6)
async def test_a_timeout_is_504_and_then_503(plugins: Path, data_dir: Path) -> None:
    write_lab(plugins)
    async with serving(plugins, data_dir) as lab:
        status, outcome = await lab.run("hang")
        assert (status, outcome["reason_code"]) == (504, "tool_timeout")
        status, outcome = await lab.run("echo", text="x")
        assert (status, outcome["reason_code"]) == (503, "tool_timeout")


async def test_what_json_cannot_hold(plugins: Path, data_dir: Path) -> None:
    write_lab(plugins)
    code = """
    import numpy
    class Plugin:
        def __init__(self, context): pass
        def validate(self): pass
        def ramp(self) -> numpy.ndarray: return numpy.arange(6, dtype="<i2").reshape(2, 3)
    """
    write_plugin(plugins, "arrays", code, ["ramp"])
    async with serving(plugins, data_dir) as lab:
        assert (await lab.run("not_a_number"))[1]["value"] == [None, None, 1.5]
        status, outcome = await lab.run("reverse", data=base64.b64encode(b"abc").decode())
        assert (status, base64.b64decode(outcome["value"])) == (200, b"cba")
        _, outcome = await lab.run("ramp", plugin="arrays")
        assert (outcome["value"]["typestr"], outcome["value"]["shape"]) == ("<i2", [2, 3])
        assert base64.b64decode(outcome["value"]["data"]) == bytes([0, 0, 1, 0, 2, 0, 3, 0, 4, 0, 5, 0])
        status, outcome = await lab.run("odd")
        assert (status, outcome["reason_code"], outcome["ok"]) == (502, "result_invalid", False)
        assert (await lab.engine.restart("lab")).state == "INITIALIZED"
        path = "/v1/plugins/lab/tools/odd/run"
        async with lab.http.post(path, headers=NDJSON) as response:
            assert (response.status, (await response.json())["reason_code"]) == (502, "result_invalid")


# Forms


async def test_a_form_brings_files_and_text(plugins: Path, data_dir: Path) -> None:
    write_lab(plugins)
    async with serving(plugins, data_dir) as lab:
        clip = form({"file": ("../../etc/Clip.MP4", b"x" * 3_000_000)}, note="a note", count="3")
        async with lab.http.post("/v1/plugins/lab/tools/size/run", data=clip) as response:
            outcome = await response.json()
            assert response.status == 200, outcome
        value = outcome["value"]
        assert (value["bytes"], value["note"], value["count"]) == (3_000_000, "a note", 3)
        assert value["name"] == "_2F.._2Fetc_2FClip.MP4"  # recognizable, and no path
        assert Path(value["path"]).is_relative_to(lab.engine.scratch_root)
        assert not uploads(lab)
        data = form({"data": ("b.bin; rm -rf", b"\x00\xff\x01")})
        async with lab.http.post("/v1/plugins/lab/tools/reverse/run", data=data) as response:
            assert base64.b64decode((await response.json())["value"]) == b"\x01\xff\x00"
        data = form({"n": ("n.txt", b"2")})
        async with lab.http.post("/v1/plugins/lab/tools/count/run", data=data, headers=NDJSON) as response:
            assert response.status == 200  # the file's text, as JSON, is the number
        await until(lambda: not uploads(lab))


@pytest.mark.contract(7)
async def test_malformed_forms_are_422(plugins: Path, data_dir: Path) -> None:
    write_lab(plugins)
    head = b'--B\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\n'
    field = b'--B\r\nContent-Disposition: form-data; name="note"\r\n\r\n'
    bodies = [
        b"",
        b"nothing of the kind",
        head + b"cut short",
        head + b"x\r\n--B\r\n",
        b"--B\r\n\r\nno name\r\n--B--\r\n",
        field + b"1\r\n" + field + b"2\r\n--B--\r\n",
        field + b"\xff\xfe\r\n--B--\r\n",
        field.replace(b"\r\n\r\n", b"\r\nContent-Transfer-Encoding: base64\r\n\r\n") + b"AA==\r\n--B--\r\n",
        b"--B\r\nContent-Type: multipart/mixed; boundary=C\r\n\r\n--C\r\n\r\nx\r\n--C--\r\n--B--\r\n",
        b"--B\r\n" + b"X: y\r\n" * 500 + b"\r\nx\r\n--B--\r\n",
    ]
    async with serving(plugins, data_dir) as lab:
        path = "/v1/plugins/lab/tools/size/run"
        for kind in ("multipart/form-data; boundary=B", "multipart/form-data"):
            for body in bodies:
                async with lab.http.post(path, data=body, headers={"Content-Type": kind}) as response:
                    outcome = await response.json()
                    assert (response.status, outcome["reason_code"]) == (422, "bad_input"), (body, outcome)
        await until(lambda: not uploads(lab))
        assert lab.engine.health("lab").state == "INITIALIZED"


async def test_a_form_of_empty_lines_is_refused_before_it_is_read(plugins: Path, data_dir: Path) -> None:
    write_lab(plugins)
    async with serving(plugins, data_dir) as lab:
        async with lab.http.post(
            "/v1/plugins/lab/tools/size/run",
            data=b"\r\n" * 200_000,
            headers={"Content-Type": "multipart/form-data; boundary=A"},
        ) as response:
            outcome = await response.json()
            assert (response.status, outcome["reason_code"]) == (422, "bad_input")
            assert "lines" in outcome["error"]
        assert lab.engine._pulse.blocks == 0


async def test_an_upload_that_stalls_is_408_and_removed(plugins: Path, data_dir: Path) -> None:
    write_lab(plugins)
    async with serving(plugins, data_dir, {STALL_S: 0.2}) as lab:
        head = ["POST /v1/plugins/lab/tools/size/run HTTP/1.1", "Content-Length: 100000"]
        body = b'--B\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\nfirst'
        async with raw_request(lab, *head, "Content-Type: multipart/form-data; boundary=B", body=body) as reader:
            assert (await reader.readline()).split()[1] == b"408"
        await until(lambda: not uploads(lab))


async def test_a_caller_that_goes_away_fails_nothing_and_its_upload_outlives_it(
    plugins: Path, data_dir: Path, tmp_path: Path
) -> None:
    write_lab(plugins)
    gate = tmp_path / "gate"
    async with serving(plugins, data_dir) as lab:
        for tool, headers in (("hold_file", {}), ("hold_items", NDJSON)):
            after = lab.engine.bus.last
            data = form({"file": ("a.txt", b"12345")}, gate=str(gate))
            async with aiohttp.ClientSession(lab.http.make_url("/")) as session:
                path = f"/v1/plugins/lab/tools/{tool}/run"
                calling = asyncio.ensure_future(session.post(path, data=data, headers=headers))
                await next_event(lab.engine, "plugin.call.started", "lab", after)
                assert len(uploads(lab)) == 1
                calling.cancel()
                (answer,) = await asyncio.gather(calling, return_exceptions=True)
                if isinstance(answer, aiohttp.ClientResponse):  # a stream's headers had come already
                    answer.close()
            await until(lambda: not connections(lab))
            assert len(uploads(lab)) == 1
            gate.touch()
            finished = await next_event(lab.engine, "plugin.call.finished", "lab", after)
            assert finished.data.ok  # type: ignore[union-attr]
            await until(lambda: not uploads(lab))
            assert lab.engine.health("lab").state == "RUNNING"
            gate.unlink()


# Streams


async def test_items_and_progress_come_as_lines(plugins: Path, data_dir: Path) -> None:
    write_lab(plugins)
    async with serving(plugins, data_dir) as lab:
        path = "/v1/plugins/lab/tools/count/run"
        async with lab.http.post(path, json={"n": 200}, headers={**NDJSON, "X-Request-Id": "r1"}) as response:
            assert (response.status, response.content_type) == (200, "application/x-ndjson")
            assert response.headers["X-Request-Id"] == "r1"
            lines = await lines_of(response)
        assert [line["item"]["i"] for line in lines if "item" in line] == list(range(200))
        assert [line["progress"]["done"] for line in lines if "progress" in line][-1] == 200
        last = lines[-1]["outcome"]
        assert (last["ok"], last["value"], last["request_id"]) == (True, None, "r1")
        status, outcome = await lab.run("count", n=3)
        assert (status, outcome["value"]) == (200, [{"i": 0}, {"i": 1}, {"i": 2}])


async def test_a_tool_that_does_not_stream_answers_one_outcome_line(plugins: Path, data_dir: Path) -> None:
    write_lab(plugins)
    async with serving(plugins, data_dir) as lab:
        async with lab.http.post("/v1/plugins/lab/tools/steps/run", json={"n": 3}, headers=NDJSON) as response:
            lines = await lines_of(response)
        assert {*map(tuple, lines[:-1])} == {("progress",)}
        assert lines[-1]["outcome"]["value"] == "done"
        async with lab.http.post("/v1/plugins/lab/tools/echo/run", json={"text": "x"}, headers=NDJSON) as response:
            (line,) = await lines_of(response)
            assert line["outcome"]["value"] == "x"


async def test_a_stream_is_live(plugins: Path, data_dir: Path, tmp_path: Path) -> None:
    write_lab(plugins)
    gate = tmp_path / "gate"
    async with serving(plugins, data_dir) as lab:
        data = form({"file": ("a", b"12345")}, gate=str(gate))
        async with lab.http.post("/v1/plugins/lab/tools/hold_items/run", data=data, headers=NDJSON) as response:
            assert json.loads(await response.content.readline()) == {"item": 1}
            gate.touch()
            assert json.loads(await response.content.readline()) == {"item": 5}
            assert json.loads(await response.content.readline())["outcome"]["ok"]


async def test_a_stream_that_breaks_ends_with_the_outcome(plugins: Path, data_dir: Path) -> None:
    write_lab(plugins)
    async with serving(plugins, data_dir) as lab:
        async with lab.http.post("/v1/plugins/lab/tools/odd_items/run", headers=NDJSON) as response:
            lines = await lines_of(response)
            assert (response.status, lines[0]) == (200, {"item": 1})
            assert lines[-1]["outcome"]["reason_code"] == "result_invalid"
        assert (await lab.engine.restart("lab")).state == "INITIALIZED"
        async with lab.http.post("/v1/plugins/lab/tools/stumble/run", json={"n": 2}, headers=NDJSON) as response:
            lines = await lines_of(response)
            assert (response.status, lines[:2]) == (200, [{"item": 0}, {"item": 1}])
            outcome = lines[-1]["outcome"]
            assert (outcome["ok"], outcome["reason_code"], outcome["state"]) == (False, "tool_exception", "FAILED")


async def test_what_is_known_before_the_first_line_gets_its_status(plugins: Path, data_dir: Path) -> None:
    write_lab(plugins)
    async with serving(plugins, data_dir) as lab:
        for tool, arguments, expected in (
            ("count", {"n": "x"}, 422),
            ("nope", {}, 404),
            ("stumble", {"n": 0}, 502),
            ("count", {"n": 1}, 503),
        ):
            path = f"/v1/plugins/lab/tools/{tool}/run"
            async with lab.http.post(path, json=arguments, headers=NDJSON) as response:
                assert response.status == expected
                assert list(await response.json()) == FAILED_KEYS


async def test_a_reader_that_stops_holds_the_tool_up_and_is_then_cut_off(plugins: Path, data_dir: Path) -> None:
    write_lab(plugins)
    async with serving(plugins, data_dir, {STALL_S: 0.3}, stream_stall_s=0.3) as lab:
        after = lab.engine.bus.last
        body = b'{"items": 400, "size": 100000}'  # 40 MB
        head = ["POST /v1/plugins/lab/tools/flood/run HTTP/1.1", f"Content-Length: {len(body)}"]
        head += ["Accept: application/x-ndjson", "Content-Type: application/json"]
        async with raw_request(lab, *head, body=body) as reader:
            finished = await next_event(lab.engine, "plugin.call.finished", "lab", after)
            assert finished.data.ok  # type: ignore[union-attr]
            await until(lambda: not connections(lab))
            taken = await rest_of(reader)
        assert taken.startswith(b"HTTP/1.1 200")
        assert not taken.endswith(b"0\r\n\r\n")  # nobody takes it for the whole
        assert b'"outcome"' not in taken
        assert lab.engine.health("lab").state == "RUNNING"


async def test_a_consumer_that_comes_back_too_late_is_told_of_missing_items(plugins: Path, data_dir: Path) -> None:
    write_lab(plugins)
    async with serving(plugins, data_dir, stream_stall_s=0.1) as lab:
        after = lab.engine.bus.last
        stream = lab.engine.stream("lab", "flood", {"items": 300, "size": 100_000})
        assert await anext(stream)
        await next_event(lab.engine, "plugin.call.finished", "lab", after)
        with pytest.raises(StreamStalled):
            await anext(stream)


async def test_a_slow_reader_gets_every_item(plugins: Path, data_dir: Path) -> None:
    write_lab(plugins)
    async with serving(plugins, data_dir) as lab:
        path, arguments = "/v1/plugins/lab/tools/flood/run", {"items": 300, "size": 100_000}
        async with lab.http.post(path, json=arguments, headers=NDJSON, read_bufsize=4096) as response:
            count = 0
            rest = b""
            async for chunk in response.content.iter_chunked(65536):
                rest += chunk
                *lines, rest = rest.split(b"\n")
                count += sum(line.startswith(b'{"item"') for line in lines)
        assert count == 300


async def test_items_too_many_to_collect_are_413(plugins: Path, data_dir: Path) -> None:
    write_lab(plugins)
    async with serving(plugins, data_dir, max_result_bytes=1_000_000) as lab:
        status, outcome = await lab.run("flood", items=30, size=100_000)
        assert (status, outcome["reason_code"]) == (413, "result_too_large")
        assert "ask for a stream" in outcome["error"]


def refused(code: ReasonCode, kind: str = "X") -> Refused:
    return Refused(error="", error_type=kind, reason_code=code, state=None, request_id="r")


def broke(code: ReasonCode) -> Broke:
    return Broke(error="", error_type="X", reason_code=code, state="FAILED", request_id="r")


@pytest.mark.parametrize(
    ("outcome", "status"),
    [
        (Completed(value=1, duration_ms=1.0, request_id="r"), 200),
        (refused(ReasonCode.UNKNOWN_PLUGIN), 404),
        (refused(ReasonCode.UNKNOWN_TOOL), 404),
        (refused(ReasonCode.INPUT_TOO_LARGE), 413),
        (refused(ReasonCode.RESULT_TOO_LARGE, "ResultTooLarge"), 413),
        (refused(ReasonCode.RESULT_TOO_LARGE, "NotInService"), 503),
        (refused(ReasonCode.BAD_INPUT), 422),
        (refused(ReasonCode.QUEUE_FULL), 429),
        (refused(ReasonCode.TOOL_TIMEOUT, "NotInService"), 503),
        (refused(ReasonCode.GPU_ABSENT, "NotInService"), 503),
        (refused(ReasonCode.RESTARTED), 503),
        (refused(ReasonCode.ENGINE_FAULT), 503),
        (broke(ReasonCode.TOOL_TIMEOUT), 504),
        (broke(ReasonCode.RESULT_TOO_LARGE), 502),
        *((broke(code), 502) for code in ReasonCode if code is not ReasonCode.TOOL_TIMEOUT),
    ],
)
def test_every_outcome_has_its_status(outcome: Outcome, status: int) -> None:
    assert status_of(outcome) == status
