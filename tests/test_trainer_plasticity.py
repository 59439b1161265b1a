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
@pytest.mark.timeout(900)
def test_after_200_updates_of_a_changing_stream_new_skills_are_learned_as_well_as_by_a_fresh_adapter(tmp_path):
    learned = {"old": [], "fresh": []}
    for stream in range(4):  # of one alone the ratio lies anywhere from 0.6 to 1.2
        tiny = make_tiny(tmp_path / str(stream))
        worn = after_200_updates(tiny, stream)
        for name, start in (("old", worn), ("fresh", None)):
            learned[name].append(statistics.mean(new_skill(tiny, skill, stream, start) for skill in NEW_SKILLS))
    print("probability of the right token:", learned)
    assert statistics.mean(learned["fresh"]) > 0.2, "there was something to learn"
    assert statistics.mean(learned["old"]) >= 0.9 * statistics.mean(learned["fresh"])


def after_200_updates(tiny, stream):
    """Five updates of a skill, eight skills, the answers changed each time that they come round."""
    made, seen = None, []
    for number in range(NUM_UPDATES):
        skill = number // 5 % 8
        fresh = skill_rows(skill, 4, answer=(skill + number // 40) % 8, seed=number + 1000 * stream)
        made = tiny.update(f"u{number}", fresh, seen[-24:], made, trainer=STREAM, bounds=BOUNDS)
        seen += fresh
    assert made.candidate.bounds.drift_frobenius > 0.9 * BOUNDS.drift_frobenius, "it was to be tested at its bound"
    return made


def new_skill(tiny, skill, stream, start):
    """The probability of the right token on held-out rows of a skill, four updates later."""
    rows, after = skill_rows(skill, 12, seed=1 + 1000 * stream), start
    for number in range(4):
        name = f"{'fresh' if start is None else 'old'}-{skill}-{number}"
        after = tiny.update(name, rows, (), after, trainer=NEW, bounds=BOUNDS)
    return math.exp(-tiny.nll(after.adapter, skill_rows(skill, 24, seed=2)))
