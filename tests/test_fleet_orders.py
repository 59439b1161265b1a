"""Orders of faults that the fleet's state machine finds seldom, each played once."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.test_fleet_machine import Fleet


def absent_while_its_candidate_is_rejected(fleet: Fleet) -> None:
    fleet.a_candidate_is_sealed_loaded_and_proved()
    fleet.something_breaks({0}, {"is_down"})
    fleet.the_gate_has_spoken(False)
    fleet.the_worker_collects()


def restarted_with_room_for_one(fleet: Fleet) -> None:
    fleet.something_breaks({0}, {"restarts", "is_full"})
    fleet.the_worker_looks()


def two_gone_before_the_flip(fleet: Fleet) -> None:
    fleet.a_candidate_is_sealed_loaded_and_proved()
    fleet.something_breaks({0, 1}, {"is_down"})
    fleet.the_worker_looks()
    fleet.the_gate_has_spoken(True)


def restarted_on_other_weights(fleet: Fleet) -> None:
    fleet.something_breaks({0}, {"mounts_wrong"})
    fleet.what_serves_is_loaded_once_more()
    fleet.a_client_asks("s1")
    fleet.the_worker_looks()


@pytest.mark.parametrize(
    "play",
    [
        absent_while_its_candidate_is_rejected,
        restarted_with_room_for_one,
        two_gone_before_the_flip,
        restarted_on_other_weights,
    ],
)
def test_orders_of_faults_that_chance_finds_seldom(play: Callable[[Fleet], None]) -> None:
    fleet = Fleet()
    play(fleet)
    fleet.what_serves_is_loaded_on_every_ready_replica()
    fleet.a_rollback_finds_its_target_on_every_ready_replica()
    fleet.nothing_that_is_listed_anywhere_is_deleted()
    fleet.only_what_was_released_serves()
    fleet.teardown()
