"""Which episode a request belongs to, and which release answers it.

An episode keeps its release until it ends; only a rollback moves it, and then it is marked mixed. When the store
cannot be read, what was read last serves and nothing is recorded.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import time
import uuid
from collections import OrderedDict
from collections.abc import Sequence, Set
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection, bindparam, select
from sqlalchemy.exc import SQLAlchemyError

from cltrain.errors import DataError
from cltrain.experience.recording import episode_of
from cltrain.experience.strict_json import loads
from cltrain.gateway.errors import Refusal, unknown_model
from cltrain.gateway.split import Tried, read_tried, takes
from cltrain.gateway.tenants import serving
from cltrain.records import UNDONE, Message, Tool
from cltrain.store.database import Store
from cltrain.store.schema import records, releases

log = logging.getLogger(__name__)

MAX_REMEMBERED = 10_000  # pins and names kept in memory for the time when the store cannot be read
MAX_LOOKED_UP = 400  # of the newest prefixes of one conversation
STORE_RETRY_S = 2.0


@dataclass(slots=True, eq=False)
class Lease:
    """One request's place: give it back with `Episodes.finish`."""

    episode: str  # x-cltrain-trajectory
    record: str
    agent: str  # whose record it is
    session: str
    principal: str
    release: str
    is_base: bool
    is_alias: bool  # the client named the agent, not a release
    prefix: str  # hash of the request's messages
    after: str | None = None
    producers: tuple[str | None, ...] = ()  # of the request's messages
    tools_before: tuple[Tool, ...] | None = None  # offered by the request that it goes on from
    is_mixed: bool = False
    is_recordable: bool = True  # False: the store could not be read
    tried: Tried | None = None  # a candidate beside the release that answers


@dataclass(frozen=True, slots=True)
class Seen:
    """What one look into the store found."""

    alias: str | None
    open_records: tuple[Any, ...]  # rows of this session, or matching the messages; oldest turn first
    payloads: dict[str, dict[str, Any]]  # of those whose conversation this one continues
    releases: dict[str, Any]  # rows by name
    tried: Tried | None  # beside the alias, on live traffic


@dataclass(frozen=True, slots=True)
class Wish:
    """What a request says about where it belongs. `hashes` as from `prefix_hashes`, of those that it may go on from;
    empty: never a continuation. `prefix`: of all its messages. `agent`: whose record it makes, the shared agent's or a
    tenant's."""

    model: str
    agent: str
    session: str | None
    principal: str
    messages: Sequence[Message]
    hashes: Sequence[str]
    prefix: str


class StoreWatch:
    """Remembers for a moment that the store failed, so that requests do not queue up behind it."""

    def __init__(self) -> None:
        self._down_until = 0.0
        self._is_down = False

    @property
    def is_down(self) -> bool:
        return time.monotonic() < self._down_until

    def failed(self, reason: object) -> None:
        self._down_until = time.monotonic() + STORE_RETRY_S
        if not self._is_down:
            log.warning("the store cannot be used, answers go out unrecorded: %s", reason)
        self._is_down = True

    def worked(self) -> None:
        if self._is_down:
            log.warning("the store works again")
        self._is_down = False


def canonical(message: Message) -> list[Any]:
    """What makes two messages the same: role, text, calls, whom they answer. Clients add and drop the rest."""
    content = message.get("content") or ""
    if isinstance(content, list) and all(isinstance(p, dict) and p.get("type") == "text" for p in content):
        content = "".join(str(p.get("text", "")) for p in content)
    calls = [
        [call.get("id"), (call.get("function") or {}).get("name"), _arguments(call.get("function") or {})]
        for call in message.get("tool_calls") or []
    ]
    return [message.get("role"), content, calls, message.get("tool_call_id"), message.get("name")]


def _arguments(function: dict[str, Any]) -> Any:
    """What a call was given, however it is spaced: clients that hold it as an object write it anew."""
    text = function.get("arguments")
    try:
        return loads(text or "{}") if isinstance(text, str) else text
    except ValueError:
        return text


