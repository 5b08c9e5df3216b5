"""A folder that a plugin filled is removed, whatever is in it, and nothing beside it is."""

from __future__ import annotations

import os
import resource
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from support import hosting, open_descriptors, until, write_honest, write_plugin

from engine import Engine
from engine.sandbox import trees
from engine.sandbox.trees import remove_tree

NOBODY = 65534
NESTS = """
import os
class Plugin:
    def __init__(self, context): self.scratch = context.scratch
    def validate(self): pass
    def nests(self, depth: int) -> str:
        os.chdir(self.scratch)
        for _ in range(depth):
            os.mkdir("d")
            os.chdir("d")
        os.chdir("/")
        return str(self.scratch)
"""


def nest(root: Path, depth: int) -> None:
    """Folders in folders, each with a file, by descriptor: no path is long enough."""
    root.mkdir()
    at = os.open(root, os.O_RDONLY)
    for _ in range(depth):
        os.mkdir("d", dir_fd=at)
        os.close(os.open("file", os.O_CREAT | os.O_WRONLY, dir_fd=at))
        below = os.open("d", os.O_RDONLY, dir_fd=at)
        os.close(at)
        at = below
    os.close(at)


@contextmanager
def few_descriptors() -> Iterator[None]:
    """No more than a handful beyond those that are open."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    highest = max(int(name) for name in os.listdir("/proc/self/fd"))  # noqa: PTH208 - names, and no files
    resource.setrlimit(resource.RLIMIT_NOFILE, (highest + 8, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_a_folder_nested_3000_deep_is_removed_with_a_handful_of_descriptors(tmp_path: Path) -> None:
    root, before = tmp_path / "scratch", open_descriptors()
    nest(root, 3000)
    with few_descriptors():
        assert remove_tree(root) == []
    assert not root.exists()
    assert open_descriptors() == before


def test_what_links_point_to_outside_stays(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    (outside / "folder").mkdir(parents=True)
    (outside / "kept").write_text("kept")
    mode = stat.S_IMODE(outside.stat().st_mode)
    root = tmp_path / "scratch"
    (root / "a" / "b").mkdir(parents=True)
    for place in (root, root / "a", root / "a" / "b"):
        (place / "folder_link").symlink_to(outside)
        (place / "file_link").symlink_to(outside / "kept")
        (place / "dangling").symlink_to(tmp_path / "nothing")
        os.link(outside / "kept", place / "hard")
        os.mkfifo(place / "pipe")
    assert remove_tree(root) == []
    assert not root.exists()
    assert sorted(path.name for path in outside.iterdir()) == ["folder", "kept"]
    assert ((outside / "kept").read_text(), (outside / "kept").stat().st_nlink) == ("kept", 1)
    assert stat.S_IMODE(outside.stat().st_mode) == mode


def test_a_link_in_the_place_of_the_folder_is_removed_and_not_followed(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "kept").touch()
    link = tmp_path / "scratch"
    link.symlink_to(outside)
    assert remove_tree(link) == []
    assert not link.is_symlink()
    assert (outside / "kept").exists()


def test_a_file_in_the_place_of_the_folder_is_removed_and_none_is_no_trouble(tmp_path: Path) -> None:
    (tmp_path / "scratch").touch()
    assert remove_tree(tmp_path / "scratch") == []
    assert remove_tree(tmp_path / "scratch") == []
    assert remove_tree(tmp_path / "no" / "scratch") == []
    assert not list(tmp_path.iterdir())


def test_many_files_and_folders_of_the_same_names_are_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trees, "_MOVED_AT_ONCE", 3)
    root = tmp_path / "scratch"
    for number in range(20):
        for name in ("same", "same\n", "-f", "a" * 255, os.fsdecode(b"\xff")):
            folder = root / str(number % 3) / str(number) / name / "same" / "same"
            folder.mkdir(parents=True)
            (folder / "same").touch()
    for number in range(5000):
        (root / f"file-{number}").touch()
    assert remove_tree(root) == []
    assert not root.exists()


def test_folders_without_permissions_are_removed_by_who_owns_them(tmp_path: Path) -> None:
    """As another user where this is root, whom permissions do not stop."""
    root = tmp_path / "scratch"
    locked = [root, root / "a", root / "a" / "b", root / "a" / "b" / "c", root / "empty"]
    for folder in locked:
        folder.mkdir()
        (folder / "file").touch()
    if os.geteuid() == 0:
        for each in (tmp_path, root, *root.rglob("*")):
            os.chown(each, NOBODY, NOBODY)
    for mode, folder in zip((0o500, 0o000, 0o100, 0o400, 0o000), reversed(locked), strict=True):
        folder.chmod(mode)
    if (pid := os.fork()) == 0:
        left = ["nothing was tried"]
        try:
            at = os.open(tmp_path, os.O_RDONLY)
            if os.geteuid() == 0:
                os.setresuid(NOBODY, NOBODY, NOBODY)
            left = remove_tree(Path(f"/proc/self/fd/{at}/scratch"))  # the way there may not be nobody's
        finally:
            os._exit(len(left))
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert not list(tmp_path.iterdir())


def test_what_cannot_be_removed_is_told_and_the_rest_is_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "scratch"
    for name in ("a", "b"):
        (root / name / "c").mkdir(parents=True)
        (root / name / "c" / name).touch()
    real = os.unlink

    def unlink(name: str, *, dir_fd: int) -> None:
        if name == "b":
            raise PermissionError(1, "Operation not permitted")
        real(name, dir_fd=dir_fd)

    monkeypatch.setattr(os, "unlink", unlink)
    left = remove_tree(root)
    assert left[0] == "'b': Operation not permitted"
    assert [path.name for path in root.rglob("*") if path.is_file()] == ["b"]
    monkeypatch.undo()
    assert remove_tree(root) == []
    assert not root.exists()


async def test_a_plugin_that_nests_its_scratch_folder_deep_stops_no_restart_no_close_and_no_next_engine(
    plugins: Path, data_dir: Path
) -> None:
    write_plugin(plugins, "nesting", NESTS, ["nests"])
    write_honest(plugins)
    async with hosting(plugins, data_dir) as engine:
        first = await nested(engine)
        assert (await engine.restart("nesting")).state == "INITIALIZED"
        await until(lambda: not first.exists())
        second = await nested(engine)
        assert (await engine.run("honest", "echo", {"text": "fine"})).value == "fine"
        process = engine._spawner._process
        assert process is not None
    assert process.returncode == 0
    assert not second.exists()
    assert not list((data_dir / "scratch").iterdir())
    nest(data_dir / "scratch" / "stale", 1300)  # of an engine that went down with the machine
    async with hosting(plugins, data_dir) as engine:
        assert not (data_dir / "scratch" / "stale").exists()
        assert (await engine.run("honest", "echo", {"text": "back"})).value == "back"
    assert not list((data_dir / "scratch").iterdir())


async def nested(engine: Engine) -> Path:
    """The scratch folder that the plugin has nested."""
    outcome = await engine.run("nesting", "nests", {"depth": 1300})
    assert isinstance(outcome.value, str)
    assert (Path(outcome.value) / "d" / "d").exists()
    return Path(outcome.value)
