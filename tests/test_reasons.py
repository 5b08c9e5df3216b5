"""Contract 3 and 8: what a plugin that is not in service says about itself, end to end."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from support import hosting, next_event, write_honest, write_plugin

from engine.outcome import Refused
from engine.worker import failure
from events.envelope import PluginLog

PLAIN = """
class Plugin:
    def __init__(self, context): pass
    def validate(self): pass
    def work(self): pass
"""


def with_import(line: str) -> str:
    return f"{line}{PLAIN}"


NOT_FIT = {
    "declared_package": (
        {"code": PLAIN, "head": 'packages = [{ import = "no_such_cv", install = "no-such-opencv" }]'},
        ("UNAVAILABLE", "package_missing"),
        ["package `no_such_cv` is missing", "pip install no-such-opencv"],
    ),
    "undeclared_package": (
        {"code": with_import("import no_such_module.part")},
        ("UNAVAILABLE", "package_missing"),
        ["undeclared_package", "no_such_module", "missing"],
    ),
    "missing_model": (
        {"code": PLAIN, "head": '[models]\ndetector = "detector.pt2"'},
        ("UNAVAILABLE", "model_missing"),
        ["detector", "missing"],
    ),
    "own_module_missing_a_name": (
        {"code": with_import("from collections import no_such_name")},
        ("FAILED", "import_error"),
        ["import raised ImportError", "no_such_name", "plugin.py:1"],
    ),
    "no_such_method": (
        {"code": PLAIN.replace("def work", "def wrok")},
        ("FAILED", "manifest_invalid"),
        ["[tools.work] has no method `work` on plugin:Plugin (did you mean `wrok`?); mend it"],
    ),
    "no_such_class": (
        {"code": PLAIN.replace("Plugin", "Plugn")},
        ("FAILED", "import_error"),
        ["plugin.py has no class `Plugin` (did you mean `Plugn`?); mend it"],
    ),
    "no_validate": (
        {"code": PLAIN.replace("validate", "validade")},
        ("FAILED", "validate_failed"),
        ["plugin:Plugin has no method `validate` (did you mean `validade`?); add one"],
    ),
    "called_wrongly_by_holdfast": (
        {"code": PLAIN.replace("self, context", "self")},
        ("FAILED", "init_error"),
        ["takes 1 positional argument but 2 were given; mend it"],  # no line of Holdfast's is named
    ),
    "in_a_library": (
        {
            "code": with_import("import functools, json").replace(
                "def validate(self): pass", 'validate = functools.partial(json.loads, "{")'
            )
        },
        ("FAILED", "validate_failed"),
        [" at decoder.py:", "in `raw_decode`; mend it"],
    ),
    "own_module_broken": (
        {"code": with_import("1 / 0")},
        ("FAILED", "import_error"),
        ["import raised ZeroDivisionError", "plugin.py:1"],
    ),
}


@pytest.mark.contract(3)
@pytest.mark.parametrize("case", list(NOT_FIT))
async def test_the_same_cause_gives_the_same_state_code_and_reason(
    case: str, plugins: Path, data_dir: Path
) -> None:
    spec, (state, code), words = NOT_FIT[case]
    write_plugin(plugins, case, tools=["work"], **spec)
    async with hosting(plugins, data_dir) as engine:
        first = engine.health(case)
        again = await engine.restart(case)
        outcome = await engine.run(case, "work")
    assert (first.state, first.reason_code) == (again.state, again.reason_code) == (state, code)
    assert first.reason is not None
    assert first.reason == again.reason
    assert all(word in first.reason for word in words), first.reason
    assert isinstance(outcome, Refused)
    assert (outcome.state, outcome.reason_code) == (state, code)
    assert first.reason in outcome.error


@pytest.mark.contract(3)
async def test_what_was_missing_is_there_after_it_was_installed_and_the_plugin_restarted(
    plugins: Path, data_dir: Path
) -> None:
    folder = write_plugin(plugins, "hopeful", PLAIN, ["work"], head='packages = ["late_arrival"]')
    async with hosting(plugins, data_dir) as engine:
        assert engine.health("hopeful").state == "UNAVAILABLE"
        (folder / "late_arrival.py").write_text("")
        assert (await engine.restart("hopeful")).state == "INITIALIZED"
        assert engine.health("hopeful").reason is None
        assert engine.health("hopeful").incarnation == 2


@pytest.mark.contract(8)
async def test_a_broken_manifest_is_a_failed_plugin_beside_one_that_serves(plugins: Path, data_dir: Path) -> None:
    write_honest(plugins)
    folder = write_plugin(plugins, "broken", PLAIN, ["work"])
    manifest = (folder / "plugin.toml").read_text()
    (folder / "plugin.toml").write_text(manifest.replace("version", "verzion"))
    async with hosting(plugins, data_dir) as engine:
        broken = engine.health("broken")
        assert (broken.state, broken.reason_code) == ("FAILED", "manifest_invalid")
        assert broken.reason is not None
        assert "verzion" in broken.reason
        assert "version" in broken.reason
        assert "line 2" in broken.reason or ":2" in broken.reason
        assert {health.name for health in engine.plugins()} == {"broken", "honest"}
        assert (await engine.run("honest", "echo")).ok
        assert not (await engine.run("broken", "work")).ok
        (folder / "plugin.toml").write_text(manifest)
        assert (await engine.restart("broken")).state == "INITIALIZED"


@pytest.mark.contract(8)
async def test_two_plugins_of_one_name_are_both_visible(plugins: Path, data_dir: Path) -> None:
    first = write_honest(plugins / "a")
    second = write_honest(plugins / "b")
    async with hosting(plugins / "a", data_dir, plugin_dirs=(plugins / "a", plugins / "b")) as engine:
        serving, other = engine.plugins()
    assert (serving.name, serving.state) == ("honest", "INITIALIZED")
    assert other.name.startswith("honest@")
    assert other.reason is not None
    assert str(first) in other.reason
    assert str(second) in other.reason


REJECTS = """
import json
class Torn(ValueError): pass
class Plugin:
    def __init__(self, context): pass
    def validate(self): pass
    def work(self, kind: str):
        raise {"torn": Torn, "late": late, "json": lambda: json.loads("{")}[kind]()
