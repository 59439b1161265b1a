"""A candidate on live traffic for Prometheus: its share, how many episodes either arm has had, what the judge sees."""

from __future__ import annotations

from collections.abc import Iterable

from prometheus_client.core import GaugeMetricFamily, Metric
from sqlalchemy import Connection, func, select

from cltrain.store.schema import rollouts
from cltrain.store.trials import is_open


def tried_metrics(connection: Connection, agent: str) -> Iterable[Metric]:
    """Without samples where nothing is tried, but for the count of those before."""
    ended = GaugeMetricFamily("cltrain_rollouts", "Candidates tried on live traffic.", labels=["agent", "state"])
    ours = rollouts.c.agent == agent
    counted = select(rollouts.c.state, func.count()).where(ours).group_by(rollouts.c.state).order_by(rollouts.c.state)
    for state, number in connection.execute(counted):
        ended.add_metric([agent, state], number)
    weight = GaugeMetricFamily(
        "cltrain_rollout_weight_ratio", "Share of the traffic of the one that is open.", labels=["agent", "kind"]
    )
    episodes = GaugeMetricFamily(
        "cltrain_rollout_episodes", "Episodes (shadow: answers) judged so far.", labels=["agent", "arm"]
    )
    e_values = GaugeMetricFamily(
        "cltrain_rollout_e_value",
        "Evidence that it does harm, and that it does none.",
        labels=["agent", "metric", "of"],
    )
    row = connection.execute(select(rollouts).where(is_open(agent))).first()
    if row is not None:
        weight.add_metric([agent, row.kind], row.weight)
        for arm in ("incumbent", "candidate"):
            episodes.add_metric([agent, arm], row.evidence.get("episodes", {}).get(arm, 0))
        for one in row.evidence.get("metrics", ()):
            for of in ("harm", "no_harm"):
                e_values.add_metric([agent, one["metric"], of], one[of])
    yield from (ended, weight, episodes, e_values)
