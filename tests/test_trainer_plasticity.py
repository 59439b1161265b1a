"""A long-lived adapter still learns: after 200 updates at its cumulative bound, new skills are learned as far as by a
fresh one.

The KL bounds are left wide: the base is random, and each of its updates changes far more of what it says than a
trained one's would.
"""

import math
import statistics

import pytest

from cltrain.config import BoundsConfig
from tests.trainer_parts import make_tiny, skill_rows

NUM_UPDATES = 200
NEW_SKILLS = range(20, 28)
BOUNDS = BoundsConfig(step_kl=9, drift_kl=9, day_frobenius=99)
STREAM = {"num_steps": 4, "lr": 0.01, "checkpoint_every": 99}
NEW = {"num_steps": 12, "lr": 0.01, "checkpoint_every": 99}


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_after_200_updates_of_a_changing_stream_new_skills_are_learned_as_well_as_by_a_fresh_adapter(tmp_path):
    tiny = make_tiny(tmp_path)
    made, seen = None, []
    for number in range(NUM_UPDATES):
        skill = number // 5 % 8  # five updates of a skill, eight skills, the answers changed each time they come round
        fresh = skill_rows(skill, 4, answer=(skill + number // 40) % 8, seed=number)
        made = tiny.update(f"u{number}", fresh, seen[-24:], made, trainer=STREAM, bounds=BOUNDS)
        seen += fresh
    assert made.candidate.bounds.drift_frobenius > 0.9 * BOUNDS.drift_frobenius, "it was to be tested at its bound"
    learned = {"old": [], "fresh": []}
    for name, start in (("old", made), ("fresh", None)):
        for skill in NEW_SKILLS:
            after = start
            for number in range(4):
                after = tiny.update(
                    f"{name}-{skill}-{number}", skill_rows(skill, 12, seed=1), (), after, trainer=NEW, bounds=BOUNDS
                )
            learned[name].append(math.exp(-tiny.nll(after.adapter, skill_rows(skill, 24, seed=2))))
        print(name, "probability of the right token:", [round(p, 2) for p in learned[name]])
    assert statistics.mean(learned["fresh"]) > 0.2, "there was something to learn"
    assert statistics.mean(learned["old"]) >= 0.9 * statistics.mean(learned["fresh"])