def late():
    import wave
    return wave.Error()
"""


async def test_a_name_under_rejects_that_means_nothing_is_said_when_the_plugin_starts(
    plugins: Path, data_dir: Path
) -> None:
    fine = [
        "KeyError",
        "Torn",
        "plugin.Torn",
        "json.decoder.JSONDecodeError",
        "wave.Error",
        "wave.Eror",
        "sub.Late",
    ]
    doubted = {
        "ValueErorr": "did you mean `ValueError`?",
        "IOError": "did you mean `OSError`?",
        "json.JSONDecodeError": "did you mean `JSONDecodeError`?",
        "json.nothing.Bad": "correct it",
        "no_such_module.Error": "correct it",
        "print": "correct it",
    }
    folder = write_plugin(plugins, "picky", REJECTS, {"work": f"rejects = {[*fine, *doubted]}"})
    (folder / "sub.py").write_text("class Late(Exception): pass")
    async with hosting(plugins, data_dir) as engine:
        settled = engine.health("picky")
        assert settled.state == "INITIALIZED"
        said = []
        async for event in engine.events():
            if isinstance(event.data, PluginLog):
                assert (event.subject, event.data.level) == ("picky", "warning")
                said.append(event.data.message)
            if event.sequence >= settled.as_of:
                break
        for kind in ("torn", "late", "json"):
            outcome = await engine.run("picky", "work", {"kind": kind})
            assert isinstance(outcome, Refused)
            assert outcome.reason_code == "bad_input"
    assert len(said) == len(doubted)
    for line, (name, step) in zip(said, doubted.items(), strict=True):
        assert line.startswith(f"[tools.work] rejects `{name}`, but no exception is called that")
        assert step in line


async def test_import_hooks_of_a_plugin_do_not_keep_it_from_starting_where_its_rejects_are_doubted(
    plugins: Path, data_dir: Path
) -> None:
    hook = (
        "import sys\nclass Hook:\n    def find_spec(self, *_): raise SystemExit\nsys.meta_path.insert(0, Hook())\n"
    )
    write_plugin(plugins, "hooks", f"{hook}{PLAIN}", {"work": 'rejects = ["nobody.knows.Error"]'})
    async with hosting(plugins, data_dir) as engine:
        assert engine.health("hooks").state == "INITIALIZED"
        said = await next_event(engine, "plugin.log", "hooks")
        assert isinstance(said.data, PluginLog)
        assert said.data.message == "what stands under `rejects` was not looked at: SystemExit"


def test_a_place_is_the_plugins_own_else_that_of_whoever_was_called_and_never_ours(tmp_path: Path) -> None:
    here = sys._getframe()
    name = "test_a_place_is_the_plugins_own_else_that_of_whoever_was_called_and_never_ours"
    assert failure.caller(here, tmp_path) == f"test_reasons.py:{here.f_lineno} in `{name}`"
    assert failure.caller(here, Path(__file__).parent) == f"test_reasons.py:{here.f_lineno} in `{name}`"
    assert failure.caller(None, tmp_path) == "code without a line of Python"
