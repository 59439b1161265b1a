"""Records whose content makes no sense, among good ones: each is set aside alone wherever many are read."""

from __future__ import annotations

from cltrain.config import Config, ObjectivesConfig, from_dict
from cltrain.evidence import Evidence
from cltrain.experience import bench, buffer, window
from cltrain.experience.baselines import usual_scores
from cltrain.experience.recording import Recorder
from cltrain.experience.screens import screen
from cltrain.experience.window import nothing_to_learn
from cltrain.fitting import count_fitting
from cltrain.loop import render
from cltrain.models.base import load_base
from cltrain.records import Example
from cltrain.staleness import settle
from cltrain.store.schema import screenings
from tests.experience_parts import CONFIG, KEY, RULES, file_as, good, recorder, store

__all__ = ["recorder", "store"]  # fixtures
ASKED = {"role": "user", "content": "please see to my lamp"}
DEEP = '{"item": ' + "[" * 900 + "]" * 900 + "}"
HALF = '{"item": "\\ud800"}'  # JSON for half a surrogate pair


def saying(arguments):
    function = {"name": "mend", "arguments": arguments}
    return ASKED, {"role": "assistant", "content": None, "tool_calls": [{"id": "c", "function": function}]}


def declaring(parameters, name="mend"):
    return ({"type": "function", "function": {"name": name, "parameters": parameters}},)


BROKEN = {
    "built-in": {"tools": ({"type": "web_search"},)},
    "nothing": {"tools": ({},)},
    "no-dict": {"tools": (5,)},
    "name": {"tools": declaring({}, name=["mend"])},
    "parameters": {"tools": declaring(5)},
    "required": {"tools": declaring({"required": 5})},
    "required-lists": {"tools": declaring({"required": [["a"]]})},
    "properties": {"tools": declaring({"properties": 5})},
    "type": {"tools": declaring({"type": [{"a": 1}]})},
    "flat": {"messages": (ASKED, {"role": "assistant", "tool_calls": [{"name": "mend", "arguments": "{}"}]})},
    "deep": {"messages": saying(DEEP)},
    "half": {"messages": saying(HALF)},
}
GOOD = {f"good{k}" for k in range(6)}
WIDE = CONFIG.model_copy(update={"max_window": 64, "max_flagged_share": 1.0})


def fill(recorder):
    for name in sorted(GOOD):
        recorder.add_trajectory(good(name))
    for name, changes in BROKEN.items():
        recorder.add_trajectory(good(name, **changes))


def test_what_cannot_be_read_is_set_aside_alone_by_window_screens_and_rendering(recorder, store):
    fill(recorder)
    base = load_base(None)
    for config in (WIDE.model_copy(update={"filter": False}), WIDE):
        read = window.next_window(store, "support", config, now=10.0, **RULES)
        screened = screen(read.examples, config)
        rows, unusable = render(base, screened.kept)
        aside = [*(record for record, _ in read.unusable), *(one.record for one in (*screened.set_aside, *unusable))]
        assert {row.record for row in rows} == GOOD
        assert sorted(aside) == sorted(BROKEN), "each once"
        with store.write() as connection:
            connection.execute(screenings.delete())


def test_what_cannot_be_read_is_no_question_no_rehearsal_and_no_baseline(store):
    with Recorder(store, KEY, 1.0) as recorder:
        fill(recorder)
    items, _ = window.heldout_items(store, "support", WIDE, now=10.0, **RULES)
    assert {item.id.partition(":")[0] for item in items} == GOOD
    bare = WIDE.model_copy(update={"filter": False})
    unfiltered, _ = window.heldout_items(store, "support", bare, now=10.0, **RULES)
    assert {item.id.partition(":")[0] for item in unfiltered} == {*GOOD, "type", "deep", "half"}


def test_what_cannot_be_read_is_not_rehearsed_and_stops_nobody_elses_score(recorder, store):
    fill(recorder)
    file_as(store, [*GOOD, *BROKEN], "replay", stratum="mend/good")
    assert {e.record for e in buffer.replay_examples(store, "support", WIDE, KEY, **RULES)} == GOOD
    recorder.add_trajectory(good("late"))
    means = usual_scores(store, "support", ["late"], learn_from=RULES["learn_from"], decay=0.5)
    readable = 6 + len({"type", "deep", "half"})  # their calls can be counted, though not learned
    assert means["late"] == 1 - 0.5**readable


def test_a_pair_whose_rejected_answer_cannot_be_rendered_is_learned_without_it(store):
    messages = (ASKED, bench.call("mend", item="lamp"))
    for arguments in (DEEP, HALF):
        pair = Example("r", "p", "s", messages, (1,), objective="dpo", rejected=saying(arguments)[1])
        (found,), aside = settle(store, from_dict({}), load_base(None), "nobody", [pair])
        assert (found.objective, found.rejected, aside) == ("sft", None, [])


def test_an_import_counts_what_the_base_can_take_of_the_new_records_alone(recorder, store):
    fill(recorder)
    counted = count_fitting(Config(), store, "support")
    assert counted["num_fitting"] >= len(GOOD)
    assert counted["num_fitting"] + counted["num_unusable"] == len(GOOD) + len(BROKEN)
    assert counted["num_unusable"] >= 3  # flat, deep, half
    (last,) = window.next_window(store, "support", WIDE, now=10.0, **RULES, upto=1).examples
    assert last.record == "good0"
    assert count_fitting(Config(), store, "support", after_seq=1)["num_fitting"] == counted["num_fitting"] - 1


def test_a_question_that_does_not_fit_the_base_is_not_asked(store):
    asked = {"fits": (ASKED,), "long": ({"role": "user", "content": "lamp " * 4000},), "deep": (*saying(DEEP), ASKED)}
    with Recorder(store, KEY, 1.0) as recorder:
        for name, messages in asked.items():
            producers = (*[None] * len(messages), "agent")
            answered = (*messages, bench.call("mend", item="lamp"))
            recorder.add_trajectory(good(name, messages=answered, producers=producers, generations=()))
    evidence = Evidence(from_dict({}), store, load_base(None), None, print)
    items, _ = evidence.held_out()
    assert [item.id for item in items] == ["fits:1"]


def test_a_hold_says_why_most_records_are_unusable_now_and_later(recorder, store):
    for k in range(3):
        recorder.add_trajectory(good(f"old{k}", producers=("user", None)))
    recorder.add_trajectory(good("built-in", **BROKEN["built-in"]))
    for _ in range(2):
        read = window.next_window(store, "support", CONFIG, now=10.0, **RULES, objectives=ObjectivesConfig())
        (reason,) = nothing_to_learn(store, "support", "support-v0", read)["reasons"]
        assert "0 learnable records are waiting" in reason
        assert "4 are unusable, most often (3): the producer of its answers is unknown" in reason
        assert "--producer agent" in reason


def test_a_reason_that_quotes_half_a_surrogate_pair_can_be_filed(store):
    file_as(store, ["a"], "quarantined", reason="calls \ud800", stratum="\ud800/good")
    with store.read() as connection:
        (row,) = connection.execute(screenings.select()).all()
    assert (row.reason, row.stratum) == ("calls \\ud800", "\\ud800/good")
