"""Finding plugins: in order, by unique names, every broken one visible, nothing imported."""

from __future__ import annotations

import hashlib
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from engine.errors import ReasonCode, SetupError
from engine.loader.discovery import Candidate, discover, reread

NAME = re.compile(r"[a-z][a-z0-9_-]{0,63}(@[0-9a-f]{8,})?")


def plugin(folder: Path, name: str | None = None, *, extra: str = "") -> Path:
    """A plugin's folder whose code must never be imported by discovery."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "plugin.py").write_text("raise SystemExit('imported')\n")
    (folder / "plugin.toml").write_text(
        f'name = "{name or folder.name}"\nversion = "1"\nentry = "plugin:P"\n{extra}[tools.run]\n'
    )
    return folder


def found(*dirs: Path, bundled: Path | None = None, entry_points: bool = False) -> list[Candidate]:
    candidates = discover(dirs, bundled=bundled, entry_points=entry_points)
    names = [candidate.name for candidate in candidates]
    assert len(names) == len(set(names))
    for candidate in candidates:
        assert NAME.fullmatch(candidate.name)
        assert (candidate.problem is not None) == (
            candidate.manifest is None or candidate.name_taken_by is not None
        )
        assert candidate.problem is None or candidate.problem.reason_code is ReasonCode.MANIFEST_INVALID
    return candidates


def reason(candidate: Candidate) -> str:
    assert candidate.problem is not None
    return candidate.problem.reason


def digest(folder: Path) -> str:
    return hashlib.sha256(os.fsencode(folder.resolve())).hexdigest()[:8]


def test_the_order_is_bundled_then_given_folders_then_by_name(tmp_path: Path) -> None:
    for path in ("bundled/z", "bundled/a", "two/c", "two/b", "one/d"):
        plugin(tmp_path / path)
    candidates = found(tmp_path / "two", tmp_path / "one", bundled=tmp_path / "bundled")
    assert [candidate.name for candidate in candidates] == ["a", "z", "b", "c", "d"]
    assert all(candidate.problem is None for candidate in candidates)
    assert candidates[0].folder == (tmp_path / "bundled/a").resolve()


def test_a_given_folder_may_itself_be_a_plugin(tmp_path: Path) -> None:
    plugin(tmp_path / "solo")
    plugin(tmp_path / "solo" / "nested")
    assert [candidate.name for candidate in found(tmp_path / "solo")] == ["solo"]


def test_what_is_no_plugin_is_skipped_silently(tmp_path: Path) -> None:
    plugin(tmp_path / ".hidden")
    plugin(tmp_path / "__pycache__")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "x.bin").write_bytes(b"x")
    (tmp_path / "README.md").write_text("about")
    os.mkfifo(tmp_path / "pipe")
    assert found(tmp_path) == []


def test_a_folder_reached_twice_is_listed_once(tmp_path: Path) -> None:
    real = plugin(tmp_path / "real" / "a")
    (tmp_path / "links").mkdir()
    (tmp_path / "links" / "again").symlink_to(real)
    candidates = found(tmp_path / "real", tmp_path / "links", tmp_path / "real", real)
    assert [(candidate.name, candidate.folder) for candidate in candidates] == [("a", real.resolve())]


def test_a_link_to_a_folder_elsewhere_is_followed(tmp_path: Path) -> None:
    real = plugin(tmp_path / "elsewhere" / "a")
    (tmp_path / "plugins").mkdir()
    (tmp_path / "plugins" / "x").symlink_to(real)
    (candidate,) = found(tmp_path / "plugins")
    assert (candidate.name, candidate.folder, candidate.problem) == ("a", real.resolve(), None)


def test_the_first_of_one_name_serves_and_the_others_name_both_folders(tmp_path: Path) -> None:
    first, second, third = (plugin(tmp_path / place / "p", "twin") for place in ("a", "b", "c"))
    candidates = found(tmp_path / "a", tmp_path / "b", tmp_path / "c")
    assert [candidate.name for candidate in candidates] == [
        "twin", f"twin@{digest(second)}", f"twin@{digest(third)}",
    ]  # fmt: skip
    assert candidates[0].problem is None
    for candidate, folder in zip(candidates[1:], (second, third), strict=True):
        assert candidate.manifest is not None
        assert str(first.resolve()) in reason(candidate)
        assert str(folder.resolve()) in reason(candidate)
        assert "rename or remove one of them" in reason(candidate)


def test_a_broken_manifest_is_visible_under_the_name_it_states(tmp_path: Path) -> None:
    plugin(tmp_path / "folder", "stated", extra="zzz = 1\n")
    (candidate,) = found(tmp_path)
    assert candidate.name == "stated"
    assert "plugin.toml, line 4: key `zzz` is not known" in reason(candidate)


@pytest.mark.parametrize(
    ("folder", "name"),
    [
        ("My Plugin", "my_plugin"),
        ("3d-view", "d-view"),
        ("42", "plugin"),
        ("größe", "gr__e"),
        ("x" * 90, "x" * 64),
        (os.fsdecode(b"bad\xff"), "bad_"),
    ],
)
def test_a_manifest_without_a_readable_name_is_listed_by_its_folder(
    tmp_path: Path, folder: str, name: str
) -> None:
    (tmp_path / folder).mkdir()
    (tmp_path / folder / "plugin.toml").write_text("[[[")
    (candidate,) = found(tmp_path)
    assert candidate.name == name
    assert reason(candidate).isprintable()


def test_a_folder_that_no_text_can_name_is_a_problem_of_its_own(tmp_path: Path) -> None:
    plugin(tmp_path / os.fsdecode(b"bad\xff") / "p", "stated")
    (candidate,) = found(tmp_path / os.fsdecode(b"bad\xff"))
    assert (candidate.name, candidate.manifest) == ("stated", None)
    assert reason(candidate).isprintable()
    assert "is not UTF-8; rename it" in reason(candidate)


def test_a_broken_plugin_of_a_taken_name_gets_a_name_of_its_own(tmp_path: Path) -> None:
    first = plugin(tmp_path / "a" / "p", "twin")
    second = plugin(tmp_path / "b" / "p", "twin", extra="zzz = 1\n")
    _, broken = found(tmp_path / "a", tmp_path / "b")
    assert broken.name == f"twin@{digest(second)}"
    assert "key `zzz` is not known" in reason(broken)
    assert f"belongs to the plugin in {first.resolve()}" in reason(broken)


def test_a_broken_folder_does_not_take_a_name_that_a_later_manifest_states(tmp_path: Path) -> None:
    broken = tmp_path / "a" / "Twin"
    broken.mkdir(parents=True)
    (broken / "plugin.toml").write_text("[[[")
    plugin(tmp_path / "b" / "p", "twin")
    names = [(candidate.name, candidate.problem is None) for candidate in found(tmp_path / "a", tmp_path / "b")]
    assert names == [(f"twin@{digest(broken)}", False), ("twin", True)]


def test_what_looks_like_a_plugin_but_cannot_be_read_is_listed_with_its_problem(tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "moved").symlink_to("nowhere")
    (tmp_path / "upper").mkdir()
    (tmp_path / "upper" / "Plugin.toml").write_text("")
    (tmp_path / "piped").mkdir()
    os.mkfifo(tmp_path / "piped" / "plugin.toml")
    reasons = {candidate.name: reason(candidate) for candidate in found(tmp_path)}
    assert reasons.keys() == {"loop", "nowhere", "upper", "piped"}
    assert "too many levels of symbolic links" in reasons["loop"]
    assert "moved is a link to" in reasons["nowhere"]
    assert "Plugin.toml must be named plugin.toml; rename it" in reasons["upper"]
    assert "is a named pipe" in reasons["piped"]


@contextmanager
def unprivileged() -> Iterator[None]:
    """Without root's right to read everything, where the tests run as root."""
    before = os.geteuid()
    if before == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(before)


