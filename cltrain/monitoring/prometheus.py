"""Prometheus metrics read from the store at scrape time: nothing to lose in a crash, nothing counted twice.

Counters of live traffic belong to the process that serves it; this is the state of learning. Labels stay bounded:
agent, verdict, status, sink. A release name appears once, in `cltrain_serving_info`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, InfoMetricFamily, Metric
from prometheus_client.registry import Collector
from sqlalchemy import Connection, func, select

from cltrain.store.database import Store
from cltrain.store.schema import agents, aliases, feedback, outbox, records, releases, screenings, sink_marks, updates

LAST_VALUES = {  # in the newest update event -> gauge
    "adapter/step_frobenius": "step_frobenius_ratio",
    "adapter/drift_frobenius": "drift_frobenius_ratio",
    "adapter/drift_frobenius_limit": "drift_frobenius_limit_ratio",
    "adapter/step_kl": "step_kl_nats",
    "adapter/drift_kl": "drift_kl_nats",
    "adapter/drift_kl_limit": "drift_kl_limit_nats",
    "adapter/shrink": "shrink_ratio",
    "buffer/examples": "window_examples",
}


class StoreCollector(Collector):
    """Register it in a CollectorRegistry; each scrape reads the store once."""

    def __init__(self, store: Store, clock: Callable[[], float]) -> None:
        self._store = store
        self._clock = clock

    def collect(self) -> Iterable[Metric]:
        with self._store.read() as connection:
            yield _counts(connection, "cltrain_records", "Episodes stored.", records, records.c.status)
            yield _counts(connection, "cltrain_feedback", "Feedback stored.", feedback, feedback.c.source)
            yield _counts(connection, "cltrain_screened", "Episodes by screening.", screenings, screenings.c.status)
            yield _counts(connection, "cltrain_releases", "Adapters by status.", releases, releases.c.status)
            yield _counts(connection, "cltrain_updates", "Updates by verdict.", updates, updates.c.verdict)
            yield from _serving(connection)
            yield from _last_update(connection, self._clock())
            yield _lags(connection)

    def describe(self) -> Iterable[Metric]:
        return ()  # do not read the store when being registered


def registry_for(store: Store, clock: Callable[[], float]) -> CollectorRegistry:
    """A registry of its own, so that other collectors can be added beside it."""
    registry = CollectorRegistry()
    registry.register(StoreCollector(store, clock))
    return registry


def render(store: Store, clock: Callable[[], float]) -> bytes:
    """The text that a scrape answers."""
    return generate_latest(registry_for(store, clock))


def _counts(connection: Connection, name: str, text: str, table: Any, by: Any) -> Metric:
    # what can shrink (screenings change status, releases are collected) is a gauge; what only grows is a counter
    family = CounterMetricFamily if table in (feedback,) else GaugeMetricFamily
    metric = family(name, text, labels=["agent", by.name])
    for agent, value, number in connection.execute(
        select(table.c.agent, by, func.count()).group_by(table.c.agent, by).order_by(table.c.agent, by)
    ):
        metric.add_metric([agent, value or "none"], number)
    return metric


def _serving(connection: Connection) -> Iterable[Metric]:
    serving = InfoMetricFamily("cltrain_serving", "What the alias points at.", labels=["agent"])
    moved = GaugeMetricFamily("cltrain_alias_version", "Moves of the alias so far.", labels=["agent"])
    for agent, release, previous, version in connection.execute(
        select(aliases.c.agent, aliases.c.release, aliases.c.previous, aliases.c.version).order_by(aliases.c.agent)
    ):
        serving.add_metric([agent], {"release": release, "previous": previous or ""})
        moved.add_metric([agent], version)
    frozen = GaugeMetricFamily("cltrain_frozen", "1 while learning is frozen.", labels=["agent"])
    for agent, is_frozen in connection.execute(select(agents.c.agent, agents.c.is_frozen).order_by(agents.c.agent)):
        frozen.add_metric([agent], int(is_frozen))
    yield from (serving, moved, frozen)


def _last_update(connection: Connection, now: float) -> Iterable[Metric]:
    newest = select(func.max(outbox.c.seq)).where(outbox.c.kind == "update").group_by(outbox.c.agent)
    rows = connection.execute(
        select(outbox.c.agent, outbox.c.payload, outbox.c.at).where(outbox.c.seq.in_(newest))
    ).all()
    number = GaugeMetricFamily("cltrain_update_number", "Number of the newest update.", labels=["agent"])
    age = GaugeMetricFamily("cltrain_update_age_seconds", "Time since the newest update ended.", labels=["agent"])
    for agent, payload, at in rows:
        number.add_metric([agent], payload["number"])
        age.add_metric([agent], max(0.0, now - at))
    yield from (number, age)
    for key, short in LAST_VALUES.items():
        gauge = GaugeMetricFamily(f"cltrain_update_{short}", f"{key} of the newest update.", labels=["agent"])
        for agent, payload, _ in rows:
            if key in payload.get("values", {}):
                gauge.add_metric([agent], payload["values"][key])
        yield gauge


def _lags(connection: Connection) -> Metric:
    metric = GaugeMetricFamily("cltrain_sink_lag_events", "Events that a sink has not kept yet.", labels=["sink"])
    for sink, seq in connection.execute(select(sink_marks.c.sink, sink_marks.c.seq).order_by(sink_marks.c.sink)):
        metric.add_metric([sink], connection.execute(select(func.count()).where(outbox.c.seq > seq)).scalar_one())
    return metric
