"""How what happened becomes rows: one writing thread that commits many answers with one sync, and the reader back.

A future that has its result is on disk. Screening, learning and import formats live elsewhere.
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import os
import queue
import secrets
import threading
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from sqlalchemy import Connection, select, update
from sqlalchemy.exc import DBAPIError, IntegrityError

from cltrain.errors import DataError
from cltrain.experience.reading import read_trajectories, read_trajectory
from cltrain.experience.rows import (
    Turn,
    UnknownTarget,
    end_episode,
    episode_of,
    parts,
    write_aside,
    write_feedback,
    write_trajectory,
    write_turn,
)
from cltrain.records import Feedback, Split, Trajectory
from cltrain.store.database import SECRET_FILE, Store
from cltrain.store.families import of_family
from cltrain.store.schema import records

__all__ = [
    "Recorder",
    "RecorderFull",
    "Turn",
    "UnknownTarget",
    "episode_of",
    "load_secret",
    "read_trajectories",
    "read_trajectory",
    "split_of",
]

T = TypeVar("T")

MAX_GROUP = 256  # jobs in one commit


class RecorderFull(DataError):
    """More answers wait to be recorded than `gateway.queue` allows."""


@dataclass(slots=True)
class _Job:
    work: Callable[[Connection], Any]
    future: Future[Any]


def split_of(secret: bytes, session: str, eval_share: float) -> Split:
    """`eval` for that share of the sessions, by an HMAC no client can compute."""
    digest = hmac.new(secret, session.encode(), hashlib.sha256).digest()
    return "eval" if int.from_bytes(digest[:8], "big") < eval_share * 2**64 else "train"


def load_secret(state_dir: Path) -> bytes:
    """The deployment's 32 secret bytes from `state_dir/secret`, made on first use, once the store is there: a secret
    without a store means that the store was lost. Raises DataError if unreadable."""
    path = state_dir / SECRET_FILE
    try:
        if not path.exists():
            _create_secret(path)
        secret = bytes.fromhex(path.read_text().strip())
    except (OSError, ValueError) as error:
        raise DataError(f"cannot read the deployment secret {path}: {error}") from None
    if len(secret) != 32:
        raise DataError(f"{path} holds {len(secret)} bytes, not 32: restore it from a backup")
    return secret


def _create_secret(path: Path) -> None:
    draft = path.with_name(f"secret.{os.getpid()}.{threading.get_ident()}")
    handle = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        os.write(handle, secrets.token_hex(32).encode())
        os.fsync(handle)
    finally:
        os.close(handle)
    try:
        with contextlib.suppress(FileExistsError):  # somebody else was first: theirs counts
            os.link(draft, path)
    finally:
        draft.unlink()
    directory = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


class Recorder:
    """Writes records, generations and feedback in the order given, many to a commit. Close it to drain it."""

    def __init__(self, store: Store, secret: bytes, eval_share: float, *, capacity: int = 1024) -> None:
        self._store = store
        self._secret = secret
        self._eval_share = eval_share
        self._queue: queue.Queue[_Job | None] = queue.Queue(capacity)
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._is_closed = False

    def __enter__(self) -> Recorder:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def record_turn(self, turn: Turn, *, now: float) -> Future[str]:
        """Queue one turn; the future gives the id of the record it went to. Raises RecorderFull."""
        split = split_of(self._secret, turn.session, self._eval_share)
        return self._submit(lambda connection: write_turn(connection, turn, split, now), wait=False)

    def add_feedback(self, given: Feedback, *, now: float, only_of: str | None = None) -> Future[bool]:
        """Queue feedback; the future gives False where the same is already stored, or raises UnknownTarget, also for a
        record that is not of the principal `only_of`.

        ConflictError where the id is stored for something else. RecorderFull is raised at once.
        """
        return self._submit(lambda connection: write_feedback(connection, given, now, only_of), wait=False)

    def write(self, work: Callable[[Connection], T]) -> Future[T]:
        """Queue rows of another kind, in the same commits. Raises RecorderFull."""
        return self._submit(work, wait=False)

    def submit_trajectory(self, trajectory: Trajectory) -> Future[bool]:
        """As `add_trajectory`, without waiting for the commit; waits only while the queue is full."""
        split = split_of(self._secret, trajectory.session, self._eval_share)
        kept = replace(trajectory, split=split)
        return self._submit(lambda connection: write_trajectory(connection, kept), wait=True)

    def add_trajectory(self, trajectory: Trajectory) -> bool:
        """Store a whole episode with its generations and feedback (see `rows.write_trajectory`).

        The split is ours: `trajectory.split` is ignored. Returns after the commit.
        """
        return self.submit_trajectory(trajectory).result()

    def set_aside(self, agent: str, source: str, line: int, reason: str, raw: bytes, *, now: float) -> Future[bool]:
        """Keep a line that could not become a record; False if this (agent, source, line) is kept already."""
        return self._submit(
            lambda connection: write_aside(connection, agent, source, line, reason, raw, now), wait=True
        )

    def end_episode(self, record: str, *, now: float) -> Future[int]:
        """End every open record of the episode; the future gives how many."""
        return self._submit(lambda connection: end_episode(connection, record, now), wait=False)

    def sweep_idle(self, agent: str, *, idle_s: float, now: float, busy: frozenset[str] = frozenset()) -> Future[int]:
        """End the open records of the agent and its tenants that saw no turn for `idle_s`. The `busy` ones see one now:
        for other gateways too, which do not know them."""

        def work(connection: Connection) -> int:
            is_open = of_family(records.c.agent, agent) & (records.c.status == "open")
            connection.execute(update(records).where(is_open, records.c.id.in_(busy)).values(updated_at=now))
            is_idle = is_open & (records.c.updated_at <= now - idle_s)
            ids = [i for i in connection.scalars(select(records.c.id).where(is_idle)) if i not in busy]
            for part in parts(ids):
                connection.execute(update(records).where(records.c.id.in_(part)).values(status="ended", updated_at=now))
            return len(ids)

        return self._submit(work, wait=False)

    @property
    def num_waiting(self) -> int:
        return self._queue.qsize()

    def close(self) -> None:
        """Commit what is queued, then stop."""
        with self._lock:
            self._is_closed = True
            thread = self._thread
        if thread is not None and thread.is_alive():
            self._queue.put(None)
            thread.join()

    def _submit(self, work: Callable[[Connection], T], *, wait: bool) -> Future[T]:
        future: Future[T] = Future()
        with self._lock:
            if self._is_closed:
                raise DataError("the recorder is closed")
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="recorder", daemon=True)
                self._thread.start()
        try:
            self._queue.put(_Job(work, future), block=wait)
        except queue.Full:
            raise RecorderFull(f"{self._queue.maxsize} answers already wait to be recorded (gateway.queue)") from None
        return future

    def _run(self) -> None:
        is_last = False
        while not is_last:
            batch = [self._queue.get()]
            with contextlib.suppress(queue.Empty):
                while len(batch) < MAX_GROUP:
                    batch.append(self._queue.get_nowait())
            is_last = None in batch
            self._commit([job for job in batch if job is not None])

    def _commit(self, jobs: list[_Job]) -> None:
        outcomes: list[tuple[_Job, Any, Exception | None]] = []
        try:
            with self._store.write() as connection:
                for job in jobs:
                    if job.future.set_running_or_notify_cancel():
                        outcomes.append((job, *_attempt(job, connection)))
        except Exception as failure:  # what the disk or the database says belongs to everybody who waits
            for job in jobs:
                if job.future.cancelled():
                    continue
                if job.future.running() or job.future.set_running_or_notify_cancel():
                    job.future.set_exception(failure)
            return
        for job, result, problem in outcomes:
            if problem is None:
                job.future.set_result(result)
            else:
                job.future.set_exception(problem)


def _attempt(job: _Job, connection: Connection) -> tuple[Any, Exception | None]:
    """Run one job in a savepoint: what is wrong with it alone is its own answer, and the others still commit."""
    connection.exec_driver_sql("SAVEPOINT job")
    try:
        result = job.work(connection)
    except IntegrityError as error:
        problem: Exception = DataError(f"an id in it is stored already: {error.orig}")
    except DBAPIError:
        raise
    except Exception as error:  # one bad record is counted against its sender only
        problem = error
    else:
        connection.exec_driver_sql("RELEASE job")
        return result, None
    connection.exec_driver_sql("ROLLBACK TO job")
    connection.exec_driver_sql("RELEASE job")
    return None, problem
