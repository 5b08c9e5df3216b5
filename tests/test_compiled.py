"""What a plugin's modules are compiled to is kept beside them, and never outlives an edit."""

from __future__ import annotations

import os
from importlib.util import cache_from_source
from pathlib import Path

import pytest
from support import hosting, import_from, write_plugin

from engine import Engine
from engine.worker import compiled

CODE = """
import helper
from inner import deeper
class Plugin:
    def __init__(self, context): ...
    def validate(self): ...
    def which(self) -> list: return [{!r}, helper.WHICH, deeper.WHICH]
"""


def write(plugins: Path, which: str = "first", helper: int = 1, deeper: int = 1) -> list[Path]:
    """A plugin of three modules, all as old as ever; their files."""
    folder = write_plugin(plugins, "edited", CODE.format(which), ["which"])
    (folder / "inner").mkdir(exist_ok=True)
    modules = [folder / "plugin.py", folder / "helper.py", folder / "inner" / "deeper.py"]
    modules[1].write_text(f"WHICH = {helper}")
    modules[2].write_text(f"WHICH = {deeper}")
    for module in modules:
        os.utime(module, (1, 1))
    return modules


def kept(module: Path) -> Path:
    return Path(cache_from_source(str(module)))


async def answer(engine: Engine) -> object:
    return (await engine.run("edited", "which")).value


@pytest.mark.contract(2)
async def test_an_edit_shows_though_neither_age_nor_size_of_a_file_tells(plugins: Path, data_dir: Path) -> None:
    write(plugins)
    async with hosting(plugins, data_dir) as engine:
        assert await answer(engine) == ["first", 1, 1]
        for edit in (("other", 1, 1), ("other", 2, 1), ("other", 2, 2), ("first", 1, 1)):
            write(plugins, *edit)
            await engine.restart("edited")
            assert await answer(engine) == list(edit)


async def test_what_is_kept_is_what_runs_next(plugins: Path, data_dir: Path) -> None:
    modules = write(plugins)
    async with hosting(plugins, data_dir) as engine:
        assert await answer(engine) == ["first", 1, 1]
        for module in modules:
            assert kept(module).is_file()
        source = modules[1].read_bytes()
        kept(modules[1]).write_bytes(compiled.kept(source, compile("WHICH = 'kept'", modules[1], "exec")))
        await engine.restart("edited")
        assert await answer(engine) == ["first", "kept", 1]


@pytest.mark.parametrize("left", [0, 3, 15, 16, 40])
async def test_what_was_kept_in_part_is_compiled_anew(left: int, plugins: Path, data_dir: Path) -> None:
    modules = write(plugins)
    async with hosting(plugins, data_dir) as engine:
        whole = kept(modules[1]).read_bytes()
        kept(modules[1]).write_bytes(whole[:left])
        assert len(whole) > 40
        await engine.restart("edited")
        assert await answer(engine) == ["first", 1, 1]
        assert kept(modules[1]).read_bytes() == whole


async def test_where_it_cannot_be_kept_a_plugin_is_started_all_the_same(plugins: Path, data_dir: Path) -> None:
    modules = write(plugins)
    for module in modules:
        module.with_name("__pycache__").write_text("not a folder")
    async with hosting(plugins, data_dir) as engine:
        for _ in range(2):
            assert await answer(engine) == ["first", 1, 1]
            await engine.restart("edited")


async def test_a_source_that_does_not_compile_is_told_as_ever_and_nothing_is_kept(
    plugins: Path, data_dir: Path
) -> None:
    modules = write(plugins)
    modules[1].write_bytes(b"WHICH = (")
    async with hosting(plugins, data_dir) as engine:
        health = engine.health("edited")
        assert (health.state, health.reason_code) == ("FAILED", "import_error")
        assert "SyntaxError" in (health.reason or "")
        assert "helper.py:1" in (health.reason or "")
    assert not kept(modules[1]).exists()


async def test_modules_of_other_folders_are_none_of_ours(
    plugins: Path, data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "helper.py").write_text("WHICH = 'elsewhere'")
    import_from(elsewhere, monkeypatch)
    modules = write(plugins)
    modules[1].unlink()
    async with hosting(plugins, data_dir) as engine:
        assert await answer(engine) == ["first", "elsewhere", 1]
    assert not list(elsewhere.rglob("*.pyc"))
    assert kept(modules[0]).is_file()
