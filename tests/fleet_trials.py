"""The part of the fleet's state machine that tries candidates on live traffic; see test_fleet_machine.py."""

from __future__ import annotations

from hypothesis import strategies as st
from hypothesis.stateful import invariant, precondition, rule

from cltrain.config_rollout import RolloutConfig
from cltrain.registry import aliases, releases, rollouts
from cltrain.rollout import look
from cltrain.rooms import Rooms
from cltrain.store.database import Store
from tests.fleet_parts import Shelf

CANARY = RolloutConfig(kind="canary", weights=(0.5,), step_episodes=1, metrics=("faults",), margin=0.9).model_dump(
    mode="json"
)


class Trials:
    """What a machine with a store, replicas and a worker's rooms can do with a candidate that the gate let through."""

    store: Store
    rooms: Rooms
    now: float
    shelves: list[Shelf]
    unseen: set[int]

    def ready(self, name: str) -> set[Shelf]:
        raise NotImplementedError

    def tried(self) -> rollouts.Rollout | None:
        return rollouts.read_open(self.store, self.rooms.agent)

    @precondition(lambda self: self.tried() is not None)
    @rule(is_good=st.booleans(), num_episodes=st.sampled_from([0, 10]))
    def what_is_tried_is_judged(self, is_good: bool, num_episodes: int) -> None:
        tried = self.tried()
        assert tried is not None
        with self.store.write() as connection:
            for number in range(num_episodes):
                arms = {"incumbent": (False, None), "candidate": (not is_good, None)}
                rollouts.add_outcome_in(connection, tried.id, f"{self.now}-{number}", arms)
        is_ready = len(self.ready(tried.release)) >= self.rooms.server.min_ready
        look(self.rooms)
        serves = aliases.read_alias(self.store, self.rooms.agent).release == tried.release
        assert is_ready or (self.tried() is None and not serves), "too few hold it, and it goes on"

    @rule()
    def a_person_freezes_for_a_moment(self) -> None:
        aliases.freeze(self.store, self.rooms.agent, now=self.now, reason="a moment")
        assert self.tried() is None
        aliases.unfreeze(self.store, self.rooms.agent, now=self.now)

    @invariant()
    def what_is_tried_stands_beside_the_alias_that_it_was_judged_against(self) -> None:
        tried = self.tried()
        if tried is None:
            return
        assert aliases.read_alias(self.store, self.rooms.agent).release == tried.incumbent
        assert releases.get(self.store, tried.release).status == "candidate"
        for shelf in self.ready(tried.release):
            if self.shelves.index(shelf) not in self.unseen:
                assert tried.release in shelf.held, f"{shelf.url} lost what is tried and is ready for it"
