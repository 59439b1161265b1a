"""What `/metrics` shows: the gateway's own counters, and beside them from the store the state of learning
(`monitoring.prometheus`) and of every replica. Every unrecorded answer is counted with its reason.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector
from sqlalchemy.exc import SQLAlchemyError

from cltrain.deploy import readiness
from cltrain.errors import DataError
from cltrain.store.database import Store


class ReplicaCollector(Collector):
    """How every replica stands to what serves, as the worker found it last."""

    def __init__(self, store: Store, agent: str, urls: Sequence[str]) -> None:
        self._store, self._agent, self._urls = store, agent, urls

    def collect(self) -> Iterable[Metric]:
        labels = ["agent", "replica"]
        ready = GaugeMetricFamily("cltrain_replica_ready", "1 while it may answer as what serves.", labels=labels)
        up = GaugeMetricFamily("cltrain_replica_up", "1 while it answers.", labels=labels)
        try:
            with self._store.read() as connection:
                found = readiness.standings(connection, self._agent, self._urls)
        except (DataError, SQLAlchemyError, OSError):  # cltrain_store_readable says so
            found = {}
        for url, standing in found.items():
            ready.add_metric([self._agent, url], standing == "ready")
            up.add_metric([self._agent, url], standing not in ("out", "unseen"))
        return (ready, up)

    def describe(self) -> Iterable[Metric]:
        return ()  # do not read the store when being registered


class Metrics:
    def __init__(self, *read_at_scrape: Collector) -> None:
        self.registry = CollectorRegistry()
        for collector in read_at_scrape:
            self.registry.register(collector)
        self.requests = Counter(
            "cltrain_requests", "Answers by route and status.", ["route", "status"], registry=self.registry
        )
        self.recorded = Counter("cltrain_recorded", "Answers committed to the store.", registry=self.registry)
        self.unrecorded = Counter(
            "cltrain_unrecorded", "Answers that went out unrecorded.", ["reason"], registry=self.registry
        )
        self.without_ids = Counter(
            "cltrain_without_token_ids", "Recorded answers without whole token ids.", registry=self.registry
        )
        self.feedback = Counter("cltrain_feedback", "Feedback by outcome.", ["outcome"], registry=self.registry)
        self.trajectories = Counter(
            "cltrain_trajectories", "Trajectories posted, by outcome.", ["outcome"], registry=self.registry
        )
        self.errors = Counter(
            "cltrain_errors", "Requests that ended in an error, by code.", ["code"], registry=self.registry
        )
        self.shadowed = Counter(
            "cltrain_shadowed", "Requests copied to a candidate, by outcome.", ["outcome"], registry=self.registry
        )
        self.waiting = Gauge("cltrain_recorder_waiting", "Answers waiting to be recorded.", registry=self.registry)
        self.in_flight = Gauge(
            "cltrain_in_flight", "Posts being answered, streams to their end.", registry=self.registry
        )
        self.seconds = Histogram(
            "cltrain_answer_seconds", "From request to last byte of the answer.", ["route"], registry=self.registry
        )

    def page(self) -> bytes:
        """What a scrape answers; reads the store."""
        return generate_latest(self.registry)
