"""Health, lists, descriptions and probes: what reads, and never fails."""

from __future__ import annotations

import asyncio
import json
import os
from pathlib import Path

import pytest
from http_support import Lab, client_of, raw_request, rest_of, serving, write_lab
from support import HONEST, next_event, settings_for, write_honest, write_plugin

from engine import Engine
from engine.api.app import all_routes, create_app
from engine.api.keys import ENGINE
from engine.api.tokens import Tokens

HEALTH_KEYS = [
    *("name", "state", "reason", "reason_code", "version", "description", "incarnation", "uptime_seconds"),
    *("last_used", "success_count", "error_count", "in_flight", "last_execution_time_ms"),
    *("avg_execution_time_ms", "requires_gpu", "tools", "pid", "memory_bytes", "as_of"),
]


@pytest.mark.contract(4, 8)
async def test_list_shows_every_plugin_whatever_its_state(plugins: Path, data_dir: Path) -> None:
    write_honest(plugins)
    write_plugin(plugins, "needy", "", ["run"], head='packages = ["no_such_package_anywhere"]')
    (plugins / "broken").mkdir()
    (plugins / "broken" / "plugin.toml").write_text("name = ")
    async with serving(plugins, data_dir) as lab:
        status, listed = await lab.get("/v1/plugins")
        _, slashed = await lab.get("/v1/plugins/")
    states = {health["name"]: (health["state"], health["reason_code"]) for health in listed}
    assert status == 200
    assert states == {
        "honest": ("INITIALIZED", None),
        "needy": ("UNAVAILABLE", "package_missing"),
        "broken": ("FAILED", "manifest_invalid"),
    }
    assert all(list(health) == HEALTH_KEYS for health in listed)
    assert [health["name"] for health in slashed] == [health["name"] for health in listed]


@pytest.mark.contract(4)
async def test_health_answers_in_any_state_and_404_names_the_nearest(plugins: Path, data_dir: Path) -> None:
    write_lab(plugins)
    async with serving(plugins, data_dir) as lab:
        assert (await lab.get("/v1/plugins/lab/health"))[1]["state"] == "INITIALIZED"
        assert (await lab.run("leave"))[0] == 502
        status, failed = await lab.get("/v1/plugins/lab/health")
        assert (status, failed["state"], failed["reason_code"]) == (200, "FAILED", "worker_exit")
        status, unknown = await lab.get("/v1/plugins/labb/health")
    assert status == 404
    assert unknown["reason_code"] == "unknown_plugin"
    assert "did you mean `lab`?" in unknown["error"]
    assert unknown["request_id"]


@pytest.mark.contract(4)
async def test_health_answers_while_a_call_hangs(plugins: Path, data_dir: Path) -> None:
    write_lab(plugins)
    async with serving(plugins, data_dir) as lab:
        after = lab.engine.bus.last
        hanging = asyncio.create_task(lab.run("hang"))
        await next_event(lab.engine, "plugin.call.started", "lab", after)
        status, health = await lab.get("/v1/plugins/lab/health")
        assert (status, health["state"], health["in_flight"]) == (200, "RUNNING", 1)
        assert not hanging.done()
        assert (await hanging)[0] == 504


async def test_description_has_the_tools_with_their_schemas(plugins: Path, data_dir: Path) -> None:
    write_lab(plugins)
    async with serving(plugins, data_dir) as lab:
        status, described = await lab.get("/v1/plugins/lab")
        assert (await lab.get("/v1/plugins/nope"))[0] == 404
    tools = {tool["name"]: tool for tool in described["tools"]}
    assert status == 200
    assert tools["echo"]["parameters"]["properties"]["text"] == {"type": "string"}
    assert tools["echo"]["parameters"]["required"] == ["text"]
    assert tools["count"]["streams"]
    assert tools["count"]["progress"]
    assert "settings" not in described


async def test_description_says_what_the_plugin_gave_up(plugins: Path, data_dir: Path) -> None:
    write_honest(plugins)
    confined = '[sandbox]\nnetwork = false\nfilesystem = "read-only"\nwrite = ["/srv/out"]'
    write_plugin(plugins, "confined", HONEST, ["echo"], head=confined)
    (plugins / "broken").mkdir()
    (plugins / "broken" / "plugin.toml").write_text("name = ")
    async with serving(plugins, data_dir) as lab:
        shown = {
            name: (await lab.get(f"/v1/plugins/{name}"))[1]["sandbox"] for name in ("honest", "confined", "broken")
        }
        _, document = await lab.get("/openapi.json")
    assert shown == {
        "honest": {"network": True, "filesystem": "open", "read": [], "write": []},
        "confined": {"network": False, "filesystem": "read-only", "read": [], "write": ["/srv/out"]},
        "broken": None,
    }
    assert set(document["components"]["schemas"]["Sandbox"]["properties"]) == set(shown["honest"])


