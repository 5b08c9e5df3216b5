"""Settings: where they come from, which source wins, and what a wrong one says."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import pytest

from engine import settings_page
from engine.errors import SetupError
from engine.settings import Settings, load

DOCS = Path(__file__).resolve().parent.parent / "docs" / "settings.md"


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A working directory of the test's own: the checkout may have a holdfast.toml."""
    monkeypatch.chdir(tmp_path)


def config(text: str) -> Path:
    """A file of settings that is not the default one."""
    path = Path("other.toml")
    path.write_text(text)
    return path


def refusal(*args: Any, **kwargs: Any) -> str:
    """What `load` says when it refuses: one line."""
    with pytest.raises(SetupError) as caught:
        load(*args, **{"env": {}, **kwargs})
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_nothing_given_is_the_defaults() -> None:
    assert load(env={"PATH": "/bin"}) == Settings()


def test_flags_win_over_variables_over_the_file_over_defaults() -> None:
    Path("holdfast.toml").write_text("port = 1\nhost = 'a'\ndrain_s = 1\n")
    loaded = load({"port": 3}, env={"HOLDFAST_PORT": "2", "HOLDFAST_HOST": "b"})
    assert (loaded.port, loaded.host, loaded.drain_s, loaded.bundled) == (3, "b", 1.0, True)


def test_a_named_file_replaces_the_one_in_the_working_directory() -> None:
    Path("holdfast.toml").write_text("port = 1\n")
    assert load(env={}, file=config("host = 'a'")).port == Settings().port


@pytest.mark.parametrize(
    ("variable", "text", "value"),
    [
        ("HOLDFAST_PLUGIN_DIRS", os.pathsep.join(["a", "~/b", ""]), (Path("a"), Path.home() / "b")),
        ("HOLDFAST_PLUGIN_DIRS", "", ()),
        ("HOLDFAST_DATA_DIR", "~/data", Path.home() / "data"),
        ("HOLDFAST_BUNDLED", "false", False),
        ("HOLDFAST_BUNDLED", "1", True),
        ("HOLDFAST_DRAIN_S", "2.5", 2.5),
        ("HOLDFAST_DRAIN_S", "2", 2.0),
        ("HOLDFAST_TOKEN", "123", "123"),
    ],
)
def test_variables_are_text_of_the_settings_type(variable: str, text: str, value: object) -> None:
    loaded = load(env={variable: text})
    assert getattr(loaded, variable.removeprefix("HOLDFAST_").lower()) == value


@pytest.mark.parametrize(
    ("env", "said"),
    [
        ({"HOLDFAST_PORT": "x"}, "environment: HOLDFAST_PORT wants a whole number from 0 to 65,535, got 'x'"),
        ({"HOLDFAST_PRT": "1"}, "environment: there is no setting `HOLDFAST_PRT`; did you mean `HOLDFAST_PORT`?"),
        ({"HOLDFAST_ZZZ": "1"}, "environment: there is no setting `HOLDFAST_ZZZ`; see docs/settings.md"),
        ({"HOLDFAST_BUNDLED": "maybe"}, "environment: HOLDFAST_BUNDLED wants true or false, got 'maybe'"),
        ({"HOLDFAST_DRAIN_S": "nan"}, "environment: HOLDFAST_DRAIN_S wants a number from 0 to 86,400, got 'nan'"),
        ({"HOLDFAST_DATA_DIR": ""}, "environment: HOLDFAST_DATA_DIR wants a path, got ''"),
        ({"HOLDFAST_DATA_DIR": "~nobody-at-all/x"}, "environment: HOLDFAST_DATA_DIR wants a path"),
    ],
)
def test_a_wrong_variable_is_named_with_what_it_wants(env: dict[str, str], said: str) -> None:
    assert refusal(env=env).startswith(said)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("port = 'x'", "other.toml: `port` wants a whole number from 0 to 65,535, got 'x'"),
        ("port = true", "other.toml: `port` wants a whole number from 0 to 65,535, got True"),
        ("stop_grace_s = -1", "other.toml: `stop_grace_s` wants a number from 0 to 86,400, got -1"),
        ("plugin_dirs = 'x'", "other.toml: `plugin_dirs` wants a list of paths, got 'x'"),
        ("prt = 1", "other.toml: there is no setting `prt`; did you mean `port`?"),
        ("[server]\nport = 1", "other.toml: there is no setting `server`"),
        ("port = ", "other.toml: it is not TOML"),
    ],
)
def test_a_wrong_file_is_named_with_the_key(text: str, said: str) -> None:
    assert refusal(file=config(text)).startswith(said)


def test_a_file_that_is_absent_or_unreadable_is_named() -> None:
    assert refusal(file=Path("none.toml")).startswith("none.toml: there is no such file")
    assert refusal(file=Path()).startswith(".: it cannot be read")
    Path("latin.toml").write_bytes(b"host = '\xe9'")
    assert refusal(file=Path("latin.toml")).startswith("latin.toml: it is not UTF-8")


def test_a_wrong_flag_is_named_as_it_is_typed() -> None:
    assert refusal({"port": 70000}).startswith("flag --port wants")
    assert refusal({"data_dir": "\0"}).startswith("flag --data wants a path")
    assert refusal({"plugin_dirs": 1}).startswith("flag --plugins wants a list of paths")


def test_a_wrong_token_is_not_repeated() -> None:
    for said in (
        refusal(env={"HOLDFAST_TOKEN": "two words"}),
        refusal(file=config("token = 'two words'")),
        refusal({"token": ["two words"]}),
    ):
        assert "two words" not in said
        assert "visible ASCII" in said


def test_no_home_folder_is_a_setup_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_home() -> Path:
        raise RuntimeError

    monkeypatch.setattr(Path, "home", no_home)
    monkeypatch.delenv("XDG_STATE_HOME", raising=False)
    assert "--data DIR" in refusal()
    assert load({"data_dir": "x"}, env={}).data_dir == Path("x")


def test_every_setting_is_documented_and_the_page_is_fresh() -> None:
    page = DOCS.read_text()
    assert page == settings_page.page(), "run: make docs"
    assert set(re.findall(r"^\| `(\w+)` \|", page, re.MULTILINE)) == set(Settings.__struct_fields__)


def test_defaults_satisfy_their_own_bounds() -> None:
    values = {name: getattr(Settings(), name) for name in Settings.__struct_fields__}
    assert load({name: value for name, value in values.items() if value is not None}, env={}) == Settings()
