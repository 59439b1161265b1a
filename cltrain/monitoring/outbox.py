"""Events are committed to our own store first; sinks (wandb, ...) replay them from a watermark that they reached.

A sink that fails, hangs in an outage or dies with the process loses nothing: its watermark stays, and the events after
it are sent again. A failure is logged once and never reaches the worker.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from sqlalchemy import Connection, func, select
from sqlalchemy.dialects.sqlite import insert as insert_sqlite

from cltrain.errors import DataError
from cltrain.store.database import Store
from cltrain.store.schema import outbox, sink_marks

log = logging.getLogger(__name__)

BATCH = 500
KINDS = ("update",)


@dataclass(frozen=True, slots=True)
class Event:
    """One thing that happened, in the order it was committed."""

    seq: int
    agent: str
    kind: str
    payload: dict[str, Any]
    at: float


class Sink(Protocol):
    """Somewhere else that shows events. `write` gets each event at least once, in order."""

    @property
    def name(self) -> str: ...

    def write(self, events: Sequence[Event]) -> int | None:
        """Take the events; return the highest seq that would survive a crash now, None when none would yet."""

    def close(self) -> int | None:
        """Let go of everything; return as `write` does."""


def emit(connection: Connection, agent: str, kind: str, payload: dict[str, Any], at: float) -> int:
    """Add an event in the caller's transaction and return its seq.

    An update event that repeats the number and verdict of one already there is not added again: a worker that resumes
    after a crash may say the same thing twice. Raises DataError for an unknown kind or an update without a number.
    """
    if kind not in KINDS:
        raise DataError(f"unknown event kind {kind!r}; known: {', '.join(KINDS)}")
    if not isinstance(payload.get("number"), int):
        raise DataError(f"an update event needs an integer `number`; got {payload.get('number')!r}")
    same = select(outbox.c.seq, outbox.c.payload).where(
        outbox.c.agent == agent,
        outbox.c.kind == kind,
        outbox.c.payload["number"].as_integer() == payload["number"],
    )
    for seq, seen in connection.execute(same):
        if seen.get("verdict") == payload.get("verdict"):
            return int(seq)
    added = connection.execute(outbox.insert().values(agent=agent, kind=kind, payload=payload, at=at))
    assert added.inserted_primary_key is not None
    return int(added.inserted_primary_key[0])


def events_after(store: Store, seq: int, *, limit: int = BATCH) -> list[Event]:
    columns = (outbox.c.seq, outbox.c.agent, outbox.c.kind, outbox.c.payload, outbox.c.at)
    with store.read() as connection:
        found = connection.execute(select(*columns).where(outbox.c.seq > seq).order_by(outbox.c.seq).limit(limit))
        return [Event(*row) for row in found]


def watermark(store: Store, sink: str) -> int:
    """The last event that `sink` is known to have kept; 0 before the first."""
    with store.read() as connection:
        return connection.execute(select(sink_marks.c.seq).where(sink_marks.c.sink == sink)).scalar() or 0


def lags(connection: Connection) -> dict[str, int]:
    """For every sink that was ever started, how many events it has not yet kept."""
    num_after = select(func.count()).select_from(outbox).where(outbox.c.seq > sink_marks.c.seq).scalar_subquery()
    rows = connection.execute(select(sink_marks.c.sink, num_after).order_by(sink_marks.c.sink))
    return {str(sink): int(number) for sink, number in rows}


class Pump:
    """Carries events from the store to the sinks, in its own thread or when asked. Never raises."""

    def __init__(self, store: Store, sinks: Sequence[Sink], *, period_s: float = 5.0) -> None:
        self._store = store
        self._sinks = tuple(sinks)
        self._period_s = period_s
        if self._sinks:
            _introduce(store, self._sinks)
        self._sent = {sink.name: watermark(store, sink.name) for sink in self._sinks}
        self._problem: dict[str, str] = {}
        self._lock = threading.Lock()
        self._wake = threading.Event()
        self._is_closing = False
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Drain in the background, every `period_s` and whenever `wake` is called."""
        self._thread = threading.Thread(target=self._loop, name="cltrain-monitoring", daemon=True)
        self._thread.start()

    def wake(self) -> None:
        self._wake.set()

    def problems(self) -> dict[str, str]:
        """Sink name -> why it last failed, for the sinks that are failing now."""
        return dict(self._problem)

    def drain(self) -> int:
        """Send each sink what it has not had; the number of events taken, over all sinks."""
        with self._lock:
            return sum(self._drain_one(sink) for sink in self._sinks)

    def close(self, timeout_s: float = 30.0) -> None:
        """Drain once more and close the sinks; a sink that takes longer than `timeout_s` is left behind."""
        self._is_closing = True
        self._wake.set()
        last = threading.Thread(target=self._finish, name="cltrain-monitoring-close", daemon=True)
        last.start()
        last.join(timeout_s)
        if last.is_alive():
            log.warning("monitoring did not finish in %g s; what is missing will be sent at the next start", timeout_s)

    def _finish(self) -> None:
        self.drain()
        with self._lock:
            for sink in self._sinks:
                try:
                    self._mark(sink.name, sink.close())
                except Exception as error:  # a view of the metrics must never take the worker down
                    self._fail(sink.name, error)

    def _loop(self) -> None:
        while not self._is_closing:
            self.drain()
            self._wake.wait(self._period_s)
            self._wake.clear()

    def _drain_one(self, sink: Sink) -> int:
        num_sent = 0
        try:
            while events := events_after(self._store, self._sent[sink.name]):
                durable = sink.write(events)
                self._sent[sink.name] = events[-1].seq
                self._mark(sink.name, durable)
                num_sent += len(events)
            if self._problem.pop(sink.name, None):
                log.warning("%s works again; nothing was lost", sink.name)
        except Exception as error:  # a view of the metrics must never take the worker down
            self._fail(sink.name, error)
        return num_sent

    def _fail(self, name: str, error: Exception) -> None:
        if name not in self._problem:
            log.warning("%s does not take events (%s); they wait in the store and will be sent again", name, error)
        self._problem[name] = str(error) or type(error).__name__
        try:
            self._sent[name] = watermark(self._store, name)
        except DataError:
            log.debug("the store cannot be read either; sending goes on from where it stopped")

    def _mark(self, name: str, seq: int | None) -> None:
        if seq is None:
            return
        with self._store.write() as connection:
            row = insert_sqlite(sink_marks).values(sink=name, seq=seq)
            connection.execute(row.on_conflict_do_update(index_elements=["sink"], set_={"seq": seq}))


def _introduce(store: Store, sinks: Sequence[Sink]) -> None:
    """Every sink has a watermark from its start, so that one that never works shows as lagging."""
    with store.write() as connection:
        for sink in sinks:
            row = insert_sqlite(sink_marks).values(sink=sink.name, seq=0)
            connection.execute(row.on_conflict_do_nothing())
