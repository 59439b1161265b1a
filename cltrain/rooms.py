"""What every update and audit of one agent needs at hand: its configuration, store, base, server and evidence; and what
lies in them: the adapter and memory behind a release, what today's steps have spent, what the server should hold.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field

from cltrain.config import Config
from cltrain.deploy import proof, residents
from cltrain.deploy.client import ServerClient
from cltrain.errors import ConflictError
from cltrain.evidence import Evidence
from cltrain.models.adapter import AdapterFile, read_adapter
from cltrain.models.base import Base
from cltrain.models.digest import MEMORY_FILE
from cltrain.models.scoring import last_answer, token_log_probs
from cltrain.records import Example, TokenRow
from cltrain.registry import releases
from cltrain.registry.displacement import DAY_S, moved_since
from cltrain.store.database import Store
from cltrain.trainer.memory import Memory, sealed_memory
from cltrain.trainer.reference import Reference

NUM_PROBES = 4
NOISE = {"float32": 1e-3, "float16": 0.05, "bfloat16": 0.25}  # nats between two forwards of the same weights


@dataclass
class Rooms:
    """What every update and audit of one agent needs at hand; made once per worker."""

    config: Config
    store: Store
    base: Base
    server: ServerClient
    evidence: Evidence
    secret: bytes
    anchors: Sequence[TokenRow]
    anchors_digest: str
    rehearsal: Sequence[Example]
    of_base: Reference  # what the base says on the anchors
    fence: int
    clock: Callable[[], float] = time.time
    server_lock: threading.Lock = field(default_factory=threading.Lock)  # loading is done by one thread at a time
    on_progress: Callable[[str], None] = print

    @property
    def agent(self) -> str:
        return self.config.agent.name


def adapter_of(rooms: Rooms, name: str) -> AdapterFile | None:
    """The release's weights; None for the bare base."""
    directory = releases.release_dir(rooms.config.state_dir, releases.get(rooms.store, name))
    return read_adapter(directory) if directory else None


def memory_of(rooms: Rooms, name: str, adapter: AdapterFile | None) -> Memory:
    """What the update behind a release left for the next one."""
    release = releases.get(rooms.store, name)
    sha256 = release.manifest.get("files", {}).get(MEMORY_FILE)
    return sealed_memory(releases.release_dir(rooms.config.state_dir, release), adapter, sha256)


def spent_today(rooms: Rooms) -> float:
    """Displacement of the last 24 hours, in units of bounds.day_frobenius."""
    return moved_since(rooms.store, rooms.agent, rooms.clock() - DAY_S)


def day_is_spent(rooms: Rooms) -> str:
    return (
        f"the day's displacement is spent: {spent_today(rooms):.3f} of bounds.day_frobenius = "
        f"{rooms.config.bounds.day_frobenius:g} in the last 24 hours; the records wait"
    )


def prove(
    rooms: Rooms, name: str, after: AdapterFile | None, before: AdapterFile | None, rows: Sequence[TokenRow], was: str
) -> proof.Proof:
    """Show that the server answers with these weights, on the rows where they differ most from before."""
    rows = list(rows[:32])
    pairs = [last_answer(row) for row in rows]
    ours, theirs = token_log_probs(rooms.base, after, rows), token_log_probs(rooms.base, before, rows)
    gaps = [max(abs(a - b) for a, b in zip(x, y, strict=True)) for x, y in zip(ours, theirs, strict=True)]
    chosen = sorted(range(len(rows)), key=lambda i: -gaps[i])[:NUM_PROBES]
    tails = [len(pairs[i][1]) for i in chosen]
    found = proof.prove(
        rooms.server, name, was, [pairs[i] for i in chosen],
        [ours[i][-tail:] for i, tail in zip(chosen, tails, strict=True)],
        [theirs[i][-tail:] for i, tail in zip(chosen, tails, strict=True)], NOISE[rooms.config.base.dtype],
    )  # fmt: skip
    if found.verdict == "proved":
        root = rooms.server.list().get(name, "")
        residents.mark_proved(rooms.store, rooms.server.url, name, root, rooms.clock())
    return found


def collect_garbage(rooms: Rooms) -> None:
    """Unload what nobody wants; delete rejected and superseded adapters that the server no longer lists. What served
    stays on disk."""
    with rooms.server_lock:
        tidy_server(rooms)
        with rooms.store.read() as connection:
            gone = residents.unlisted(connection, [rooms.server], rooms.agent)
    for name in gone:
        with suppress(ConflictError):  # a human promoted it meanwhile
            releases.delete_release(rooms.store, rooms.config.state_dir, name, now=rooms.clock())


def tidy_server(rooms: Rooms) -> None:
    """Load what should be resident, unload what nobody wants, leaving room for one more."""
    with rooms.store.read() as connection:
        wanted = residents.desired(connection, rooms.config.state_dir, rooms.agent)
    residents.collect(
        rooms.server, rooms.store, agent=rooms.agent, wanted=wanted, now=rooms.clock(), drain_s=60.0,
        max_adapters=rooms.config.server.max_adapters,
    )  # fmt: skip
    residents.reconcile(rooms.server, wanted)
