"""Alias, replicas, episodes and collection under faults, in any order that Hypothesis finds: what serves is loaded on
every ready replica, what was rejected never serves, a rollback finds its target resident, nothing listed is deleted.
"""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import tempfile
from pathlib import Path
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test
from sqlalchemy import insert, select, update

from cltrain.config import from_dict
from cltrain.config_rollout import RolloutConfig
from cltrain.deploy import probes, readiness
from cltrain.deploy.replicas import Replicas
from cltrain.errors import ConflictError, ServerError
from cltrain.gateway.episodes import Episodes
from cltrain.gateway.errors import Refusal
from cltrain.gateway.upstream import Upstream
from cltrain.gateway.upstreams import Upstreams
from cltrain.records import Verdict
from cltrain.registry import aliases, lease, releases, rollouts
from cltrain.registry.decisions import read_decisions, verify_chain
from cltrain.rooms import Rooms, collect_garbage, tidy_server
from cltrain.store.database import open_store
from cltrain.store.schema import records, updates
from cltrain.tending import IDLE_S, tend
from tests.fleet_parts import Shelf, probes_of

AGENT = "support"
CANARY = RolloutConfig(kind="canary", weights=(0.5,), step_episodes=1, metrics=("faults",), margin=0.9).model_dump()
SOME_REPLICAS = st.sets(st.integers(0, 2), min_size=1)
LASTING = ("is_down", "is_full", "times_out_after_load", "mounts_wrong")
FAULTS = (*LASTING, "restarts", "loads_late")  # whoever mounts what is wrong restarted first