async def test_a_plugin_in_a_folder_that_no_text_can_name_is_described(plugins: Path, data_dir: Path) -> None:
    write_honest(plugins)
    (plugins / "honest").rename(plugins / os.fsdecode(b"bad\xff"))
    async with serving(plugins, data_dir) as lab:
        status, described = await lab.get("/v1/plugins/honest")
    assert (status, described["state"], described["reason_code"]) == (200, "FAILED", "manifest_invalid")
    assert described["folder"].endswith("bad\\udcff")


async def test_readiness_waits_for_the_plugins_to_settle_and_ends_with_the_stop(
    plugins: Path, data_dir: Path
) -> None:
    write_honest(plugins)
    engine = Engine(settings_for(plugins, data_dir))
    await engine.open()
    async with client_of(engine) as http:
        async with http.get("/readyz") as response:
            assert (response.status, await response.json()) == (503, {"ready": False})
        async with http.get("/v1/plugins") as response:
            assert [health["state"] for health in await response.json()] == ["LOADED"]
        await engine.settle()
        async with http.get("/readyz") as response:
            assert (response.status, await response.json()) == (200, {"ready": True})
        await engine.close()
        async with http.get("/readyz?verbose") as response:
            parts = {part["name"]: part["ok"] for part in (await response.json())["parts"]}
            assert response.status == 503
        assert parts["engine"] is False
        for path in ("/v1/plugins", "/v1/plugins/honest/health", "/livez", "/metrics"):
            async with http.get(path) as response:
                assert response.status == 200, path
        async with http.post("/v1/plugins/honest/restart") as response:
            assert (response.status, (await response.json())["reason_code"]) == (503, "engine_stopping")
        async with http.get("/v1/events?after=0", headers={"Accept": "application/json"}) as response:
            assert response.status in (200, 503)  # what is still in memory can be read
        async with http.get("/v1/events") as response:
            assert response.status == 503


async def test_a_failed_plugin_fails_neither_probe(plugins: Path, data_dir: Path) -> None:
    write_lab(plugins)
    async with serving(plugins, data_dir) as lab:
        await lab.run("leave")
        assert (await lab.get("/livez")) == (200, {"alive": True})
        status, readiness = await lab.get("/readyz?verbose")
    assert status == 200
    assert {part["name"] for part in readiness["parts"]} >= {"engine", "plugins", "log", "audit"}


async def test_metrics_are_prometheus_text(plugins: Path, data_dir: Path) -> None:
    write_lab(plugins)
    async with serving(plugins, data_dir) as lab:
        await lab.run("echo", text="x")
        async with lab.http.get("/metrics") as response:
            text = await response.text()
            assert response.status == 200
            assert response.content_type == "text/plain"
    assert 'holdfast_plugin_state{plugin="lab",state="RUNNING"} 1.0' in text
    assert "holdfast_engine_faults_total 0.0" in text


async def test_restart_answers_the_new_incarnation(plugins: Path, data_dir: Path) -> None:
    write_lab(plugins)
    async with serving(plugins, data_dir) as lab:
        await lab.run("leave")
        async with lab.http.post("/v1/plugins/lab/restart") as response:
            health = await response.json()
            assert response.status == 200
        assert (health["state"], health["incarnation"]) == ("INITIALIZED", 2)
        async with lab.http.post("/v1/plugins/lap/restart") as response:
            assert response.status == 404
            assert "did you mean `lab`?" in (await response.json())["error"]


async def test_unknown_paths_and_methods_get_json(plugins: Path, data_dir: Path) -> None:
    write_honest(plugins)
    async with serving(plugins, data_dir) as lab:
        status, body = await lab.get("/nope")
        assert (status, body["reason_code"]) == (404, "not_found")
        async with lab.http.delete("/v1/plugins") as response:
            assert response.status == 405
            assert "GET" in response.headers["Allow"]
            assert (await response.json())["reason_code"] == "method_not_allowed"
        async with lab.http.head("/livez") as response:
            assert response.status == 200


@pytest.mark.parametrize(
    "path",
    [
        "/v1/plugins/%2e%2e/health",
        "/v1/plugins/..%2f..%2fetc%2fpasswd/health",
        "/v1/plugins/%00/health",
        "/v1/plugins/a%2Fb",
        "/v1/plugins/%ff%fe/health",
        "/v1/plugins/%zz/health",
        "/v1/plugins/" + "x" * 4000,
        "/v1/plugins/honest%00",
        "/v1/plugins/../../etc/passwd",
        "/v1/plugins//health",
    ],
)
async def test_odd_names_are_404_and_nothing_else(plugins: Path, data_dir: Path, path: str) -> None:
    write_honest(plugins)
    async with serving(plugins, data_dir) as lab:
        assert await raw_status(lab, f"GET {path} HTTP/1.1") == 404
        run = "/v1/plugins/honest/tools/" + path.removeprefix("/v1/plugins/").partition("/")[0] + "/run"
        assert await raw_status(lab, f"POST {run} HTTP/1.1", "Content-Length: 0") == 404


