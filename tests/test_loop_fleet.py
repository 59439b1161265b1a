"""A whole update over two replicas: each proves the candidate, and what died while it was judged is not counted."""

from __future__ import annotations

from contextlib import ExitStack

import pytest
from sqlalchemy import select

from cltrain.api import Deployment
from cltrain.deploy import readiness
from cltrain.registry import aliases
from cltrain.store.schema import replicas, screenings
from cltrain.tending import tend
from tests.deployments import base_server, config_for, corrected, record, tickets, worker


@pytest.fixture
def made(tmp_path):
    """(config, deployment, urls, end the second replica): two replicas of which both must be ready."""
    with ExitStack() as first, ExitStack() as second:
        urls = (first.enter_context(base_server()), second.enter_context(base_server()))
        config = config_for(tmp_path / "demo", "", server={"url": None, "urls": urls, "min_ready": 2})
        deployment = Deployment(config)
        record(deployment.store, config, [corrected(ticket) for ticket in tickets("repair", 24)])
        yield config, deployment, urls, second.close


@pytest.mark.slow
def test_a_candidate_is_proved_on_every_replica_before_it_serves(made):
    config, deployment, urls, _ = made
    with worker(config, deployment.store) as learner:
        summary = learner.update()
    assert (summary["verdict"], summary["proof"]) == ("promote", "proved"), summary["reasons"]
    with deployment.store.read() as connection:
        rows = connection.execute(select(replicas).where(replicas.c.release == summary["serving"])).all()
        readiness.require_ready(connection, urls, summary["serving"], 2)
    assert {(row.url, row.state) for row in rows} == {(url, "proved") for url in urls}
    assert deployment.status()["processes"]["server"] == "up"


@pytest.mark.slow
def test_a_replica_that_died_while_the_gate_judged_leaves_the_incumbent_serving(made):
    config, deployment, urls, end_second = made
    with worker(config, deployment.store) as learner:

        def end_it(line: str) -> None:
            if "judged on" in line:
                end_second()
                tend(learner.rooms)

        learner.rooms.evidence.on_progress = end_it
        summary = learner.update()
    assert summary["verdict"] == "error"
    assert "discarded: 1 of 2 replicas hold and proved" in summary["reasons"][0]
    assert aliases.read_alias(deployment.store, "support").release.startswith("support-v000000-")
    with deployment.store.read() as connection:
        assert set(connection.scalars(select(screenings.c.status))) == {"waiting"}
        assert readiness.rows_of(connection, urls[1])[readiness.ITSELF].state == "out"
    assert deployment.status()["processes"]["server"] == "1 of 2 up"
