"""A candidate that the gate let through, tried beside what serves: a store, replicas in memory, no trainer, no gate."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sqlalchemy import insert

from cltrain.config import from_dict
from cltrain.deploy import probes, readiness
from cltrain.deploy.replicas import Replicas
from cltrain.experience.recording import Recorder
from cltrain.gate.sequential import Arm
from cltrain.records import Alias, Feedback, Generation, Trajectory
from cltrain.registry import aliases, lease, rollouts
from cltrain.registry.decisions import read_decisions
from cltrain.rooms import Rooms
from cltrain.store.database import Store
from cltrain.store.schema import records, rollouts as table, screenings, updates
from tests.fleet_parts import Shelf, probes_of
from tests.registry_parts import new_store, promoted, sealed

AGENT = "support"
BEGAN = 100.0


class Trial:
    """Two releases of a fleet of replicas in memory; `now` is moved by hand."""

    def __init__(self, home: Path, urls: Sequence[str], **rollout: Any) -> None:
        self.home = home
        self.store = new_store(home)
        self.now = BEGAN
        self.fence = lease.acquire(self.store, AGENT, "worker", 1e9, 1.0)
        self.incumbent = promoted(self.store, home, "good", self.fence)
        self.candidate = sealed(self.store, home, self.incumbent, "new")
        self.alias = aliases.read_alias(self.store, AGENT)
        values = {"kind": "canary", "weights": [0.5], "step_episodes": 20, "settle_s": 10.0, **rollout}
        config = from_dict({"home": str(home / "state"), "agent": {"name": AGENT, "mode": "auto"}, "rollout": values})
        self.settings = config.rollout.model_dump(mode="json")
        self.shelves = [Shelf(url) for url in urls]
        servers = Replicas(self.store, self.shelves, len(urls), clock=lambda: self.now)
        nothing: Any = None  # what only a training and the gate need
        self.rooms = Rooms(
            config, self.store, nothing, servers, nothing, b"", (), "", (), nothing, self.fence, clock=lambda: self.now
        )
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
        for name in (self.incumbent, self.candidate):
            directory = self.directory(name)
            probes.keep(self.store, name, probes_of(directory), self.now)
            servers.load(name, directory)
            servers.prove(name, probes_of(directory))

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

    def records(self) -> str:
        """What became of the record that its update learned."""
        with self.store.read() as connection:
            return str(connection.scalar(screenings.select().with_only_columns(screenings.c.status).where(
                screenings.c.record == "learned")))

    def episode(self, arm: Arm, *, calls: str = '{"item": "lamp"}', score: float | None = None, end: str = "ok") -> None:
        """One that the gateway recorded now: a call with these arguments, as `arm` answered it, and what was said."""
        number = random.randrange(10**9)
        release = self.candidate if arm == "candidate" else self.incumbent
        call = {"id": "c", "type": "function", "function": {"name": "find", "arguments": calls}}
        messages = ({"role": "user", "content": "hello"}, {"role": "assistant", "content": None, "tool_calls": [call]})
        said = () if score is None else (Feedback(f"f{number}", f"traj-{number}", score, created_at=self.now),)
        made = (Generation(f"gen-{number}", f"traj-{number}", 1, release),)
        one = Trajectory(
            f"traj-{number}", AGENT, f"s{number}", "ann", messages, ("user", "agent"), (FIND,), made, said,
            release=release, end=end, created_at=self.now,
        )  # fmt: skip
        with Recorder(self.store, b"k" * 32, 0.0) as recorder:
            assert recorder.add_trajectory(one)
        with self.store.write() as connection:
            connection.execute(records.update().where(records.c.id == one.id).values(prefix="seen by the gateway"))


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
