"""Packages: present and of the right version, decided without importing anything."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Mapping
from importlib import metadata
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType

import pytest

from engine.errors import Cause, ReasonCode
from engine.loader.checks import check
from engine.loader.dependencies import check_packages
from engine.loader.findings import Finding, combine
from engine.loader.gpu import GpuCheck
from engine.loader.manifest import Manifest, Package


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder like site-packages, on sys.path."""
    site = tmp_path / "site"
    site.mkdir()
    monkeypatch.syspath_prepend(str(site))
    return site


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A plugin's own folder."""
    folder = tmp_path / "plugin"
    folder.mkdir()
    return folder


def module(path: Path) -> None:
    """A module that must not be imported."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("raise SystemExit('imported')\n")


def install(site: Path, dist: str, version: str, *modules: str) -> None:
    for name in modules:
        module(site / name / "__init__.py")
    info = site / f"{dist.replace('-', '_')}-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {dist}\nVersion: {version}\n")
    (info / "top_level.txt").write_text("\n".join(modules))


def needing(*packages: str | Package) -> Manifest:
    return Manifest(name="p", version="1", entry="p:P", packages=packages)


def checked(folder: Path, *packages: str | Package) -> list[tuple[str, str]]:
    findings = check_packages(needing(*packages), folder)
    assert all(finding.check == "packages" for finding in findings)
    return [(finding.reason_code.value, finding.reason) for finding in findings]


CV2 = Package(import_="cv2x", install="opencv-python-headless")


@pytest.mark.parametrize(
    ("package", "reason"),
    [
        ("nowherex", "package `nowherex` is missing; pip install nowherex"),
        ("nowherex>=2", "package `nowherex` is missing; pip install 'nowherex>=2'"),
        (CV2, "package `cv2x` is missing; pip install opencv-python-headless"),
        (
            Package(import_="cv2x", install="opencv-python-headless", version=">=5"),
            "package `cv2x` is missing; pip install 'opencv-python-headless>=5'",
        ),
        ("nowherex.part", "package `nowherex.part` is missing; pip install nowherex"),
        ("json.nowherex", "package `json.nowherex` is missing; pip install json"),
        (
            Package(import_="x1", install="x1 @ git+file:///srv/x1"),
            "package `x1` is missing; pip install 'x1 @ git+file:///srv/x1'",
        ),
    ],
)
def test_a_missing_package_is_named_with_the_command_that_installs_it(
    folder: Path, package: str | Package, reason: str
) -> None:
    assert checked(folder, package) == [("package_missing", reason)]


def test_what_is_there_needs_no_word_and_is_not_imported(site: Path, folder: Path) -> None:
    install(site, "Hf-Pack", "1.2", "hf_pack")
    module(site / "hf_pack" / "sub" / "__init__.py")
    module(site / "hf_pack" / "sub" / "leaf.py")
    module(site / "hf_space" / "inner" / "leaf.py")
    module(site / "hf_single.py")
    wanted = ("hf_pack", "hf_pack.sub.leaf", "hf_space.inner.leaf", "hf_space", "hf_single", "json", "sys")
    assert checked(folder, *wanted) == []
    # Whether a plain module creates others when it runs cannot be told without running it.
    assert checked(folder, "hf_single.moves") == []
    assert not [name for name in sys.modules if name.startswith("hf_")]


@pytest.mark.parametrize(
    ("installed", "wanted", "fits"),
    [
        ("2.1.0", ">=2", True),
        ("2.1.0", ">=2,<3", True),
        ("2.13.0+cpu", "==2.13.0", True),
        ("3.0.0rc1", ">=2", True),
        ("1.26.4", ">=2", False),
        ("not-a-version", ">=2", False),
    ],
)
def test_a_version_that_is_asked_for_is_compared_as_pep_440_says(
    site: Path, folder: Path, installed: str, wanted: str, fits: bool
) -> None:
    install(site, "hf_pack", installed, "hf_pack")
    expected = (
        "package_version",
        f"package `hf_pack` is {installed}, but {wanted.replace('>=2,<3', '<3,>=2')} is needed; "
        f"pip install 'hf_pack{wanted}'",
    )
    assert checked(folder, f"hf_pack{wanted}") == ([] if fits else [expected])


def test_the_version_is_that_of_whichever_distribution_provides_the_module(site: Path, folder: Path) -> None:
    install(site, "hf-cv-gui", "4.0", "hf_cv")
    headless = Package(import_="hf_cv", install="hf-cv-headless", version=">=5")
    ((code, reason),) = checked(folder, headless)
    assert code == "package_version"
    assert "is 4.0, but >=5 is needed; pip install 'hf-cv-headless>=5'" in reason
    install(site, "hf-cv-headless", "5.1")  # and the named one, once there, decides
    assert checked(folder, headless) == []


def test_what_all_distributions_provide_is_read_only_where_the_name_says_too_little(
    site: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(site, "hf-own", "4.1", "hf_own")
    install(site, "hf-other", "4.1", "hf_another")
    looks: list[str] = []
    real = metadata.packages_distributions

    def look() -> Mapping[str, list[str]]:
        looks.append("look")
        return real()

    monkeypatch.setattr(metadata, "packages_distributions", look)
    assert checked(folder, Package(import_="hf_own", install="hf-own", version=">=4")) == []
    assert looks == [], "it takes as long as a start, and keeps the interpreter"
    assert checked(folder, Package(import_="hf_another", install="hf-another", version=">=4")) == []
    assert looks == ["look"]


def test_of_several_providers_the_first_with_a_version_tells_it(site: Path, folder: Path) -> None:
    install(site, "hf-a", "4.0", "hf_two")
    install(site, "hf-b", "4.0", "hf_two")
    for name in "hf_a", "hf_b":
        (site / f"{name}-4.0.dist-info" / "METADATA").write_text(
            f"Name: {name}\n" + ("Version: 4.0\n" * (name == "hf_b"))
        )
    ((_, reason),) = checked(folder, Package(import_="hf_two", version=">=5"))
    assert "is 4.0, but >=5 is needed" in reason


def test_a_version_within_install_counts_too(site: Path, folder: Path) -> None:
    install(site, "hf-cv", "4.0", "hf_cv")
    ((_, reason),) = checked(folder, Package(import_="hf_cv", install="hf-cv>=5"))
    assert "is 4.0, but >=5 is needed; pip install 'hf-cv>=5'" in reason


def test_a_module_of_no_distribution_has_no_known_version(site: Path, folder: Path) -> None:
    module(site / "hf_single.py")
    ((code, reason),) = checked(folder, "hf_single>=2")
    assert (code, "its version is not known, and >=2 is needed" in reason) == ("package_version", True)


def test_the_plugins_own_modules_count_as_present(folder: Path) -> None:
    module(folder / "hf_own" / "__init__.py")
    module(folder / "hf_flat.py")
    assert checked(folder, "hf_own>=7", "hf_flat>=7", "hf_own.missing") == [
        ("package_missing", "package `hf_own.missing` is missing; pip install hf_own")
    ]


def test_a_virtual_environment_inside_the_plugins_folder_is_not_its_own_code(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    site = folder / "venv" / "site"
    site.mkdir(parents=True)
    monkeypatch.syspath_prepend(str(site))
    install(site, "hf_pack", "1.0", "hf_pack")
    assert [code for code, _ in checked(folder, "hf_pack>=2")] == ["package_version"]


def test_a_folder_that_an_uninstall_left_behind_is_no_package(site: Path, folder: Path) -> None:
    (site / "hf_gone" / "__pycache__").mkdir(parents=True)
    (site / "hf_gone" / "data.txt").write_text("left")
    assert [code for code, _ in checked(folder, "hf_gone")] == ["package_missing"]
    module(site / "real" / "hf_gone" / "__init__.py")
    sys.path.append(str(site / "real"))
    try:
        assert checked(folder, "hf_gone") == []
    finally:
        sys.path.remove(str(site / "real"))


def test_what_was_just_installed_is_seen(site: Path, folder: Path) -> None:
    assert [code for code, _ in checked(folder, "hf_pack>=2")] == ["package_missing"]
    install(site, "hf_pack", "2.0", "hf_pack")
    assert checked(folder, "hf_pack>=2") == []


def test_what_the_engine_once_imported_does_not_count(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stale = ModuleType("hf_stale")
    assert stale.__spec__ is None
    monkeypatch.setitem(sys.modules, "hf_stale", stale)
    monkeypatch.setitem(sys.modules, "json", ModuleType("json"))
    assert [reason for _, reason in checked(folder, "hf_stale", "json")] == [
        "package `hf_stale` is missing; pip install hf_stale"
    ]


class BrokenFinder:
    """A finder as a broken editable install leaves one on sys.meta_path."""

    def find_spec(self, name: str, path: object = None, target: object = None) -> ModuleSpec | None:
        raise RuntimeError("broken finder")

    def find_distributions(self, context: object = None) -> object:
        raise RuntimeError("broken finder of distributions")


def test_a_broken_finder_breaks_no_check(site: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(site, "hf_pack", "1.0", "hf_pack")
    monkeypatch.setattr(sys, "meta_path", [BrokenFinder(), object(), *sys.meta_path])
    assert [code for code, _ in checked(folder, "hf_pack", "nowherex", "hf_pack>=2")] == [
        "package_missing", "package_version",
    ]  # fmt: skip


def test_broken_metadata_breaks_no_check(site: Path, folder: Path) -> None:
    install(site, "hf_pack", "1.0", "hf_pack")
    (site / "hf_pack-1.0.dist-info" / "METADATA").write_bytes(b"\xff\xfe")
    ((code, reason),) = checked(folder, "hf_pack>=2")
    assert (code, "its version is not known" in reason) == ("package_version", True)


# Findings together


def test_the_reason_lists_all_findings_and_the_code_is_the_first_in_the_tables_order() -> None:
    findings = [
        Finding("models", ReasonCode.MODEL_MISSING, "model `m` is missing"),
        Finding("packages", ReasonCode.PACKAGE_VERSION, "package `a` is old"),
        Finding("packages", ReasonCode.PACKAGE_MISSING, "package `b` is missing"),
        Finding("gpu", ReasonCode.GPU_ABSENT, "no GPU"),
    ]
    assert combine(findings) == Cause(
        ReasonCode.GPU_ABSENT, "no GPU · package `a` is old · package `b` is missing · model `m` is missing"
    )
    assert combine(findings[:3]).reason_code is ReasonCode.PACKAGE_VERSION
    with pytest.raises(ValueError, match="no findings"):
        combine([])


class KnownGpu(GpuCheck):
    """A machine whose GPU's state is given."""

    def __init__(self, *findings: Finding) -> None:
        super().__init__()
        self.answer = list(findings)
        self.asked: list[bool] = []

    async def findings(self, *, refresh: bool = False) -> list[Finding]:
        self.asked.append(refresh)
        return list(self.answer)