@pytest.fixture
def open_path() -> Iterator[Path]:
    """A folder that another user may reach; pytest's own are private."""
    with TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        yield Path(folder)


def test_a_plugin_that_may_not_be_read_does_not_hide_the_others(open_path: Path) -> None:
    plugin(open_path / "fine")
    plugin(open_path / "secret").chmod(0)
    with unprivileged():
        fine, secret = found(open_path)
    (open_path / "secret").chmod(0o755)
    assert (fine.name, fine.problem) == ("fine", None)
    assert secret.name == "secret"
    assert "permission denied" in reason(secret)


def test_a_plugins_folder_that_cannot_be_used_stops_the_start_with_the_next_step(open_path: Path) -> None:
    (open_path / "file").write_text("")
    (open_path / "secret").mkdir()
    (open_path / "secret").chmod(0)
    with pytest.raises(SetupError, match="does not exist; create it, or correct --plugins"):
        discover([open_path / "nowhere"], bundled=None)
    with pytest.raises(SetupError, match="is a file, not a folder of plugins"):
        discover([open_path / "file"], bundled=None)
    with pytest.raises(SetupError, match="reinstall holdfast or start it with --no-bundled"):
        discover([], bundled=open_path / "nowhere")
    with unprivileged(), pytest.raises(SetupError, match="permission denied"):
        discover([open_path / "secret"], bundled=None)
    (open_path / "secret").chmod(0o755)