def prefix_hashes(messages: Sequence[Message]) -> list[str]:
    """For every i the sha256 of messages[: i + 1] in canonical form, each hash chained on the one before."""
    hashes: list[str] = []
    previous = ""
    for message in messages:
        previous = next_hash(previous, message)
        hashes.append(previous)
    return hashes


def next_hash(previous: str, message: Message) -> str:
    """The hash of a conversation that goes on with `message`, from the hash of what came before."""
    text = json.dumps(canonical(message), separators=(",", ":"), sort_keys=True)
    return hashlib.sha256(f"{previous}\n{text}".encode()).hexdigest()


def producer_of(message: Message) -> str | None:
    """Who wrote a message that came in a request: an assistant's turn that we did not see made has no known author."""
    role = message.get("role")
    return {"user": "user", "tool": "tool", "function": "tool", "system": "system", "developer": "system"}.get(
        str(role)
    )


# Built once: making a statement costs more than running it.
OPEN = (
    select(records.c.id, records.c.release, records.c.prefix, records.c.is_mixed)
    .where(records.c.agent == bindparam("agent"), records.c.principal == bindparam("principal"))
    .where(records.c.status == "open")
    .order_by(records.c.updated_at, records.c.seq)
)
OPEN_IN_SESSION = OPEN.where(records.c.session == bindparam("session"))
OPEN_BY_PREFIX = OPEN.where(records.c.prefix.in_(bindparam("prefixes", expanding=True)))
PAYLOADS = select(records.c.id, records.c.payload).where(records.c.id.in_(bindparam("ids", expanding=True)))
RELEASES = select(releases.c.name, releases.c.agent, releases.c.status, releases.c.path).where(
    releases.c.agent.in_(bindparam("agents", expanding=True)), releases.c.name.in_(bindparam("names", expanding=True))
)


def look(
    connection: Connection, agent: str, wish: Wish, urls: Sequence[str] = (), in_flight: Set[str] = frozenset()
) -> Seen:
    """`agent`: the shared one; `urls`: of the servers behind the gateway; `in_flight`: releases of requests that are
    being answered; an episode may have nothing stored yet but one."""
    who = {"agent": wish.agent, "principal": wish.principal}
    if wish.session is not None:
        rows = tuple(connection.execute(OPEN_IN_SESSION, {**who, "session": wish.session}))
    elif wish.hashes:
        rows = tuple(connection.execute(OPEN_BY_PREFIX, {**who, "prefixes": wish.hashes[-MAX_LOOKED_UP:]}))
    else:
        rows = ()
    hashes = set(wish.hashes)
    continued = [row.id for row in rows if row.prefix in hashes][-MAX_LOOKED_UP:]
    found = connection.execute(PAYLOADS, {"ids": continued}) if continued else ()
    payloads = {row.id: row.payload for row in found}
    alias = serving(connection, agent, wish.agent, urls)
    names = {wish.model, *in_flight, *(row.release for row in rows)} | ({alias} if alias else set())
    known = connection.execute(RELEASES, {"agents": sorted({agent, wish.agent}), "names": sorted(names)})
    tried = read_tried(connection, wish.agent, urls, time.time())
    return Seen(alias, rows, payloads, {row.name: row for row in known}, tried)


