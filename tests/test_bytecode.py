"""What a plugin's modules are compiled to is kept beside them, and never outlives an edit."""

from __future__ import annotations

import marshal
import os
import py_compile
import stat
from collections.abc import Callable
from importlib.util import cache_from_source
from pathlib import Path
from py_compile import PycInvalidationMode

import pytest
from support import hosting, import_from, write_plugin

from engine import Engine
from engine.worker import bytecode

CODE = """
import helper
from inner import deeper
class Plugin:
    def __init__(self, context): ...
    def validate(self): ...
    def which(self) -> list: return [{!r}, helper.WHICH, deeper.WHICH]
"""


SHOUTS = """
import sys
from importlib.machinery import FileFinder, SourceFileLoader
class Shouts(SourceFileLoader):
    def get_data(self, path): return super().get_data(path).replace(b"'first'", b"'FIRST'")
make = FileFinder.path_hook((Shouts, [".py"]))
def hook(path):
    if not path.endswith("/edited"): raise ImportError(path)
    return make(path)
hook.__name__ = make.__name__
sys.path_hooks.insert(0, hook)
"""


@pytest.fixture(autouse=True)
def no_objection(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PYTHONDONTWRITEBYTECODE", raising=False)


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


@pytest.mark.contract(2)
@pytest.mark.parametrize("mode", [PycInvalidationMode.TIMESTAMP, PycInvalidationMode.UNCHECKED_HASH])
async def test_what_others_left_behind_hides_no_edit(
    mode: PycInvalidationMode, plugins: Path, data_dir: Path
) -> None:
    for module in write(plugins):
        py_compile.compile(str(module), invalidation_mode=mode)
    write(plugins, "other", 2, 2)
    async with hosting(plugins, data_dir) as engine:
        assert await answer(engine) == ["other", 2, 2]


async def test_what_is_kept_is_what_runs_next(plugins: Path, data_dir: Path) -> None:
    modules = write(plugins)
    async with hosting(plugins, data_dir) as engine:
        assert await answer(engine) == ["first", 1, 1]
        await engine.restart("edited")  # at its worker's end
        for module in modules:
            assert kept(module).is_file()
        source = modules[1].read_bytes()
        kept(modules[1]).write_bytes(
            bytecode.pyc(bytecode.header(source), compile("WHICH = 'kept'", modules[1], "exec"))
        )
        await engine.restart("edited")
        assert await answer(engine) == ["first", "kept", 1]


HEAD_BYTES = 16
DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda _: b"",
    "cut in its head": lambda whole: whole[: HEAD_BYTES - 1],
    "cut after its head": lambda whole: whole[:HEAD_BYTES],
    "cut in its code": lambda whole: whole[: HEAD_BYTES + 24],
    "no code": lambda whole: whole[:HEAD_BYTES] + marshal.dumps(None),
    "zeros": lambda whole: whole[:HEAD_BYTES] + bytes(len(whole) - HEAD_BYTES),
    "of another Python": lambda whole: b"\0\0\r\n" + whole[4:],
}


@pytest.mark.parametrize("how", DAMAGE)
async def test_what_is_kept_and_damaged_is_compiled_anew(how: str, plugins: Path, data_dir: Path) -> None:
    modules = write(plugins)
    async with hosting(plugins, data_dir) as engine:
        await engine.restart("edited")
        whole = kept(modules[1]).read_bytes()
        kept(modules[1]).write_bytes(DAMAGE[how](whole))
        for _ in range(2):
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


async def test_what_cannot_be_kept_is_imported_all_the_same(plugins: Path, data_dir: Path) -> None:
    modules = write(plugins)
    modules[1].write_text("WHICH = 1\ndeep = " + "lambda: " * 1200 + "1")  # deeper than `marshal` goes
    async with hosting(plugins, data_dir) as engine:
        assert await answer(engine) == ["first", 1, 1]
    assert not kept(modules[1]).exists()


async def test_what_is_kept_is_as_private_as_its_source(plugins: Path, data_dir: Path) -> None:
    modules = write(plugins)
    modules[1].chmod(0o400)
    async with hosting(plugins, data_dir):
        pass
    assert stat.S_IMODE(kept(modules[1]).stat().st_mode) == 0o600


async def test_nothing_is_kept_where_the_operator_does_not_want_it(
    plugins: Path, data_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", "1")
    modules = write(plugins)
    async with hosting(plugins, data_dir) as engine:
        assert await answer(engine) == ["first", 1, 1]
    assert not any(kept(module).exists() for module in modules)


async def test_a_path_hook_of_somebodys_own_goes_first(
    plugins: Path, data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import_from(tmp_path / "site", monkeypatch, sitecustomize=SHOUTS)
    write(plugins)
    async with hosting(plugins, data_dir) as engine:
        assert await answer(engine) == ["FIRST", 1, 1]


async def test_a_modules_loader_can_be_pickled_and_compiles_what_it_is_given(
    plugins: Path, data_dir: Path
) -> None:
    code = """
    import os, pickle, helper
    class Plugin:
        def __init__(self, context): ...
        def validate(self): ...
        def which(self) -> list:
            loader = pickle.loads(pickle.dumps(helper.__spec__)).loader
            code = helper.__loader__.source_to_code("1 + 1", "<text>")
            return [type(loader).__name__, loader.path == helper.__file__, code.co_filename, os.listdir()]
    """
    folder = write_plugin(plugins, "edited", code, ["which"])
    (folder / "helper.py").write_text("")
    async with hosting(plugins, data_dir) as engine:
        assert await answer(engine) == ["SourceFileLoader", True, "<text>", []]


async def test_modules_of_other_folders_are_none_of_ours(
    plugins: Path, data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    elsewhere = tmp_path / "elsewhere"
    import_from(elsewhere, monkeypatch, helper="WHICH = 'elsewhere'")
    modules = write(plugins)
    modules[1].unlink()
    beside = plugins.parent / "beside"
    beside.mkdir()
    (beside / "neighbour.py").write_text("")
    by_way_of = "import os, sys; sys.path.append(os.path.dirname(__file__) + '/../../beside'); import neighbour\n"
    modules[0].write_text(by_way_of + modules[0].read_text())
    async with hosting(plugins, data_dir) as engine:
        assert await answer(engine) == ["first", "elsewhere", 1]
    assert not list(elsewhere.rglob("*.pyc"))
    assert not list(beside.rglob("*.pyc"))
    assert kept(modules[0]).is_file()


async def test_a_folder_that_was_moved_with_all_it_has_names_its_new_place(plugins: Path, data_dir: Path) -> None:
    code = """
    class Plugin:
        def __init__(self, context): ...
        def validate(self): ...
        def which(self): raise RuntimeError("here")
    """
    folder = write_plugin(plugins, "edited", code, ["which"])
    async with hosting(plugins, data_dir) as engine:
        assert engine.health("edited").state == "INITIALIZED"
    moved = plugins.with_name("moved")
    moved.mkdir()
    folder.rename(moved / "edited")
    async with hosting(moved, data_dir) as engine:
        outcome = await engine.run("edited", "which")
        assert "plugin.py:5 in `which`" in (outcome.error or "")


async def test_what_else_a_folder_may_have_is_found_as_ever(plugins: Path, data_dir: Path) -> None:
    modules = write(plugins)
    py_compile.compile(str(modules[1]), cfile=str(modules[1].with_suffix(".pyc")))  # without its source
    modules[1].unlink()
    (modules[2].parent / "__init__.py").write_text("from . import deeper")
    async with hosting(plugins, data_dir) as engine:
        assert await answer(engine) == ["first", 1, 1]
