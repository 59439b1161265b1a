"""What the gate asks of an update beyond its verdict: drift within the gate's own limit, and a record of candidates."""

from __future__ import annotations

from pathlib import Path

import pytest

from cltrain.api import Deployment
from cltrain.gate.levels import read_past
from cltrain.records import Code
from tests.deployments import base_server, config_for, corrected, record, tickets, worker

LIMIT = 0.0005  # nats; the same update moves farther where the gate allows it


@pytest.mark.parametrize("base_kl", [0.25, LIMIT])
def test_what_would_fail_on_drift_alone_is_pulled_back_and_measured_again(tmp_path: Path, base_kl: float) -> None:
    with base_server() as url:
        config = config_for(tmp_path / "demo", url)
        config = config.model_copy(update={"gate": config.gate.model_copy(update={"base_kl": base_kl})})
        deployment = Deployment(config)
        record(deployment.store, config, [corrected(ticket) for ticket in tickets("repair", 24)])
        with worker(config, deployment.store) as learner:
            summary = learner.update()
    bounds, decision = summary["bounds"], summary["decision"]
    assert bounds["drift_kl_limit"] == min(base_kl, config.bounds.drift_kl)
    [near] = [check for check in decision["checks"] if check["code"] == Code.BASE_KL]
    assert near["verdict"] == "promote"
    if base_kl == LIMIT:
        assert bounds["drift_kl"] <= LIMIT
        assert bounds["shrink"] < 1
    else:
        assert bounds["drift_kl"] > LIMIT
    past = read_past(deployment.store, "support", config.gate.track_window)
    assert past.num_decisions == len(past.record) == 1
    assert list(past.record[0]) == decision["outcome"]
    assert 0 < decision["num_asked"] <= decision["num_planned"]
