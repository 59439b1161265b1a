"""The fleet's state machine, with candidates that are tried on live traffic: beside an alias that does not move, on
replicas that fail, until they serve or go back.
"""

from __future__ import annotations

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import invariant, precondition, rule

from cltrain.errors import ConflictError
from cltrain.registry import aliases, releases, rollouts
from cltrain.rollout import look
from tests.test_fleet_machine import Fleet, explore


class Trials(Fleet):
    """Whatever the fleet does, and candidates on live traffic."""

    @precondition(lambda self: self.under_way is not None)
    @rule()
    def the_gate_lets_it_be_tried(self) -> None:
        self.the_gate_has_spoken(True, is_tried=True)

    @precondition(lambda self: self.tried() is not None)
    @rule(is_good=st.booleans(), num_episodes=st.sampled_from([0, 10]))
    def what_is_tried_is_judged(self, is_good: bool, num_episodes: int) -> None:
        tried = self.tried()
        assert tried is not None
        with self.store.write() as connection:
            for number in range(num_episodes):
                unit = f"{self.now}-{number}"
                pair = [(unit, "incumbent", False, None), (unit, "candidate", not is_good, None)]
                rollouts.add_outcomes_in(connection, tried.id, pair)
        is_ready = len(self.ready(tried.release)) >= self.rooms.server.min_ready
        look(self.rooms)
        serves = aliases.read_alias(self.store, self.rooms.agent).release == tried.release
        assert is_ready or (self.tried() is None and not serves), "too few hold it, and it goes on"

    @precondition(lambda self: self.tried() is not None)
    @rule()
    def who_lost_the_lease_judges(self) -> None:
        before = self.tried()
        self.a_second_worker_takes_over()
        newest, self.rooms.fence = self.rooms.fence, self.rooms.fence - 1
        with pytest.raises(ConflictError, match="is not the newest"):
            look(self.rooms)
        self.rooms.fence = newest
        assert self.tried() == before

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


def test_in_some_orders_what_is_tried_serves_or_goes_back() -> None:
    explore(3, 30, Trials)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_in_many_orders_what_is_tried_serves_or_goes_back() -> None:
    explore(8, 50, Trials)
