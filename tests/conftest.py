"""What every test stands on: a guard against a blocked event loop, folders of its own, the contract's summary."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from blockbuster import BlockBuster, blockbuster_ctx
from contract import MARKER, Summary
from leftovers import Leftovers

pytest.register_assert_rewrite("zoo")


def pytest_configure(config: pytest.Config) -> None:
    """Know the marker, and sum it up in the end."""
    config.addinivalue_line("markers", MARKER)
    config.pluginmanager.register(Summary(), "contract-summary")
    # A folder for temporary files that nobody else writes to: what is left in it was left by a test.
    os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", tempfile.gettempdir())  # where `tmp_path` goes on to be
    temp = tempfile.mkdtemp(prefix="hf-")
    Path(temp).chmod(0o1777)  # some tests run as another user
    os.environ["TMPDIR"] = tempfile.tempdir = temp
    config.add_cleanup(lambda: shutil.rmtree(temp, ignore_errors=True))


@pytest.fixture(autouse=True)
def blockbuster() -> Iterator[BlockBuster]:
    """Fails a test in which the engine's own code blocks the event loop."""
    with blockbuster_ctx(["engine", "events"]) as guard:
        yield guard


@pytest.fixture(autouse=True)
def nothing_left_behind() -> Iterator[None]:
    """Fails a test after which a process, a descriptor, a temporary file or shared memory is left."""
    before = Leftovers.now()
    yield
    end_s = time.monotonic() + 10.0  # a process that was killed is gone in a moment, not at once
    while (left := Leftovers.now().since(before)) and time.monotonic() < end_s:
        time.sleep(0.02)
    assert not left, left


@pytest.fixture
def plugins(tmp_path: Path) -> Path:
    """An empty plugins folder."""
    folder = tmp_path / "plugins"
    folder.mkdir()
    return folder


@pytest.fixture
def data_dir(tmp_path: Path) -> Path:
    """A data folder that does not exist yet."""
    return tmp_path / "data"
