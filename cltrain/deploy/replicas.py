"""Several servers of one base behind one client's methods: loads go to all that answer, questions to those that hold
the release, and each is proved by itself. One that does not answer is out; one that refuses is an error.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeVar

from sqlalchemy import Row

from cltrain.deploy import probes, readiness, residents
from cltrain.deploy.client import AllScores, Answers
from cltrain.deploy.probes import Probes, prove_on
from cltrain.deploy.proof import NotProvedError, Probe, Proof
from cltrain.errors import NotHeldError, ServerError, UnavailableError
from cltrain.records import Message, Tool
from cltrain.store.database import Store

AskedT = TypeVar("AskedT")
FoundT = TypeVar("FoundT")
Prompt = tuple[Sequence[Message], Sequence[Tool]]
Listing = dict[str, str]  # named here because the classes hide the built-in

log = logging.getLogger(__name__)


class Server(residents.Residence, Protocol):
    """The part of ServerClient that a replica needs."""

    model: str

    def health(self) -> bool: ...
    def name_of(self, model: str) -> str: ...
    def close(self) -> None: ...
    def generate_many(
        self, model: str, prompts: Sequence[Prompt], max_tokens: int, concurrency: int = 16
    ) -> Answers: ...
    def score_many(self, model: str, pairs: Sequence[Probe]) -> AllScores: ...


@dataclass(frozen=True, slots=True)
class Failure:
    """A replica that answers under a release's name with other weights."""

    url: str
    release: str
    reason: str


class Replica:
    """One server; whatever is seen of it is written to the store (see readiness.py)."""

    def __init__(self, server: Server, store: Store, clock: Callable[[], float]) -> None:
        self.server, self.url = server, server.url
        self._store, self._clock = store, clock
        self._complaint = ""

    def list(self) -> Listing:
        listed = self.ask(lambda server: server.list())
        readiness.note_listed(self._store, self.url, listed, self._clock())
        return listed

    def load(self, name: str, path: Path) -> None:
        if self.list().get(name) == str(path):  # asked, not remembered: after a restart it must be proved again
            return
        readiness.note_loading(self._store, self.url, name, str(path), self._clock())
        try:
            self.ask(lambda server: server.load(name, path))
        except UnavailableError:
            raise
        except ServerError:
            readiness.note_gone(self._store, self.url, name)
            raise
        readiness.note_loaded(self._store, self.url, name, str(path), self._clock())

    def unload(self, name: str) -> None:
        self.ask(lambda server: server.unload(name))
        readiness.note_gone(self._store, self.url, name)

    def prove(self, name: str, kept: Probes) -> Proof:
        """Raises NotProvedError where other weights answer."""
        try:
            found = self.ask(lambda server: prove_on(server, name, server.model, kept))
        except NotProvedError:
            self._mark(readiness.mark_failed, name)
            raise
        self._mark(readiness.mark_proved, name)
        return found

    def _mark(self, mark: Callable[[Store, str, str, str, float], None], name: str) -> None:
        if name == self.server.model:
            return
        root = self.list().get(name)
        if root is None:
            raise UnavailableError(f"{self.url} lost {name} while it was asked to prove it")
        mark(self._store, self.url, name, root, self._clock())

    def ask(self, question: Callable[[Server], FoundT]) -> FoundT:
        """What the server says to it; one that is away is noted to be out, one without the model to be without it."""
        try:
            return question(self.server)
        except NotHeldError as error:
            readiness.note_not_held(self._store, self.url, error.model)
            raise
        except UnavailableError:
            readiness.note_out(self._store, self.url, self._clock())
            raise

    def look_after(self, wanted: residents.Wanted, again_s: float) -> tuple[Failure, ...]:
        """Give it what it lacks and prove that; what serves comes last, for then it is ready. Returns what failed its
        proof and had not before. `again_s`: seconds after which what serves, or failed, is proved again."""
        try:
            residents.reconcile(self, wanted.loadable)
        except UnavailableError:
            return ()
        except ServerError as error:  # a file that it refuses keeps it from serving only if that is needed
            if str(error) != self._complaint:
                log.warning("%s", error)
            self._complaint = str(error)
        places, failures = wanted.directories, []
        rows = {name: row for name, row in self.held().items() if str(places.get(name)) == row.root}  # as we loaded it
        if not wanted.needed <= set(rows):
            return ()
        order = sorted(rows, key=lambda name: (name == wanted.serving, name not in wanted.needed))
        for name in order:
            is_serving = name == wanted.serving
            if not self._is_due(rows[name], again_s, is_serving or name == wanted.tried):
                continue
            if is_serving and any(self.held()[one].state != "proved" for one in wanted.needed - {name}):
                continue
            if (kept := probes.kept_of(self._store, name)) is None:
                continue
            try:
                self.prove(name, kept)
            except UnavailableError:
                break
            except NotProvedError as error:
                if rows[name].state != "failed":
                    failures.append(Failure(self.url, name, str(error)))
            except ServerError as error:
                log.warning("%s could not be asked to prove %s: %s", self.url, name, error)
        return tuple(failures)

    def _is_due(self, row: Row, again_s: float, is_answering: bool) -> bool:
        is_old = self._clock() - row.seen_at >= again_s
        if row.state == "proved":
            return is_answering and is_old
        return row.state != "failed" or is_old

    def held(self) -> dict[str, Row]:
        """What it listed last, if it answers."""
        with self._store.read() as connection:
            return readiness.held(connection, self.url)