# Installed packages


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder like site-packages, on sys.path."""
    site = tmp_path / "site"
    site.mkdir()
    monkeypatch.syspath_prepend(str(site))
    return site


def install(site: Path, dist: str, entry_points: str) -> None:
    info = site / f"{dist}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {dist}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(entry_points)


def package(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "__init__.py").write_text("raise SystemExit('imported')\n")
    return folder


def test_installed_plugins_are_found_without_importing_them(site: Path, tmp_path: Path) -> None:
    plugin(package(site / "hf_alpha"), "alpha")
    package(site / "hf_outer")
    plugin(package(site / "hf_outer" / "inner"), "beta")
    plugin(site / "hf_space" / "part", "gamma")  # a namespace package in a namespace package
    plugin(package(site / "hf_module"), "delta")
    (site / "hf_module" / "code.py").write_text("raise SystemExit('imported')\n")
    install(site, "zz", "[console_scripts]\nx = y:z\n[holdfast.plugins]\nalpha = hf_alpha\nd = hf_module.code:X\n")
    install(site, "aa", "[holdfast.plugins]\nbeta = hf_outer.inner\ngamma = hf_space.part\n")
    install(site, "unrelated", "[console_scripts]\nx = y:z\n")
    candidates = found(entry_points=True)
    assert [candidate.name for candidate in candidates] == ["alpha", "beta", "delta", "gamma"]
    assert all(candidate.problem is None for candidate in candidates)
    assert not any(name.startswith("hf_") for name in sys.modules)
    assert found(entry_points=False) == []


def test_a_folder_that_is_also_installed_is_listed_once_and_folders_come_first(site: Path) -> None:
    folder = plugin(package(site / "hf_alpha"), "alpha")
    install(site, "aa", "[holdfast.plugins]\nalpha = hf_alpha\n")
    assert [candidate.folder for candidate in found(folder, entry_points=True)] == [folder.resolve()]


def test_a_broken_installed_plugin_is_visible(site: Path) -> None:
    package(site / "hf_bare")
    (site / "hf_module.py").write_text("")
    plugin(package(site / "hf_ok"), "fine")
    lines = "gone = hf_gone\nbare = hf_bare\ndeep = hf_module.part\nfine = hf_ok\n"
    install(site, "aa", f"[holdfast.plugins]\n{lines}")
    install(site, "bb", "[holdfast.plugins]\nnot an entry point\n")
    candidates = {candidate.name: candidate for candidate in found(entry_points=True)}
    assert candidates.keys() == {"fine", "hf_gone", "hf_bare", "part", "bb"}
    assert candidates.pop("fine").problem is None
    assert "entry point `gone` of aa names `hf_gone`, in whose folder is no plugin.toml" in reason(
        candidates["hf_gone"]
    )
    assert "reinstall bb" in reason(candidates["bb"])


# A restart reads again


def test_reread_sees_the_manifest_as_it_is_now(tmp_path: Path) -> None:
    folder = plugin(tmp_path / "p")
    (before,) = found(tmp_path)
    assert reread(before) == before
    plugin(folder, extra="requires_gpu = true\n")
    manifest = reread(before).manifest
    assert manifest is not None
    assert manifest.requires_gpu
    plugin(folder, extra="requires_gpu = 7\n")
    broken = reread(before)
    assert "key `requires_gpu`" in reason(broken)
    plugin(folder)
    assert reread(broken) == before


def test_reread_says_what_changed_too_much_to_restart(tmp_path: Path) -> None:
    folder = plugin(tmp_path / "p")
    (before,) = found(tmp_path)
    plugin(folder, "q")
    renamed = reread(before)
    assert (renamed.name, renamed.manifest) == ("p", None)
    assert "now names the plugin `q`, not `p`; restart the engine" in reason(renamed)
    (folder / "plugin.toml").unlink()
    assert "holds no plugin.toml any more; put it back" in reason(reread(before))
    (folder / "plugin.py").unlink()
    folder.rmdir()
    assert "is gone; put it back and restart the plugin" in reason(reread(before))


def test_reread_of_a_name_taken_by_another_stays_out_of_service(tmp_path: Path) -> None:
    plugin(tmp_path / "a" / "p", "twin")
    plugin(tmp_path / "b" / "p", "twin")
    _, second = found(tmp_path / "a", tmp_path / "b")
    assert reread(second) == second
