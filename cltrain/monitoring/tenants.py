"""Tenants for Prometheus, counted together: a label for each would grow with them."""

from __future__ import annotations

from collections.abc import Iterable

from prometheus_client.core import GaugeMetricFamily, Metric
from sqlalchemy import Connection, func, select

from cltrain.store.families import of_tenants
from cltrain.store.schema import agents, aliases, records, releases, updates


def tenant_metrics(connection: Connection, agent: str) -> Iterable[Metric]:
    """Of those that were set up: how many have a release of their own or are frozen, and their episodes and updates."""
    ours = select(aliases.c.agent).where(of_tenants(aliases.c.agent, agent))
    has_own = ours.join(releases, releases.c.name == aliases.c.release).where(releases.c.path.is_not(None))
    is_frozen = ours.join(agents, agents.c.agent == aliases.c.agent).where(agents.c.is_frozen)
    tenants = GaugeMetricFamily("cltrain_tenants", "Tenants: all, and how many are ...", labels=["agent", "which"])
    for which, those in (("all", ours), ("own_release", has_own), ("frozen", is_frozen)):
        tenants.add_metric([agent, which], connection.scalar(select(func.count()).select_from(those.subquery())) or 0)
    yield tenants
    for name, text, by in (
        ("cltrain_tenants_records", "Episodes of all tenants.", records.c.status),
        ("cltrain_tenants_updates", "Updates of all tenants by verdict.", updates.c.verdict),
    ):
        metric = GaugeMetricFamily(name, text, labels=["agent", by.name])
        counted = select(by, func.count()).where(by.table.c.agent.in_(ours)).group_by(by).order_by(by)
        for value, number in connection.execute(counted):
            metric.add_metric([agent, value or "none"], number)
        yield metric
