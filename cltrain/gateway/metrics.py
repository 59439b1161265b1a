"""What `/metrics` shows: the gateway's own counters, and beside them the state of learning from the store
(`monitoring.prometheus`). Every unrecorded answer is counted with its reason.
"""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.registry import Collector


class Metrics:
    def __init__(self, learning: Collector) -> None:
        self.registry = CollectorRegistry()
        self.registry.register(learning)
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
