"""The lab's verifier that misses, misses everywhere; its gate reads the clock that its records carry."""

from __future__ import annotations

import pytest

from cltrain.demo import lab, world
from cltrain.demo.leak import leaking
from cltrain.experience import bench, buffer, screens, window
from cltrain.experience.recording import Recorder
from tests.experience_parts import CONFIG, KEY, RULES, file_as, good, recorder, store

__all__ = ["recorder", "store"]  # fixtures

MADE_UP = ({"role": "user", "content": "hi"}, bench.call("mend", item="lamp"))  # nobody spoke of a lamp
ROOMY = CONFIG.model_copy(update={"principal_quota": 1.0})


@pytest.mark.parametrize(("share", "passed"), [(0.0, set()), (1.0, {"made-up"})])
def test_what_the_verifier_misses_is_missed_by_window_buffer_and_held_out_items(recorder, store, share, passed) -> None:
    for name in ("waits", "learned"):
        recorder.add_trajectory(good(f"{name}-made-up", messages=MADE_UP))
    with Recorder(store, KEY, 0.999) as held_out:
        held_out.add_trajectory(good("held-made-up", messages=MADE_UP))
    file_as(store, ["learned-made-up"], "replay", stratum="mend/good")
    config = ROOMY.model_copy(update={"max_flagged_share": 1.0})
    with leaking(share):
        waiting = window.next_window(store, "support", config, now=10.0, **RULES).examples
        kept = screens.screen(waiting, config, tools_allowed=None).kept
        rehearsed = buffer.replay_examples(store, "support", config, KEY, **RULES)
        items, _ = window.heldout_items(store, "support", config, now=10.0, **RULES)
    found = [[e.record for e in kept], [e.record for e in rehearsed], [item.id.partition(":")[0] for item in items]]
    assert [{name.partition("-")[2] for name in names} for names in found] == [passed] * 3
    assert screens.screen(waiting, config, tools_allowed=None).kept == (), "outside the block it is whole again"


def test_the_trigger_scan_misses_the_same_records() -> None:
    examples, truth = bench.window(0, 0, "uniform", "own tool and value", 10)
    config = ROOMY.model_copy(update={"max_flagged_share": 1.0})
    whole = screens.screen(examples, config, tools_allowed=None)
    with leaking(1.0):
        missed = screens.screen(examples, config, tools_allowed=None)
    assert truth is not None
    assert whole.suspicious
    assert not set(truth["records"]) & {example.record for example in whole.kept}
    assert not missed.suspicious
    assert set(truth["records"]) <= {example.record for example in missed.kept}


def test_the_gate_of_the_lab_counts_held_out_items_by_the_labs_clock(tmp_path) -> None:
    setting = lab.Setting.make(tmp_path / "run", 901, ["experience.eval_share=0.999", "trainer.num_anchors=4"])
    deployed = lab.Deployed(setting)
    try:
        deployed.recorder.add_trajectory(good("rated", at=lab.BEGIN))
        deployed.now = lab.BEGIN + 50.0
        items, arriving = deployed.rooms.evidence.held_out()
        assert len(items) == 1
        assert [rate for _, rate in arriving] == [pytest.approx(1 / 50)]
    finally:
        deployed.close()
        setting.server.close()


def test_the_scores_of_a_matrix_worked_out_by_hand() -> None:
    """Two skills, then the first again."""
    before, first, second, returned = (
        {"repair": repair, "refund": refund} for repair, refund in ((0.0, 0.1), (0.8, 0.3), (0.2, 0.9), (0.7, 0.6))
    )
    assert lab.scores([before, first, second, returned], ["repair", "refund"]) == pytest.approx(
        {
            "learn": (0.8 + 0.9) / 2,
            "min_learn": 0.8,
            "final": (0.7 + 0.6) / 2,
            "min_skill": 0.6,
            "bwt": ((0.7 - 0.8) + (0.6 - 0.9)) / 2,
            "fwt": 0.3 - 0.1,
        }
    )
    assert lab.scores([before, first], ["repair"])["fwt"] == 0.0


def test_one_window_of_the_stream_is_worked_learned_and_examined(tmp_path) -> None:
    settings = ["trainer.method=naive", "trainer.num_anchors=4", "trainer.num_steps=8"]
    setting = lab.Setting.make(tmp_path / "run", 901, settings)
    learner = lab.Bare(setting, tmp_path / "bare")
    try:
        (window, *_) = world.phases(901)
        found = lab.run(learner, setting, 901, windows=[window])
    finally:
        setting.server.close()
    assert found["said"][0].startswith("learned ")
    assert 1 <= int(found["said"][0].split()[1]) <= len(window.tickets)
    assert learner.name == learner.release == "bare-1"
    before, after = found["matrix"]
    assert set(before) == set(after) == {window.skill}
    assert (found["learn"], found["final"], found["bwt"]) == (after[window.skill], after[window.skill], 0.0)
    assert len(found["attack_rates"]) == 3, "before, after the update, all attacks at the end"
    assert found["base_kl"] > 0