class Replicas:
    """N servers as one. What fewer than `min_ready` of them can do raises what the last one said."""

    def __init__(
        self, store: Store, servers: Sequence[Server], min_ready: int = 1, clock: Callable[[], float] = time.time
    ) -> None:
        self.members = tuple(Replica(server, store, clock) for server in servers)
        self.model = servers[0].model
        self.min_ready = min_ready
        self._store = store

    @property
    def urls(self) -> tuple[str, ...]:
        return tuple(member.url for member in self.members)

    @property
    def url(self) -> str:
        """For messages."""
        return ", ".join(self.urls)

    def url_for(self, model: str) -> str:
        """One replica that holds the model, for programs that ask it themselves. Raises UnavailableError."""
        return self._holders(model, ())[0].url

    def name_of(self, model: str) -> str:
        """What a program that asks a replica itself must call the model."""
        return self.members[0].server.name_of(model)

    def close(self) -> None:
        for member in self.members:
            member.server.close()

    def health(self) -> bool:
        """Whether enough replicas answer to carry an update through."""
        return sum(member.server.health() for member in self.members) >= self.min_ready

    def listings(self) -> Sequence[tuple[str, str, str]]:
        """(url, name, root) of every adapter that a replica lists which answers."""
        listings = self._on_each(lambda member: (member.url, member.list()), self.members)
        return sorted((url, name, root) for url, listing in listings for name, root in listing.items())

    def load(self, name: str, path: Path) -> None:
        """On every replica that answers. Raises ServerError when one refuses, or too few answer."""
        self._on_each(lambda member: member.load(name, path), self._answering())

    def load_on_first(self, name: str, path: Path) -> None:
        """On one replica that answers: what is not judged yet touches no other."""
        away = UnavailableError(f"none of {len(self.members)} replicas answers")
        for member in self._answering():
            try:
                return member.load(name, path)
            except UnavailableError as error:
                away = error
        raise away

    def roll(self, name: str, path: Path, kept: Probes) -> None:
        """From replica to replica: the next is touched when the one before holds it and proved it. Raises what one
        refuses, or fails to prove; one that is away gets it when it is back."""
        for member in self._answering():
            try:
                member.load(name, path)
                member.prove(name, kept)
            except UnavailableError as error:
                log.warning("%s is left out of the roll: %s", member.url, error)

    def prove(self, name: str, kept: Probes, num_needed: int | None = None) -> Proof:
        """The weakest of the proofs of every replica that answers; NotProvedError when one fails it. `num_needed`: how
        many must hold it; None: `min_ready`."""
        members = self._answering()
        if len(self.members) > 1 and name != self.model:
            members = [member for member in members if name in member.held()]
        proofs = self._on_each(lambda member: member.prove(name, kept), members, num_needed)
        return max(proofs, key=lambda proof: (proof.verdict == "indistinguishable", proof.max_error))

    def tidy(self, wanted: residents.Wanted, *, agent: str, now: float, drain_s: float, max_adapters: int) -> None:
        """Unload what nobody wants, leaving room for one more, and load what is missing, wherever somebody answers."""

        def tidy_one(member: Replica) -> None:
            residents.collect(
                member, self._store, agent=agent, wanted=wanted.directories, now=now, drain_s=drain_s,
                max_adapters=max_adapters,
            )  # fmt: skip
            residents.reconcile(member, wanted.loadable)

        self._on_each(tidy_one, self.members)

    def look_after(self, wanted: residents.Wanted, again_s: float) -> Sequence[Failure]:
        """One look at every replica, at the same time; see Replica.look_after."""
        with ThreadPoolExecutor(len(self.members)) as pool:
            found = pool.map(lambda member: member.look_after(wanted, again_s), self.members)
            return [failure for failures in found for failure in failures]

    def unload_idle(self, wanted: residents.Wanted, *, agent: str, now: float, idle_s: float) -> None:
        """What nobody wants and nothing was done with for `idle_s`, wherever somebody answers."""
        self._on_each(
            lambda member: residents.unload_idle(
                member, self._store, agent=agent, wanted=wanted.directories, now=now, idle_s=idle_s
            ),
            self._answering(),
        )

    def generate_many(self, model: str, prompts: Sequence[Prompt], max_tokens: int, concurrency: int = 16) -> Answers:
        """As ServerClient's; `concurrency` at a time on each replica that holds the model."""
        found = self._spread(
            model, prompts, lambda server, part: server.generate_many(model, part, max_tokens, concurrency)
        )
        return list(found)

    def score_many(self, model: str, pairs: Sequence[Probe]) -> AllScores:
        return list(self._spread(model, pairs, lambda server, part: server.score_many(model, part)))

    # ------------------------------------------------------------ inside

    def _answering(self) -> Sequence[Replica]:
        """Those that answered when they were last asked; if there are none, whoever may by now."""
        return [m for m in self.members if not readiness.is_out(self._store, m.url)] or self.members

    def _holders(self, model: str, without: Collection[Replica]) -> Sequence[Replica]:
        """Who should be asked as `model`: those that proved it, else those that list it without having failed."""
        if len(self.members) == 1:
            return [member for member in self.members if member not in without]
        if model == self.model:
            return [member for member in self._answering() if member not in without]
        with self._store.read() as connection:
            rows = readiness.places(connection, self.urls)
        states = {m: rows[m.url][model].state for m in self.members if model in rows[m.url] and m not in without}
        proved = [member for member, state in states.items() if state == "proved"]
        return proved or [member for member, state in states.items() if state in ("loaded", "draining")]

    def _spread(
        self,
        model: str,
        asked: Sequence[AskedT],
        ask: Callable[[Server, Sequence[AskedT]], Sequence[FoundT]],
    ) -> Sequence[FoundT]:
        """Every question to one holder of the model. What one that is away was asked goes to the others: an answer for
        the gate may be asked for twice."""
        found: dict[int, FoundT] = {}
        away: dict[Replica, UnavailableError] = {}
        while len(found) < len(asked):
            left = [i for i in range(len(asked)) if i not in found]
            holders = self._holders(model, away)[: len(left)]
            if not holders:
                raise next(reversed(away.values()), UnavailableError(f"no replica holds {model}"))
            shares = {member: left[i :: len(holders)] for i, member in enumerate(holders)}
            with ThreadPoolExecutor(len(holders)) as pool:
                tasks = {
                    member: pool.submit(member.ask, lambda server, s=share: ask(server, [asked[i] for i in s]))
                    for member, share in shares.items()
                }
            for member, share in shares.items():
                try:
                    found.update(zip(share, tasks[member].result(), strict=True))
                except UnavailableError as error:
                    away[member] = error
        return [found[i] for i in range(len(asked))]

    def _on_each(
        self, call: Callable[[Replica], FoundT], members: Sequence[Replica], num_needed: int | None = None
    ) -> Sequence[FoundT]:
        """The call's results on those that answer. Raises what one refuses; UnavailableError when too few answer."""
        with ThreadPoolExecutor(max(1, len(members))) as pool:
            tasks = [pool.submit(call, member) for member in members]
        found: list[FoundT] = []
        away = None
        for task in tasks:
            try:
                found.append(task.result())
            except UnavailableError as error:
                away = error
        if len(found) >= (num_needed or self.min_ready):
            return found
        if away is not None and len(self.members) == 1:
            raise away
        raise UnavailableError(
            f"{len(found)} of {len(self.members)} replicas answer (server.min_ready = {self.min_ready}): {away}"
        )