class Episodes:
    """Requests in flight and what was read last; everything durable is in the store."""

    def __init__(
        self, store: Store, agent: str, base_release: str, timeout_s: float, secret: bytes, urls: Sequence[str] = ()
    ) -> None:
        self.base_release = base_release
        self.watch = StoreWatch()
        self._store = store
        self._agent = agent
        self._timeout_s = timeout_s
        self._secret = secret
        self._urls = urls
        self._lock = asyncio.Lock()  # looking and claiming are one step
        self._leases: list[Lease] = []
        self._remembered: OrderedDict[tuple[str, str, str], Lease] = OrderedDict()
        self._last_alias: dict[str, tuple[str, bool]] = {}  # by agent, the shared one and tenants: and if it is bare
        self._named: OrderedDict[str, tuple[str, bool]] = OrderedDict()  # asked for by name and allowed: whose, if bare

    @property
    def busy(self) -> frozenset[str]:
        """Records that a request in flight will write to."""
        return frozenset(lease.record for lease in self._leases)

    async def begin(
        self,
        model: str,
        session: str | None,
        principal: str,
        messages: Sequence[Message],
        *,
        is_chat: bool = True,
        agent: str | None = None,
    ) -> Lease:
        """`agent`: whose record it makes, a tenant's, or the shared agent's (None). Raises Refusal: 404 for a model
        that may not serve, 503 when it was never read and the store is down."""
        hashes = prefix_hashes(messages)
        mine = agent or self._agent
        wish = Wish(model, mine, session, principal, messages, hashes if is_chat else [], hashes[-1])
        async with self._lock:
            seen = None if self.watch.is_down else await self._look(wish)
            if seen is None:
                return self._from_memory(wish)
            lease = self._decide(seen, wish)
            self._leases.append(lease)
            return lease

    async def finish(self, lease: Lease, prefix: str | None = None, *, is_done: bool = False) -> None:
        """The request is over; `prefix` is the hash of the conversation with its answer, when there is one."""
        try:
            async with self._lock:
                keys = [("session", lease.principal, lease.session)]
                if prefix is not None:
                    keys.append(("prefix", lease.principal, prefix))
                for key in keys:
                    self._remembered.pop(key, None)
                    if not is_done:
                        self._remembered[key] = lease
                while len(self._remembered) > MAX_REMEMBERED:
                    self._remembered.popitem(last=False)
        finally:  # also for a request that is cancelled while it waits here: its episode must not stay taken
            if lease in self._leases:
                self._leases.remove(lease)

    async def _look(self, wish: Wish) -> Seen | None:
        """None when the store cannot be read in time."""

        in_flight = {lease.release for lease in self._leases}

        def read() -> Seen:
            with self._store.read() as connection:
                return look(connection, self._agent, wish, self._urls, in_flight)

        try:
            async with asyncio.timeout(self._timeout_s):
                seen = await asyncio.to_thread(read)
        except (DataError, SQLAlchemyError, OSError) as error:  # a TimeoutError is an OSError
            self.watch.failed(error or type(error).__name__)
            return None
        self.watch.worked()
        return seen

    def _decide(self, seen: Seen, wish: Wish) -> Lease:
        alias = seen.alias or self.base_release
        self._last_alias[wish.agent] = alias, self._is_base(alias, seen)
        for row in seen.releases.values():
            if row.status in UNDONE:
                self._named.pop(row.name, None)
        is_alias = self._is_alias(wish)
        position = {prefix: i for i, prefix in enumerate(wish.hashes)}
        named = seen.releases.get(wish.model)
        is_moved = named is not None and named.status in UNDONE  # live episodes that asked for it go on elsewhere
        rows = [
            row for row in seen.open_records if is_alias or row.release == wish.model or (is_moved and row.is_mixed)
        ]
        episode, pinned = self._open_session(wish, rows, is_alias)
        match = self._continued(rows, position, episode if wish.session is not None else None)
        if match is not None:
            episode, pinned = episode_of(match.id), match.release
        fresh = uuid.uuid4().hex
        release = pinned or (self._of_new(alias, seen.tried, fresh) if is_alias else wish.model)
        is_undone = release in seen.releases and seen.releases[release].status in UNDONE
        if pinned is not None and is_undone:
            release = alias
        elif pinned is None and not is_alias:
            self._check_named(wish.model, seen)
        known: tuple[str | None, ...] = ()
        stored = None if match is None else seen.payloads.get(match.id)
        if match is not None:
            known = tuple(stored["producers"] if stored else ())[: position[match.prefix] + 1]
            record = match.id
        else:
            record = f"traj-{fresh}" if episode is None else f"{episode}~{fresh[:12]}"
        return Lease(
            episode=episode_of(record),
            record=record,
            agent=wish.agent,
            session=wish.session or episode_of(record),
            principal=wish.principal,
            release=release,
            is_base=self._is_base(release, seen),
            is_alias=is_alias,
            prefix=wish.prefix,
            after=None if match is None else match.prefix,
            producers=known + tuple(producer_of(m) for m in wish.messages[len(known) :]),
            tools_before=None if stored is None else tuple(stored.get("tools", ())),
            is_mixed=match is not None and (match.is_mixed or release != match.release),
            tried=seen.tried if is_alias and seen.tried is not None and release == seen.tried.incumbent else None,
        )

    def _is_alias(self, wish: Wish) -> bool:
        return wish.model in (self._agent, wish.agent)

    def _is_base(self, release: str, seen: Seen) -> bool:
        return release == self.base_release or (release in seen.releases and seen.releases[release].path is None)

    def _of_new(self, alias: str, tried: Tried | None, unit: str) -> str:
        """Which release begins to answer a new episode: no client can tell beforehand, and none can choose."""
        if tried is None or tried.kind != "canary" or tried.incumbent != alias or not tried.is_ready:
            return alias
        return tried.release if takes(tried, self._secret, unit) else alias

    def _open_session(self, wish: Wish, rows: Sequence[Any], is_alias: bool) -> tuple[str | None, str | None]:
        """(episode, release) of the session's open episode, stored or with its first answer still to come."""
        if wish.session is None:
            return None, None
        if rows:
            return episode_of(rows[-1].id), rows[-1].release
        for lease in reversed(self._leases):
            is_same = (lease.session, lease.principal) == (wish.session, wish.principal)
            if is_same and (is_alias or lease.release == wish.model):
                return lease.episode, lease.release
        return None, None

    def _continued(self, rows: Sequence[Any], position: dict[str, int], episode: str | None) -> Any:
        """The free record whose conversation is the longest prefix of the request's, or None."""
        busy = self.busy
        free = [row for row in rows if row.prefix in position and row.id not in busy]
        if episode is not None:
            free = [row for row in free if episode_of(row.id) == episode]
        return max(free, key=lambda row: position[row.prefix], default=None)

    def _check_named(self, model: str, seen: Seen) -> None:
        """Raise Refusal 404 unless it may serve whoever asks; what may is remembered."""
        row = seen.releases.get(model)
        is_bare = model == self.base_release and (row is None or row.status not in UNDONE)
        if row is None and not is_bare:
            raise unknown_model(model, self._agent)
        if row is not None and row.status != "released" and not is_bare:
            raise unknown_model(model, self._agent, f"may not serve (it is {row.status.replace('_', ' ')})")
        self._named[model] = self._agent if row is None else row.agent, self._is_base(model, seen)
        if len(self._named) > MAX_REMEMBERED:
            self._named.popitem(last=False)

    def _from_memory(self, wish: Wish) -> Lease:
        """The store cannot be read: an episode keeps its release, a new one gets the alias that was read last."""
        prefixes = [("prefix", wish.principal, h) for h in reversed(wish.hashes)]
        keys = prefixes if wish.session is None else [("session", wish.principal, wish.session)]
        before = next((self._remembered[key] for key in keys if key in self._remembered), None)
        is_alias = self._is_alias(wish)
        if before is not None and (is_alias or wish.model == before.release):
            episode, release, is_base = before.episode, before.release, before.is_base
        else:
            known = self._last_alias.get(wish.agent) or self._last_alias.get(self._agent)
            if not is_alias:
                owner, is_bare = self._named.get(wish.model, ("", False))
                known = (wish.model, is_bare) if owner in (self._agent, wish.agent) else None
            if known is None:
                message = f"the store cannot be read, and {wish.model!r} was never resolved before"
                raise Refusal(503, message, kind="api_error", code="store_unreachable")
            episode, (release, is_base) = f"traj-{uuid.uuid4().hex}", known
        return Lease(
            episode=episode,
            record=episode,
            agent=wish.agent,
            session=wish.session or episode,
            principal=wish.principal,
            release=release,
            is_base=is_base,
            is_alias=is_alias,
            prefix=wish.prefix,
            is_recordable=False,
        )