async def test_bytes_that_are_no_http_are_400(plugins: Path, data_dir: Path) -> None:
    write_honest(plugins)
    async with serving(plugins, data_dir) as lab:
        assert await raw_status(lab, "\x16\x03\x01 nonsense") == 400
        assert await raw_status(lab, "GET / HTTP/1.1", "X-Long: " + "x" * 20_000) == 400
        assert await raw_status(lab, "GET /v1/plugins/\xff\xfe/health HTTP/1.1") in (400, 404)


async def raw_status(lab: Lab, *head: str) -> int:
    """The status of a request that is sent as it stands."""
    async with raw_request(lab, head[0], "Connection: close", *head[1:]) as reader:
        return int((await rest_of(reader)).split(b" ", 2)[1])


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("localhost", 200),
        ("localhost:8700", 200),
        ("127.0.0.1", 200),
        ("[::1]:8700", 200),
        ("LOCALHOST", 200),
        ("evil.example", 421),
        ("evil.example:8700", 421),
        ("127.0.0.1.evil.example", 421),
        ("localhost.evil.example", 421),
        ("", 421),
    ],
)
async def test_only_this_machines_names_are_answered(
    plugins: Path, data_dir: Path, host: str, status: int
) -> None:
    write_honest(plugins)
    async with serving(plugins, data_dir) as lab:
        answered, body = await lab.get("/v1/plugins", Host=host)
    assert answered == status
    assert status == 200 or body["reason_code"] == "misdirected_request"


@pytest.mark.parametrize("origin", ["https://evil.example", "null", "http://127.0.0.1:1", "http://[", "file://"])
async def test_pages_of_other_sites_are_refused(plugins: Path, data_dir: Path, origin: str) -> None:
    write_honest(plugins)
    async with serving(plugins, data_dir) as lab:
        path = "/v1/plugins/honest/tools/echo/run"
        async with lab.http.post(path, headers={"Origin": origin}) as response:
            assert (response.status, (await response.json())["reason_code"]) == (403, "forbidden")
        own = f"http://{lab.http.host}:{lab.http.port}"
        async with lab.http.post(path, headers={"Origin": own}) as response:
            assert response.status == 200


async def test_a_token_guards_everything_but_the_bare_probes(plugins: Path, data_dir: Path) -> None:
    write_honest(plugins)
    async with serving(plugins, data_dir, token="s3cret") as lab:
        concrete = {
            route.path.replace("{name}", "honest").replace("{tool}", "echo"): route.method
            for route in all_routes()
        }
        for path, method in concrete.items():
            async with lab.http.request(method, path) as response:
                if path in ("/livez", "/readyz"):
                    assert response.status == 200, path
                    continue
                assert response.status == 401, path
                assert response.headers["WWW-Authenticate"].startswith("Bearer")
                assert (await response.json())["reason_code"] == "unauthorized"
        assert (await lab.get("/readyz?verbose"))[0] == 401
        for wrong in ("Bearer s3cre", "Bearer s3cret2", "Basic s3cret", "s3cret", "Bearer é"):
            assert (await lab.get("/v1/plugins", Authorization=wrong))[0] == 401
        assert (await lab.get("/v1/plugins", Authorization="Bearer s3cret"))[0] == 200
        assert (await lab.get("/v1/plugins", Authorization="bearer s3cret"))[0] == 200
        assert (await lab.get("/v1/plugins", Authorization="Bearer s3cret", Host="evil.example"))[0] == 421


async def test_a_fault_of_our_own_is_a_counted_503(
    plugins: Path, data_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_honest(plugins)
    async with Engine(settings_for(plugins, data_dir)) as engine, client_of(engine) as http:

        def broken(_name: str) -> None:
            raise KeyError("a bug of ours")

        monkeypatch.setattr(engine, "describe", broken)
        async with http.get("/v1/plugins/honest", headers={"X-Request-Id": "mine"}) as response:
            body = await response.json()
            assert (response.status, body["reason_code"], body["request_id"]) == (503, "engine_fault", "mine")
        assert "a bug of ours" not in json.dumps(body)
        assert {name: fault.count for name, fault in engine.faults.items()} == {"http GET /v1/plugins/{name}": 1}


async def test_the_table_is_all_there_is(plugins: Path, data_dir: Path) -> None:
    engine = Engine(settings_for(plugins, data_dir))
    app = create_app(engine, Tokens(engine.settings))
    registered = {(route.method, route.resource.canonical) for route in app.router.routes() if route.resource}
    table = {(route.method, route.path) for route in all_routes()}
    assert {entry for entry in registered if entry[0] != "HEAD"} == table
    assert app[ENGINE] is engine
