"""What every update and audit of one agent needs at hand: its configuration, store, base, server and evidence; and what
lies in them: the adapter and memory behind a release, what today's steps have spent, what the server should hold.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace

from cltrain.config import Config
from cltrain.config_tenants import is_tenants, shared_of
from cltrain.deploy import probes, proof, residents
from cltrain.deploy.probes import Probes
from cltrain.deploy.replicas import Replicas
from cltrain.deploy.tenants import with_tenants
from cltrain.deploy.trust import bar_untrusted
from cltrain.errors import ConflictError
from cltrain.evidence import Evidence
from cltrain.models.adapter import AdapterFile, read_adapter
from cltrain.models.base import Base
from cltrain.models.digest import MEMORY_FILE
from cltrain.models.scoring import last_answer, token_log_probs
from cltrain.models.signature import check_signature
from cltrain.records import Example, TokenRow
from cltrain.registry import releases
from cltrain.registry.displacement import DAY_S, moved_since
from cltrain.store.database import Store
from cltrain.trainer.memory import Memory, sealed_memory
from cltrain.trainer.reference import Reference

NUM_PROBES = 4
NOISE = {"float32": 1e-3, "float16": 0.05, "bfloat16": 0.25}  # nats that two forwards of the same weights may differ by


@dataclass
class Rooms:
    """What every update and audit of one agent needs at hand; made once per worker."""

    config: Config
    store: Store
    base: Base
    server: Replicas
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
    complaints: set[tuple[str, str]] = field(default_factory=set)  # (release, why it cannot be proved): logged once

    @property
    def agent(self) -> str:
        return self.config.agent.name


def under(rooms: Rooms, config: Config, *, fence: int | None = None) -> Rooms:
    """The same base, servers and anchors for an agent that learns and is judged by another configuration; `fence`: of
    its own lease, where it is another agent."""
    evidence = Evidence(config, rooms.store, rooms.base, rooms.server, rooms.on_progress, rooms.clock)
    return replace(rooms, config=config, evidence=evidence, fence=rooms.fence if fence is None else fence)


def adapter_of(rooms: Rooms, name: str) -> AdapterFile | None:
    """The release's weights; None for the bare base."""
    directory = releases.release_dir(rooms.config.state_dir, releases.get(rooms.store, name))
    return read_adapter(directory) if directory else None


def require_sound(rooms: Rooms, name: str) -> None:
    """Raise DataError unless the files are those that were sealed and, where keys are trusted, signed by one of them:
    what is made from others proves others."""
    release = releases.get(rooms.store, name)
    releases.verify_release(rooms.config.state_dir, release)
    directory = releases.release_dir(rooms.config.state_dir, release)
    if directory is not None and (trusted := rooms.config.signing.all_trusted):
        check_signature(directory, trusted)


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
    """Show that every replica answers with these new weights, on the rows where they differ most from before. The
    probes are kept, so that the release can be proved again at any time."""
    made = probes_for(rooms, after, before, rows, was)
    if after is not None:
        probes.keep(rooms.store, name, made, rooms.clock())
    return rooms.server.prove(name, made, 1 if rooms.config.rollout.kind == "rolling" else None)


def probes_for(
    rooms: Rooms, after: AdapterFile | None, before: AdapterFile | None, rows: Sequence[TokenRow], was: str
) -> Probes:
    """The trainer's log-probs of the rows, among the first 32, that tell `after` from `before` best."""
    rows = list(rows[:32])
    ours, theirs = token_log_probs(rooms.base, after, rows), token_log_probs(rooms.base, before, rows)
    gaps = [max(abs(a - b) for a, b in zip(x, y, strict=True)) for x, y in zip(ours, theirs, strict=True)]
    chosen = sorted(range(len(rows)), key=lambda i: -gaps[i])[:NUM_PROBES]
    pairs = tuple(last_answer(rows[i]) for i in chosen)
    bare = token_log_probs(rooms.base, None, [rows[i] for i in chosen])

    def tails(found: Sequence[Sequence[float]]) -> tuple[tuple[float, ...], ...]:
        return tuple(tuple(row[-len(said) :]) for row, (_, said) in zip(found, pairs, strict=True))

    expected, of_before = tails([ours[i] for i in chosen]), tails([theirs[i] for i in chosen])
    return Probes(pairs, expected, of_before, tails(bare), was, NOISE[rooms.config.base.dtype])


def collect_garbage(rooms: Rooms) -> None:
    """Unload what nobody wants; delete rejected and superseded adapters that no server lists any more, nor one that is
    away may come back with. What served stays on disk."""
    with rooms.server_lock:
        tidy_server(rooms)
        with rooms.store.read() as connection:
            gone = residents.unlisted(connection, rooms.server.members, rooms.agent)
    for name in gone:
        with suppress(ConflictError):  # a human promoted it meanwhile
            releases.delete_release(rooms.store, rooms.config.state_dir, name, now=rooms.clock())
            probes.forget(rooms.store, name)


def desired(rooms: Rooms) -> residents.Wanted:
    """What every replica should hold now, tenants' adapters among it, and what of it no trusted key signed, or is not
    judged yet where a release goes from replica to replica."""
    shared, state_dir = shared_of(rooms.agent), rooms.config.state_dir
    with rooms.store.read() as connection:
        wanted = residents.desired(connection, state_dir, shared)
        if has_tenants(rooms):
            wanted = with_tenants(connection, state_dir, wanted, shared, rooms.config.server.max_adapters)
        unjudged = residents.under_way(connection, rooms.agent) if rooms.config.rollout.kind == "rolling" else ()
    return bar_untrusted(wanted, rooms.config.signing.all_trusted).without(unjudged)


def required_ready(rooms: Rooms) -> int:
    """Replicas that must hold a release and have proved it before it may serve: of blue and green the whole set."""
    return len(rooms.server.urls) if rooms.config.rollout.kind == "blue_green" else rooms.server.min_ready


def has_tenants(rooms: Rooms) -> bool:
    return rooms.config.tenants.mode == "individual" or is_tenants(rooms.agent)


def tidy_server(rooms: Rooms) -> None:
    """Load what should be resident, unload what nobody wants, leaving room for one more."""
    rooms.server.tidy(
        desired(rooms), agent=shared_of(rooms.agent), now=rooms.clock(), drain_s=rooms.config.rollout.grace_s,
        max_adapters=rooms.config.server.max_adapters,
    )  # fmt: skip
