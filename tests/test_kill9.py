"""Contract 9, and nothing left behind: a server that is killed with SIGKILL under load."""

from __future__ import annotations

from pathlib import Path

import pytest
from kill_harness import rounds


@pytest.mark.contract(9)
@pytest.mark.timeout(120)
async def test_a_killed_server_loses_nothing_that_was_seen_and_leaves_nothing_behind(tmp_path: Path) -> None:
    promise = await rounds(6, tmp_path, seed=9)
    assert not promise.broken
    assert promise.rounds == 6
    assert promise.events_seen > 0
    assert promise.unclean_answers == 0
