"""How an episode of a canary went: what is a fault, what is a score, and what is missing."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cltrain.records import Feedback
from cltrain.registry import rollouts
from cltrain.rollout import look
from cltrain.store.schema import named_records
from tests.rollout_parts import Trial, trial

BROKEN = '{"item": '


def test_a_time_out_is_a_fault_and_never_a_score(tmp_path: Path) -> None:
    with trial(tmp_path) as made:
        made.start()
        made.recorded(made.episode("incumbent", score=1.0))
        made.recorded(made.episode("candidate", score=1.0, end="timeout"))
        made.now += 20.0
        assert counted(made) == [("incumbent", False, 1.0), ("candidate", True, None)]


def test_a_correction_counts_as_the_worst_score_unless_its_source_gave_one(tmp_path: Path) -> None:
    right = {"role": "assistant", "content": "the lamp"}
    with trial(tmp_path) as made:
        made.start()
        alone, praised, scored, unknown = (made.episode("candidate") for _ in range(4))
        fix = {one.id: Feedback(f"{one.id}-fix", one.id, None, None, right, "operator", created_at=made.now)
               for one in (alone, praised, scored, unknown)}  # fmt: skip
        user = Feedback("user", praised.id, 1.0, created_at=made.now)
        score = Feedback("score", scored.id, 0.5, source="operator", created_at=made.now)
        made.recorded(
            replace(alone, feedback=(fix[alone.id],)),
            replace(praised, feedback=(fix[praised.id], user)),  # the operator is believed before the user
            replace(scored, feedback=(fix[scored.id], score)),
            replace(unknown, feedback=(replace(fix[unknown.id], source="stranger"),)),
        )
        made.now += 20.0
        assert [score for _, _, score in counted(made)] == [-1.0, -1.0, 0.5, None]


def test_an_answer_that_was_cut_short_is_missing_and_its_score_counts(tmp_path: Path) -> None:
    with trial(tmp_path) as made:
        made.start()
        cut, rated = (made.episode("candidate", score=score) for score in (None, -1.0))
        made.recorded(*(replace(o, generations=(replace(o.generations[0], finish_reason="length"),))
                        for o in (cut, rated)))  # fmt: skip
        made.now += 20.0
        assert counted(made) == [("candidate", False, -1.0)]


@pytest.mark.parametrize(("end", "score"), [("ok", 1.0), ("left", None)])
def test_a_fault_is_known_whatever_came_after_it(tmp_path: Path, end: str, score: float | None) -> None:
    with trial(tmp_path) as made:
        made.start()
        made.recorded(made.episode("candidate", score=1.0, calls=BROKEN, end=end))
        made.now += 20.0
        assert counted(made) == [("candidate", True, score)]


def test_a_canary_that_began_under_settings_that_are_refused_now_is_still_looked_at(tmp_path: Path) -> None:
    with trial(tmp_path, max_hours=1) as made:
        made.settings["settle_s"] = 3600.0
        made.start()
        made.now += 3601.0
        assert "1 hours are over" in str(look(made.rooms))


def counted(made: Trial) -> list[tuple[Any, ...]]:
    look(made.rooms)
    with made.store.read() as connection:
        return [tuple(row) for row in rollouts.outcomes_of(connection, 1)]


def test_what_is_said_after_an_episode_settled_does_not_count_however_late_the_look_is(tmp_path: Path) -> None:
    with trial(tmp_path) as made:
        made.start()
        early, late, none = (made.episode("candidate", score=-1.0) for _ in range(3))
        said = (replace(late.feedback[0], created_at=made.now + 10.1),)
        made.recorded(early, replace(late, feedback=said), replace(none, feedback=()))
        made.now += 3600.0
        assert counted(made) == [("candidate", False, -1.0), ("candidate", False, None), ("candidate", False, None)]


def test_a_tool_that_only_the_server_knows_is_no_fault_of_either_arm(tmp_path: Path) -> None:
    with trial(tmp_path) as made:
        made.start()
        asked = [made.episode("incumbent"), made.episode("candidate"), made.episode("candidate", calls=BROKEN)]
        made.recorded(*(replace(one, tools=({"type": "web_search"}, *one.tools)) for one in asked))
        made.now += 20.0
        assert [fault for _, fault, _ in counted(made)] == [False, False, True]


def test_an_episode_whose_client_named_the_release_is_no_evidence(tmp_path: Path) -> None:
    with trial(tmp_path) as made:
        made.start()
        named, drawn = made.episode("incumbent", score=-1.0), made.episode("incumbent")
        made.recorded(named, drawn)
        with made.store.write() as connection:
            connection.execute(named_records.insert().values(record=named.id))
        made.now += 20.0
        assert counted(made) == [("incumbent", False, None)]