def test_check_runs_all_checks_in_the_tables_order(folder: Path) -> None:
    manifest = Manifest(
        name="p", version="1", entry="p:P", requires_gpu=True, packages=("torchx",), models={"m": "none.pt2"}
    )
    gpu = KnownGpu(Finding("gpu", ReasonCode.GPU_ABSENT, "no GPU"))
    findings = asyncio.run(check(manifest, folder, gpu, refresh_gpu=True))
    assert [finding.check for finding in findings] == ["gpu", "packages", "models"]
    assert gpu.asked == [True]


def test_the_gpu_is_looked_at_only_for_a_plugin_that_requires_one(folder: Path) -> None:
    gpu = KnownGpu(Finding("gpu", ReasonCode.GPU_ABSENT, "no GPU"))
    assert asyncio.run(check(needing("json"), folder, gpu)) == []
    assert gpu.asked == []


def test_a_missing_torch_is_reported_once_as_the_manifest_installs_it(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "path", [str(folder)])
    monkeypatch.setattr(sys, "meta_path", [])
    torch = Package(import_="torch", install="torch==2.13.0")
    manifest = Manifest(name="p", version="1", entry="p:P", requires_gpu=True, packages=(torch,))
    missing = Finding("gpu", ReasonCode.TORCH_MISSING, "package `torch` is missing; pip install torch")
    (finding,) = asyncio.run(check(manifest, folder, KnownGpu(missing)))
    assert (finding.check, finding.reason_code) == ("gpu", ReasonCode.TORCH_MISSING)
    assert finding.reason == "package `torch` is missing; pip install torch==2.13.0"
