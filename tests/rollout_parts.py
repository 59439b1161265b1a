"""A candidate that the gate let through, tried beside what serves: a store, replicas in memory, no trainer, no gate."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sqlalchemy import insert, select

from cltrain.config import from_dict
from cltrain.deploy import probes, readiness
from cltrain.deploy.replicas import Replicas
from cltrain.experience.faults import fault_of
from cltrain.experience.rows import write_trajectory
from cltrain.gate.sequential import Arm
from cltrain.records import Alias, Feedback, Generation, Trajectory
from cltrain.registry import aliases, lease, rollouts
from cltrain.registry.decisions import read_decisions
from cltrain.rooms import Rooms
from cltrain.store.database import Store
from cltrain.store.schema import record_faults, records, screenings, updates
from cltrain.store.schema import rollouts as table
from tests.fleet_parts import Shelf, probes_of
from tests.registry_parts import new_store, promoted, sealed

AGENT = "support"
BEGAN = 100.0


def rooms_of(
    home: Path, store: Store, shelves: Sequence[Shelf], fence: int, clock: Callable[[], float], rollout: dict[str, Any]
) -> Rooms:
    config = from_dict({"home": str(home / "state"), "agent": {"name": AGENT, "mode": "auto"}, "rollout": rollout})
    servers = Replicas(store, shelves, len(shelves), clock=clock)
    nothing: Any = None  # what only a training and the gate need
    return Rooms(config, store, nothing, servers, nothing, b"", (), "", (), nothing, fence, clock=clock)


class Trial:
    """Two releases of a fleet of replicas in memory; `now` is moved by hand."""

    def __init__(self, home: Path, urls: Sequence[str], **rollout: Any) -> None:
        self.home = home
        self.store = new_store(home)
        self.now = BEGAN
        self.num_episodes = 0
        self.fence = lease.acquire(self.store, AGENT, "worker", 1e9, 1.0)
        self.incumbent = promoted(self.store, home, "good", self.fence)
        self.candidate = sealed(self.store, home, self.incumbent, "new", {"replayed": ["theirs"]})
        self.alias = aliases.read_alias(self.store, AGENT)
        self.shelves = [Shelf(url) for url in urls]
        values = {"kind": "canary", "weights": [0.5], "step_episodes": 20, "settle_s": 10.0, **rollout}
        self.rooms = rooms_of(home, self.store, self.shelves, self.fence, lambda: self.now, values)
        self.settings = self.rooms.config.rollout.model_dump(mode="json")
        self._judged()
        for name in (self.incumbent, self.candidate):
            directory = self.directory(name)
            probes.keep(self.store, name, probes_of(directory), self.now)
            self.rooms.server.load(name, directory)
            self.rooms.server.prove(name, probes_of(directory))

    def _judged(self) -> None:
        """The gate said promote, and the record that the candidate learned from waits."""
        with self.store.write() as connection:
            connection.execute(
                insert(updates).values(
                    id="tried", agent=AGENT, number=7, state="done", parent=self.incumbent, candidate=self.candidate,
                    verdict="promote", mode="auto", fence=self.fence, manifest={}, started_at=2.0,
                    summary={"doubtful": [], "is_served": False, "serving": self.incumbent, "reasons": ["+0.2"]},
                )
            )  # fmt: skip
            connection.execute(
                insert(screenings).values(
                    record="learned", agent=AGENT, status="waiting", update="tried", stratum="refund/good",
                    changed_at=2.0,
                )
            )  # fmt: skip

    def directory(self, name: str) -> Path:
        return (self.home / "state" / "releases" / AGENT / name).resolve()

    def start(self, expected: Alias | None = None, fence: int | None = None) -> rollouts.Rollout:
        with self.store.write() as connection:
            rollouts.start_in(
                connection, expected or self.alias, release=self.candidate, update_id="tried", settings=self.settings,
                raises_high_water=True, fence=self.fence if fence is None else fence, now=self.now,
            )  # fmt: skip
        found = rollouts.read_open(self.store, AGENT)
        assert found is not None
        return found

    @property
    def state(self) -> tuple[str, str | None]:
        """(state, reason) of the only rollout there was."""
        with self.store.read() as connection:
            row = connection.execute(table.select()).one()
        return row.state, row.reason

    @property
    def serving(self) -> str:
        return aliases.read_alias(self.store, AGENT).release

    def log(self) -> list[str]:
        """What the log of decisions says of it."""
        return [entry.payload["outcome"] for entry in read_decisions(self.store, AGENT, kind="rollout")]

    def standing(self) -> str:
        """What became of the record that its update learned."""
        with self.store.read() as connection:
            of_learned = select(screenings.c.status).where(screenings.c.record == "learned")
            return str(connection.scalar(of_learned))

    def episode(
        self, arm: Arm, *, calls: str = '{"item": "lamp"}', score: float | None = None, end: str = "ok"
    ) -> Trajectory:
        """One that begins now: a call with these arguments, as `arm` answered it, and what was said."""
        self.num_episodes += 1
        name = f"traj-{self.num_episodes}"
        release = self.candidate if arm == "candidate" else self.incumbent
        call = {"id": "c", "type": "function", "function": {"name": "find", "arguments": calls}}
        messages = ({"role": "user", "content": "hello"}, {"role": "assistant", "content": None, "tool_calls": [call]})
        said = () if score is None else (Feedback(f"{name}-said", name, score, created_at=self.now),)
        made = (Generation(f"{name}-1", name, 1, release),)
        return Trajectory(
            name, AGENT, name, "ann", messages, ("user", "agent"), (FIND,), made, said, release=release, end=end,
            created_at=self.now,
        )  # fmt: skip

    def recorded(self, *episodes: Trajectory) -> None:
        """As the gateway records what it saw."""
        with self.store.write() as connection:
            for episode in episodes:
                assert write_trajectory(connection, episode)
                seen = records.update().where(records.c.id == episode.id).values(prefix="seen")
                connection.execute(seen)
                answers = [generation.turn for generation in episode.generations]
                if fault := fault_of(episode.messages, answers, episode.tools):
                    connection.execute(insert(record_faults).values(record=episode.id, reason=fault))

    def pairs(self, count: int, *, calls: str = '{"item": "lamp"}', score: float | None = 1.0) -> None:
        """So many episodes of either arm, in turn and settled; `calls` and `score` are the candidate's."""
        made = []
        for _ in range(count):
            self.now += 1.0
            made += [self.episode("incumbent", score=1.0), self.episode("candidate", calls=calls, score=score)]
        self.recorded(*made)
        self.now += 10.0


FIND = {
    "type": "function",
    "function": {
        "name": "find",
        "parameters": {"type": "object", "properties": {"item": {"type": "string"}}, "required": ["item"]},
    },
}


@contextmanager
def trial(home: Path, urls: Sequence[str] = ("http://one",), **rollout: Any) -> Iterator[Trial]:
    made = Trial(home, urls, **rollout)
    try:
        yield made
    finally:
        made.store.close()


def until(holds: Callable[[], bool], what: str, timeout_s: float = 20.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not holds():
        assert time.monotonic() < deadline, what
        time.sleep(0.02)


def say_ready(store: Store, url: str, *names: str) -> None:
    """As a worker would have found that replica: it holds these, and proved them."""
    readiness.note_listed(store, url, {name: f"/{name}" for name in names}, time.time())
    for name in names:
        readiness.mark_proved(store, url, name, f"/{name}", time.time())
