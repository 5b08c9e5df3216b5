"""What is shipped: the wheel and its dependencies, the lock, and the gates that a change passes."""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
import tomllib
import zipfile
from importlib.metadata import packages_distributions
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
PACKAGES = {"engine": ROOT / "engine", "events": ROOT / "events", "engine/_bundled": ROOT / "plugins"}


ENVIRONMENT = {name: value for name, value in os.environ.items() if not name.startswith("HOLDFAST_")}


def python(*words: str | Path, cwd: Path, env: dict[str, str] | None = None) -> str:
    """Run Python to its end; its stdout."""
    ran = subprocess.run(
        [sys.executable, *words],
        cwd=cwd,
        env={**ENVIRONMENT, **(env or {})},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=50,
        check=False,
    )
    assert ran.returncode in (0, 1), ran.stderr
    return ran.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of this checkout."""
    folder = tmp_path_factory.mktemp("wheel")
    options = ("--no-deps", "--no-build-isolation", "--no-index", "--disable-pip-version-check", "--quiet")
    python("-m", "pip", "wheel", ROOT, *options, "--wheel-dir", folder, cwd=folder)
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path) -> Path:
    """A folder that holds the installed wheel and nothing else."""
    folder = wheel.parent / "installed"
    options = ("--no-deps", "--no-index", "--disable-pip-version-check", "--quiet")
    python("-m", "pip", "install", *options, "--target", folder, wheel, cwd=wheel.parent)
    return folder


def is_shipped(path: Path) -> bool:
    """Whether a file of the checkout belongs in the wheel."""
    return path.is_file() and "__pycache__" not in path.parts and "_bundled" not in path.parts


def test_wheel_holds_the_packages_and_the_bundled_plugins_and_nothing_else(wheel: Path) -> None:
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    shipped = {
        f"{place}/{path.relative_to(folder).as_posix()}"
        for place, folder in PACKAGES.items()
        for path in folder.rglob("*")
        if is_shipped(path)
    }
    assert names == shipped
    assert {"engine/py.typed", "engine/_bundled/motion_tracker/plugin.toml"} <= names


def test_installed_holdfast_has_its_bundled_plugins_in_any_folder(installed: Path, tmp_path: Path) -> None:
    env = {"PYTHONPATH": str(installed)}
    script = installed / "bin" / "holdfast"
    home = python("-c", "import engine; print(engine.__file__)", cwd=tmp_path, env=env)
    assert Path(home.strip()).is_relative_to(installed)
    assert python(script, "--version", cwd=tmp_path, env=env) == f"holdfast {PROJECT['version']}\n"
    plugins = {
        plugin["name"]: plugin for plugin in json.loads(python(script, "check", "--json", cwd=tmp_path, env=env))
    }
    assert plugins.keys() == {"motion_tracker", "video_tracker"}
    assert plugins["motion_tracker"]["state"] == "INITIALIZED", plugins["motion_tracker"]["reason"]


def test_installed_server_serves_from_any_folder(installed: Path, tmp_path: Path) -> None:
    process = subprocess.Popen(
        [installed / "bin" / "holdfast", "serve", "--port", "0", "--data", "data"],
        cwd=tmp_path,
        env={**ENVIRONMENT, "PYTHONPATH": str(installed)},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    try:
        assert re.search(r"serves at http://127\.0\.0\.1:\d+$", process.stdout.readline().rstrip())
        process.stdout.readline()
        rows = [process.stdout.readline().split()[:2] for _ in range(2)]
        assert ["motion_tracker", "INITIALIZED"] in rows
    finally:
        process.terminate()
        assert process.wait(30) == 0
        process.stdout.close()


# Dependencies.


def imported() -> set[str]:
    """The distributions whose packages the engine imports, wherever in its code."""
    distributions = packages_distributions()
    found: set[str] = set()
    for path in [*(ROOT / "engine").rglob("*.py"), *(ROOT / "events").rglob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and not node.level:
                names = [node.module or ""]
            for name in names:
                top = name.partition(".")[0]
                if top not in sys.stdlib_module_names and top not in ("engine", "events"):
                    found |= {canonicalize_name(owner) for owner in distributions[top]}
    return found


def test_dependencies_are_those_that_the_code_imports() -> None:
    declared = {canonicalize_name(Requirement(text).name) for text in PROJECT["dependencies"]}
    assert imported() - {"torch"} == declared  # torch: only the GPU check's throw-away child, where there is one


def locked() -> dict[str, str]:
    """Name → version, from the lock."""
    lines = (ROOT / "requirements.lock").read_text().splitlines()
    pins = [line for line in lines if not line.startswith("#")]
    assert all(re.fullmatch(r"[\w.-]+==[\w.]+", line) for line in pins), "only exact versions: no hosts, no paths"
    return {canonicalize_name(name): version for name, _, version in (line.partition("==") for line in pins)}


def test_lock_pins_every_requirement_to_a_version_that_fits() -> None:
    pins = locked()
    extras = PROJECT["optional-dependencies"]
    for text in [*PROJECT["dependencies"], *extras["vision"], *extras["torch"], *extras["dev"]]:
        requirement = Requirement(text)
        assert requirement.specifier.contains(pins[canonicalize_name(requirement.name)]), text
    assert pins["torch"] == "2.13.0"


# Gates.


def test_ci_run_is_executable_and_stops_at_the_first_failure() -> None:
    path = ROOT / ".ci" / "run"
    text = path.read_text()
    assert os.access(path, os.X_OK)
    assert "set -euo pipefail" in text
    assert text.index("make check") < text.index("make test")


def test_pre_commit_runs_the_checks_and_the_tests() -> None:
    text = (ROOT / ".pre-commit-config.yaml").read_text()
    assert re.findall(r"entry: (.*)", text) == ["make check", "make test"]
    assert "repo: local" in text


def test_pull_requests_tick_every_item_of_the_contract() -> None:
    text = (ROOT / ".github" / "pull_request_template.md").read_text()
    assert re.findall(r"^- \[ \] \*\*(\d)\.", text, re.MULTILINE) == [str(n) for n in range(1, 10)]


def test_nothing_names_a_package_index_or_a_machine() -> None:
    places = ["Makefile", "pyproject.toml", "requirements.lock", ".ci/run", ".ci/venv", ".ci/lock"]
    places += [".pre-commit-config.yaml", ".github/workflows/ci.yml"]
    for place in places:
        found = re.findall(
            r"index-url|find-links|trusted-host|file://|/root/|/home/|/work/", (ROOT / place).read_text()
        )
        assert not found, place
