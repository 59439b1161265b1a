"""A long-lived adapter still learns: after 200 updates a new skill is learned as far as by a fresh one.

The step is bounded as always, the cumulative distances are left wide: an adapter that has reached one of those has no
room, and most of its updates are discarded however plastic it is. What is measured here is the adapter.
"""

import math

import pytest

from cltrain.config import BoundsConfig
from cltrain.objectives.geometry import effective_ranks
from cltrain.trainer.update import UpdateDiscarded
from tests.trainer_parts import make_tiny, skill_rows

NUM_UPDATES = 200
BOUNDS = BoundsConfig(step_kl=9, drift_kl=9, drift_frobenius=9, drift_spectral=9, day_frobenius=99)
STREAM = {"num_steps": 4, "lr": 0.01, "checkpoint_every": 99}


@pytest.mark.xfail(strict=True, reason="0.06 against 0.25 of the right token's probability; why is not yet known")
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_after_200_updates_of_a_changing_stream_a_new_skill_is_learned_as_well_as_by_a_fresh_adapter(tmp_path):
    tiny = make_tiny(tmp_path)
    made, seen, num_discarded = None, [], 0
    for number in range(NUM_UPDATES):
        skill = number // 5 % 8  # five updates of a skill, eight skills, the answers changed each time they come round
        fresh = skill_rows(skill, 4, answer=(skill + number // 40) % 8, seed=number)
        try:
            made = tiny.update(f"u{number}", fresh, seen[-24:], made, trainer=STREAM, bounds=BOUNDS)
        except UpdateDiscarded:  # at the cumulative bound: the incumbent stays
            num_discarded += 1
        seen += fresh
    print(f"{num_discarded} of {NUM_UPDATES} updates were discarded")
    new, held_out = skill_rows(20, 12, seed=1), skill_rows(20, 24, seed=2)
    learned = {}
    for name, start in (("old", made), ("fresh", None)):
        made = start
        for number in range(3):
            made = tiny.update(f"{name}-{number}", new, (), made, trainer={"num_steps": 12, "lr": 0.01}, bounds=BOUNDS)
        learned[name] = math.exp(-tiny.nll(made.adapter, held_out))
        print(f"{name}: {learned[name]:.3f} of the right token's probability, drift {made.candidate.bounds}")
        print(sorted(effective_ranks(made.adapter).values()))
    assert learned["fresh"] > 0.1, "there was something to learn"
    assert learned["old"] >= 0.9 * learned["fresh"]
