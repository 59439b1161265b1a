"""Gateway, server and worker killed while updates run, unsynced writes lost: nothing acknowledged is lost or doubled,
the incumbent serves again, and no update is left half done. `scripts/bench chaos` does it thirty times.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.chaos import Chaos


@pytest.mark.chaos
@pytest.mark.timeout(600)
def test_five_kills_lose_nothing_and_leave_no_update_half_done(tmp_path: Path) -> None:
    log = Chaos(tmp_path / "deployment", seed=1).run(5, lambda row: print(row))
    assert log.all_problems == []
    assert len(log.kills) == 5
    assert {row.victims for row in log.kills} == {"gateway", "server", "worker", "all"}
    assert sum(row.was_aim_met for row in log.kills) >= 3
    assert all(row.incumbent for row in log.kills)
    assert log.num_acknowledged > 50
    assert [u for u in log.updates if u["verdict"] == "promote"]
