"""The state of one agent's learning for Prometheus, read from the store at scrape time: nothing to lose in a crash.

Counters of live traffic belong to the process that serves it. Labels stay bounded: agent, verdict, status, sink. A
release name appears once, in `cltrain_serving_info`. What a scrape read serves the next ones for MAX_AGE_S.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from typing import Any

from prometheus_client.core import GaugeMetricFamily, InfoMetricFamily, Metric
from prometheus_client.registry import Collector
from sqlalchemy import Connection, func, select
from sqlalchemy.exc import SQLAlchemyError

from cltrain.errors import DataError
from cltrain.monitoring.outbox import lags
from cltrain.monitoring.tried import tried_metrics
from cltrain.store.database import Store
from cltrain.store.families import of_tenants
from cltrain.store.schema import agents, aliases, feedback, outbox, records, releases, screenings, updates

MAX_AGE_S = 5.0
LAST_VALUES = {  # in the newest update event -> gauge
    "adapter/step_frobenius": "step_frobenius_ratio",
    "adapter/step_frobenius_limit": "step_frobenius_limit_ratio",
    "adapter/drift_frobenius": "drift_frobenius_ratio",
    "adapter/drift_frobenius_limit": "drift_frobenius_limit_ratio",
    "adapter/step_spectral": "step_spectral_ratio",
    "adapter/step_spectral_limit": "step_spectral_limit_ratio",
    "adapter/drift_spectral": "drift_spectral_ratio",
    "adapter/drift_spectral_limit": "drift_spectral_limit_ratio",
    "adapter/step_kl": "step_kl_nats",
    "adapter/step_kl_limit": "step_kl_limit_nats",
    "adapter/drift_kl": "drift_kl_nats",
    "adapter/drift_kl_limit": "drift_kl_limit_nats",
    "adapter/day_frobenius": "day_frobenius_ratio",
    "adapter/day_frobenius_limit": "day_frobenius_limit_ratio",
    "adapter/num_tokens": "tokens",
    "adapter/num_tokens_limit": "tokens_limit",
    "adapter/num_steps": "steps",
    "adapter/num_steps_limit": "steps_limit",
    "adapter/shrink": "shrink_ratio",
    "buffer/examples": "window_examples",
}


class StoreCollector(Collector):
    """Register it in a CollectorRegistry. A store that cannot be read shows as `cltrain_store_readable` 0, alone."""

    def __init__(self, store: Store, agent: str, clock: Callable[[], float]) -> None:
        self._store = store
        self._agent = agent
        self._clock = clock
        self._lock = threading.Lock()
        self._seen: list[Metric] = []
        self._seen_at = float("-inf")

    def collect(self) -> Iterable[Metric]:
        with self._lock:
            now = self._clock()
            if not 0 <= now - self._seen_at < MAX_AGE_S:
                self._seen, self._seen_at = self._read(now), now
            return self._seen

    def describe(self) -> Iterable[Metric]:
        return ()  # do not read the store when being registered

    def _read(self, now: float) -> list[Metric]:
        readable = GaugeMetricFamily("cltrain_store_readable", "1 while the store can be read.")
        try:
            with self._store.read() as connection:
                found = list(_state(connection, self._agent, now))
        except (DataError, SQLAlchemyError, OSError):  # what the process itself counts is still worth a scrape
            readable.add_metric([], 0)
            return [readable]
        readable.add_metric([], 1)
        return [readable, *found]


def _state(connection: Connection, agent: str, now: float) -> Iterable[Metric]:
    for name, text, table, by in (
        ("cltrain_records", "Episodes stored.", records, records.c.status),
        ("cltrain_feedback_stored", "Feedback stored.", feedback, feedback.c.source),
        ("cltrain_screened", "Episodes by what the last update that read them said.", screenings, screenings.c.status),
        ("cltrain_releases", "Adapters by status.", releases, releases.c.status),
        ("cltrain_updates", "Updates by verdict.", updates, updates.c.verdict),
    ):
        metric = GaugeMetricFamily(name, text, labels=["agent", by.name])
        counted = select(by, func.count()).where(table.c.agent == agent).group_by(by).order_by(by)
        for value, number in connection.execute(counted):
            metric.add_metric([agent, value or "none"], number)
        yield metric
    yield _unread(connection, agent)
    yield from _serving(connection, agent)
    yield from tried_metrics(connection, agent)
    yield _tenants(connection, agent)
    yield from _last_update(connection, agent, now)
    lag = GaugeMetricFamily("cltrain_sink_lag_events", "Events that a sink has not kept yet.", labels=["sink"])
    for sink, number in lags(connection).items():
        lag.add_metric([sink], number)
    yield lag


def _unread(connection: Connection, agent: str) -> Metric:
    is_ended = (records.c.agent == agent) & (records.c.status == "ended") & (records.c.split == "train")
    is_waiting = screenings.c.record.is_(None) | (screenings.c.status == "waiting")
    joined = records.outerjoin(screenings, screenings.c.record == records.c.id)
    number = connection.execute(select(func.count()).select_from(joined).where(is_ended, is_waiting)).scalar_one()
    text = "Ended training episodes that no update has concluded on."
    metric = GaugeMetricFamily("cltrain_records_waiting", text, labels=["agent"])
    metric.add_metric([agent], number)
    return metric


def _serving(connection: Connection, agent: str) -> Iterable[Metric]:
    serving = InfoMetricFamily("cltrain_serving", "What the alias points at.", labels=["agent"])
    moved = GaugeMetricFamily("cltrain_alias_version", "Moves of the alias so far.", labels=["agent"])
    columns = (aliases.c.release, aliases.c.previous, aliases.c.version)
    for release, previous, version in connection.execute(select(*columns).where(aliases.c.agent == agent)):
        serving.add_metric([agent], {"release": release, "previous": previous or ""})
        moved.add_metric([agent], version)
    frozen = GaugeMetricFamily("cltrain_frozen", "1 while learning is frozen.", labels=["agent"])
    for is_frozen in connection.scalars(select(agents.c.is_frozen).where(agents.c.agent == agent)):
        frozen.add_metric([agent], int(is_frozen))
    yield from (serving, moved, frozen)


def _tenants(connection: Connection, agent: str) -> Metric:
    """Counts alone: a label for each tenant would have no bound."""
    text = "Tenants set up, by what answers them: a release of their own, or the shared one; and those that are frozen."
    metric = GaugeMetricFamily("cltrain_tenants", text, labels=["agent", "standing"])
    served = select(releases.c.path.is_not(None), func.count()).join(aliases, aliases.c.release == releases.c.name)
    served = served.where(of_tenants(aliases.c.agent, agent)).group_by(releases.c.path.is_not(None))
    numbers = {bool(is_own): number for is_own, number in connection.execute(served)}
    frozen = select(func.count()).where(of_tenants(agents.c.agent, agent), agents.c.is_frozen)
    metric.add_metric([agent, "own"], numbers.get(True, 0))
    metric.add_metric([agent, "shared"], numbers.get(False, 0))
    metric.add_metric([agent, "frozen"], connection.scalar(frozen) or 0)
    return metric


def _last_update(connection: Connection, agent: str, now: float) -> Iterable[Metric]:
    ours = (outbox.c.kind == "update") & (outbox.c.agent == agent)
    row = connection.execute(select(outbox).where(ours).order_by(outbox.c.seq.desc()).limit(1)).first()
    number = GaugeMetricFamily("cltrain_update_number", "Number of the newest update.", labels=["agent"])
    age = GaugeMetricFamily("cltrain_update_age_seconds", "Time since the newest update ended.", labels=["agent"])
    values: dict[str, Any] = {}
    if row is not None:
        number.add_metric([agent], row.payload["number"])
        age.add_metric([agent], max(0.0, now - row.at))
        values = row.payload.get("values", {})
    yield from (number, age)
    for key, short in LAST_VALUES.items():
        gauge = GaugeMetricFamily(f"cltrain_update_{short}", f"{key} of the newest update.", labels=["agent"])
        if key in values:
            gauge.add_metric([agent], values[key])
        yield gauge