class Fleet(RuleBasedStateMachine):
    """Three replicas in memory; everything else is what runs in production, but the training and the gate."""

    def __init__(self) -> None:
        super().__init__()
        self.home = Path(tempfile.mkdtemp())
        self.store = open_store(self.home)
        self.now = 4e9  # later than the gateway's clock, whose trials and leases then last
        self.shelves = [Shelf(f"http://{letter}") for letter in "abc"]
        servers = Replicas(self.store, self.shelves, 2, clock=lambda: self.now)
        self.base = releases.ensure_base_release(self.store, AGENT, "ab" * 32, now=self.now).name
        fence = lease.acquire(self.store, AGENT, "machine", 1e9, self.now)
        config = from_dict(
            {"home": str(self.home), "agent": {"name": AGENT, "mode": "auto"}, "server": {"max_adapters": 12}}
        )
        nothing: Any = None  # what only a training and the gate need
        self.rooms = Rooms(
            config, self.store, nothing, servers, nothing, b"", (), "", (), nothing, fence, clock=lambda: self.now
        )
        self.num_made = 0
        self.under_way: tuple[str, aliases.Alias] | None = None
        self.unseen: set[int] = set()  # restarted since anybody looked
        self.is_rolled_back = False  # since the last look
        for _ in range(2):  # so that there is what a rollback would go to
            self.a_candidate_is_sealed_loaded_and_proved()
            self.the_gate_has_spoken(True)
            tend(self.rooms)

    def teardown(self) -> None:
        try:
            self.everything_heals()
        finally:
            self.store.close()
            for path in self.home.rglob("*"):
                if path.is_dir():
                    path.chmod(0o755)
            shutil.rmtree(self.home)

    # ------------------------------------------------------------ the worker and a person

    @precondition(lambda self: self.under_way is None and self.tried() is None)
    @rule()
    def a_candidate_is_sealed_loaded_and_proved(self) -> None:
        alias = aliases.read_alias(self.store, AGENT)
        self.num_made += 1
        made = self.home / "made"
        made.mkdir(exist_ok=True)
        (made / "adapter_config.json").write_text("{}")
        (made / "adapter_model.safetensors").write_text(f"weights {self.num_made}")
        found = releases.seal(self.store, self.home, AGENT, made, alias.release, {}, now=self.now)
        with self.store.write() as connection:
            connection.execute(
                insert(updates).values(
                    id=found.name, agent=AGENT, number=self.num_made, state="judging", parent=alias.release,
                    candidate=found.name, mode="auto", fence=self.rooms.fence, manifest={}, started_at=self.now,
                )
            )  # fmt: skip
        self.under_way = found.name, alias
        directory = self.directory(found.name)
        probes.keep(self.store, found.name, probes_of(directory), self.now)
        try:
            tidy_server(self.rooms)
            self.rooms.server.load(found.name, directory)
            self.rooms.server.prove(found.name, probes_of(directory))
        except ServerError:
            self.the_gate_has_spoken(False)
        self.looked()

    @precondition(lambda self: self.under_way is not None)
    @rule(is_good=st.booleans())
    def the_gate_has_spoken(self, is_good: bool, is_tried: bool = False) -> None:
        assert self.under_way is not None
        name, alias = self.under_way
        servers = self.rooms.server
        self.under_way = None
        try:
            with self.store.write() as connection:
                verdict = Verdict.PROMOTE if is_good else Verdict.REJECT
                done = update(updates).where(updates.c.candidate == name)
                connection.execute(done.values(state="done", verdict=verdict, summary={}))
                if is_good:
                    readiness.require_ready(connection, servers.urls, name, servers.min_ready)
                if is_good and is_tried:
                    rollouts.start_in(
                        connection, alias, release=name, update_id=name, settings=CANARY, raises_high_water=False,
                        fence=self.rooms.fence, now=self.now,
                    )  # fmt: skip
                elif is_good:
                    aliases.move_alias_in(
                        connection, AGENT, expected=alias, to=name, fence=self.rooms.fence, now=self.now
                    )
                else:
                    releases.retire(connection, name, "rejected", now=self.now, reason="no")
            assert not is_good or len(self.ready(name)) >= servers.min_ready
        except ConflictError:
            self.under_way = name, alias
            self.the_gate_has_spoken(False)

    @rule()
    def a_second_worker_takes_over(self) -> None:
        """It thinks the first is gone, which goes on: whatever that would move stays where it is."""
        first = self.rooms.fence
        self.rooms.fence = lease.acquire(
            self.store, AGENT, f"worker after {first}", 1e9, self.now, lambda holder: False
        )
        before = aliases.read_alias(self.store, AGENT)
        to = self.under_way[0] if self.under_way else before.previous or before.release
        with pytest.raises(ConflictError, match="is not the newest"), self.store.write() as connection:
            aliases.move_alias_in(connection, AGENT, expected=before, to=to, fence=first, now=self.now)
        with pytest.raises(ConflictError, match="is not the newest"), self.store.write() as connection:
            rollouts.start_in(
                connection, before, release=to, update_id=to, settings=CANARY, raises_high_water=False, fence=first,
                now=self.now,
            )  # fmt: skip
        assert aliases.read_alias(self.store, AGENT) == before

    @rule()
    def a_person_rolls_back(self) -> None:
        try:
            aliases.rollback(self.store, AGENT, now=self.now, reason="no", freeze=False)
            self.is_rolled_back = True
        except ConflictError:
            assert aliases.read_alias(self.store, AGENT).release == self.base

    @rule()
    def what_serves_is_loaded_once_more(self) -> None:
        name = aliases.read_alias(self.store, AGENT).release
        if name == self.base:
            return
        steady = {s for s in self.ready(name) if not s.is_down and s.held.get(name) == str(self.directory(name))}
        with contextlib.suppress(ServerError):
            self.rooms.server.load(name, self.directory(name))
        assert steady <= self.ready(name), "a repeated load costs no readiness"

    @rule()
    def the_worker_looks(self) -> None:
        tend(self.rooms)
        self.looked()

    @rule()
    def the_worker_collects(self) -> None:
        for _ in range(2):  # what nobody wants is seen, and when it has drained it goes
            with contextlib.suppress(ServerError):
                collect_garbage(self.rooms)
                self.looked()
            self.time_goes_by(61.0)

    @rule(seconds=st.sampled_from([1.0, 61.0, 301.0, 2 * IDLE_S]))
    def time_goes_by(self, seconds: float) -> None:
        self.now += seconds
        for shelf in self.shelves:
            shelf.land()

    # ------------------------------------------------------------ clients

    @rule(session=st.sampled_from(["s1", "s2"]))
    def a_client_asks(self, session: str) -> None:
        asyncio.run(self.ask(session))

    @rule()
    def somebody_wants_what_was_rejected(self) -> None:
        """By name, or by a person's promotion."""
        for rejected in releases.list_releases(self.store, AGENT, status="rejected"):
            episodes = Episodes(self.store, AGENT, self.base, 5.0, b"k")
            with pytest.raises(Refusal, match="may not serve"):
                asyncio.run(episodes.begin(rejected.name, None, "q", [{"role": "user", "content": "hi"}]))
            alias = aliases.read_alias(self.store, AGENT)
            with pytest.raises(ConflictError):
                aliases.move_alias(
                    self.store, AGENT, expected=alias, to=rejected.name, fence=None, now=self.now, is_human=True
                )

    @rule(session=st.sampled_from(["s1", "s2"]))
    def an_episode_ends(self, session: str) -> None:
        with self.store.write() as connection:
            connection.execute(update(records).where(records.c.session == session).values(status="ended"))

    async def ask(self, session: str) -> None:
        """One request through the gateway's own parts; an answer's text says whose weights gave it."""
        urls = [shelf.url for shelf in self.shelves]
        episodes = Episodes(self.store, AGENT, self.base, 5.0, b"k", urls)
        upstreams = Upstreams(
            self.store,
            [Upstream(s.url, base_model="base", transport=httpx.MockTransport(s.answer)) for s in self.shelves],
        )
        lease_of = await episodes.begin(AGENT, session, "p", [{"role": "user", "content": "hello"}])
        name = lease_of.release
        status = releases.get(self.store, name).status
        tried = self.tried()
        assert status == "released" or (tried is not None and name == tried.release), f"{name} is {status} and serves"
        could = [s for s in self.ready(name) if not s.is_down and (lease_of.is_base or name in s.held)]
        refusal, answer = None, {}
        try:
            _, answer = await upstreams.post(lease_of, "/v1/chat/completions", {"messages": []}, {})
        except Refusal as error:
            refusal = error
        await upstreams.close()
        if refusal is not None:
            assert refusal.status in (404, 502, 503), refusal  # of the alias's 404 the door makes 503, try again
            assert not could, f"{[s.url for s in could]} could have answered as {name}: {refusal}"
            return
        said = answer["choices"][0]["message"]["content"]
        assert said == ("base" if lease_of.is_base else str(self.directory(name)))
        with self.store.write() as connection:
            taken = select(records.c.id).where(records.c.session == session, records.c.status == "open")
            if connection.execute(taken).first() is None:
                connection.execute(
                    insert(records).values(
                        id=lease_of.record, agent=AGENT, session=session, principal="p", split="train", release=name,
                        status="open", is_mixed=False, end="ok", payload={"producers": []}, created_at=self.now,
                        updated_at=self.now,
                    )
                )  # fmt: skip

    # ------------------------------------------------------------ faults

    @rule(which=SOME_REPLICAS, faults=st.sets(st.sampled_from(FAULTS), min_size=1, max_size=2))
    def something_breaks(self, which: set[int], faults: set[str]) -> None:
        for number in which:
            shelf = self.shelves[number]
            if faults & {"restarts", "mounts_wrong"}:
                shelf.restart()
                self.unseen.add(number)
            for fault in faults - {"restarts"}:
                setattr(shelf, fault, True)

    @rule(which=SOME_REPLICAS, faults=st.sets(st.sampled_from(LASTING), min_size=1))
    def something_is_mended(self, which: set[int], faults: set[str]) -> None:
        for number in which:
            for fault in faults:
                setattr(self.shelves[number], fault, False)

    # ------------------------------------------------------------ what must hold

    @invariant()
    def what_serves_is_loaded_on_every_ready_replica(self) -> None:
        name = aliases.read_alias(self.store, AGENT).release
        if name == self.base:
            return
        for shelf in self.ready(name):
            if self.shelves.index(shelf) not in self.unseen:
                assert shelf.held.get(name) == str(self.directory(name)), shelf.url
                assert name not in shelf.lies, f"{shelf.url} answers as {name} with other weights and is ready"

    @invariant()
    def a_rollback_finds_its_target_on_every_ready_replica(self) -> None:
        alias = aliases.read_alias(self.store, AGENT)
        if alias.previous is None or self.is_rolled_back or alias.release == self.base:
            return
        target = releases.get(self.store, alias.previous)
        if target.path is None or target.status != "released":
            return
        for shelf in self.ready(alias.release):
            if self.shelves.index(shelf) not in self.unseen:
                assert target.name in shelf.held, f"{shelf.url} could not be rolled back"

    @invariant()
    def nothing_that_is_listed_anywhere_is_deleted(self) -> None:
        for shelf in self.shelves:
            for name, root in shelf.held.items():
                assert (Path(root) / "adapter_model.safetensors").is_file(), f"{shelf.url} lists {name}, which is gone"

    @invariant()
    def only_what_was_released_serves(self) -> None:
        alias = aliases.read_alias(self.store, AGENT)
        assert releases.get(self.store, alias.release).status == "released"

    def everything_heals(self) -> None:
        """Faults end: two looks later every replica is ready for what serves."""
        for shelf in self.shelves:
            shelf.restart()
            shelf.is_down = shelf.mounts_wrong = shelf.times_out_after_load = shelf.loads_late = shelf.is_full = False
        for _ in range(2):
            tend(self.rooms)
        assert set(self.ready(aliases.read_alias(self.store, AGENT).release)) == set(self.shelves)
        verify_chain(self.store)
        assert all(entry.payload["url"] for entry in read_decisions(self.store, AGENT, kind="replica"))

    # ------------------------------------------------------------ inside

    def tried(self) -> rollouts.Rollout | None:
        """What is tried on live traffic; see test_fleet_trials.py."""
        return rollouts.read_open(self.store, AGENT)

    def looked(self) -> None:
        self.unseen.clear()
        self.is_rolled_back &= any(shelf.is_full for shelf in self.shelves)  # what is two releases back has no room

    def directory(self, name: str) -> Path:
        found = releases.release_dir(self.home, releases.get(self.store, name))
        assert found is not None
        return found.resolve()

    def ready(self, name: str) -> set[Shelf]:
        """Who is ready for it as far as the store knows."""
        with self.store.read() as connection:
            places = readiness.places(connection, [shelf.url for shelf in self.shelves])
        is_up = {url for url, rows in places.items() if (row := rows.get(readiness.ITSELF)) and row.state == "up"}
        if name == self.base:
            return {shelf for shelf in self.shelves if shelf.url in is_up}
        return {shelf for shelf in self.shelves if readiness.is_ready(places[shelf.url], name)}


def explore(num_examples: int, num_steps: int, machine: type[Fleet] = Fleet) -> None:
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=num_examples,
            stateful_step_count=num_steps,
            deadline=None,
            derandomize=True,  # the same orders every time
            suppress_health_check=list(HealthCheck),
            print_blob=True,
        ),
    )


def test_in_any_order_of_faults_the_fleet_keeps_its_promises() -> None:
    explore(10, 30)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_in_many_orders_of_faults_the_fleet_keeps_its_promises() -> None:
    explore(50, 50)
