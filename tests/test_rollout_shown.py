"""What an owner sees of a candidate on live traffic: status, Prometheus, the pages."""

from __future__ import annotations

import time
from pathlib import Path

from prometheus_client import CollectorRegistry, generate_latest

from cltrain import reporting, status
from cltrain.monitoring.prometheus import StoreCollector
from cltrain.registry import aliases
from cltrain.rollout import look
from tests.rollout_parts import AGENT, Trial, trial
from tests.test_report_truth import words


def metrics(made: Trial) -> list[str]:
    registry = CollectorRegistry()
    registry.register(StoreCollector(made.store, AGENT, time.time))
    return [line for line in generate_latest(registry).decode().splitlines() if line.startswith("cltrain_rollout")]


def test_status_and_metrics_show_share_episodes_and_evidence(tmp_path: Path) -> None:
    with trial(tmp_path) as made:
        before = status.read_status(made.rooms.config, made.store)
        assert before["tried"] is None
        assert metrics(made) == []
        made.start()
        made.pairs(3)
        made.recorded(made.episode("incumbent"))
        made.now += 20.0
        look(made.rooms)
        state = status.read_status(made.rooms.config, made.store)
        tried = state["tried"]
        assert (tried["kind"], tried["release"], tried["weight"]) == ("canary", made.candidate, 0.5)
        assert tried["episodes"] == {"candidate": 3, "incumbent": 4}
        assert [one["metric"] for one in tried["metrics"]] == ["faults", "score"]
        (line,) = [line for line in status.lines_of(state) if line.startswith("trying")]
        assert f"{made.candidate} as canary at 0.5 (step 1 of 1)" in line
        assert "3 of its episodes beside 4; faults: e-value of harm 1, of none 1." in line
        shown = metrics(made)
        assert 'cltrain_rollout_weight_ratio{agent="support",kind="canary"} 0.5' in shown
        assert 'cltrain_rollout_episodes{agent="support",arm="candidate"} 3.0' in shown
        assert any(
            line.startswith('cltrain_rollout_e_value{agent="support",metric="score",of="no_harm"} 1.') for line in shown
        )
        aliases.rollback(made.store, AGENT, now=made.now, reason="rude")
        assert metrics(made) == ['cltrain_rollouts{agent="support",state="back"} 1.0']


def test_the_pages_follow_it(tmp_path: Path) -> None:
    with trial(tmp_path) as made:
        config, home = made.rooms.config, tmp_path / "state" / "reports" / AGENT

        def pages() -> tuple[str, str]:
            reporting.refresh(made.store, config)
            return words(home / "update-000007.html"), words(home / "index.html")

        made.start()
        one, run = pages()
        assert "On trial" in one
        assert "Tried as canary on 50% of the traffic." in one
        assert "1 on trial" in run
        made.pairs(10, calls='{"item": ')
        look(made.rooms)
        one, run = pages()
        assert f"Taken back to {made.incumbent} after 10 of its episodes beside 10: it does harm: faults worse" in one
        assert "1 taken back" in run
