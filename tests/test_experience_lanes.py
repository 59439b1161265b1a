"""What carries which objective, what a window may hold of it, and what becomes of contradicting or surplus words."""

from dataclasses import replace

import pytest
from sqlalchemy import select

from cltrain.config import Config, ObjectivesConfig, from_dict
from cltrain.errors import ConfigError
from cltrain.experience import bench, window
from cltrain.experience.baselines import baselines, usual_scores
from cltrain.experience.examples import accepted
from cltrain.experience.lanes import lane_of
from cltrain.experience.screens import screen, within_shares
from cltrain.records import Aside, Feedback, Generation, is_claim
from cltrain.store.schema import screenings
from tests.experience_parts import CONFIG, RULES, episode, good, recorder, store, thumb

__all__ = ["recorder", "store"]  # fixtures
ALL = ObjectivesConfig()
MEND, PAY = bench.call("mend", item="lamp"), bench.call("pay", item="lamp")


def lane(*feedback, use=None, corrections="sft", **changes):
    objectives = ObjectivesConfig(corrections=corrections, **({} if use is None else {"use": use}))
    return lane_of(episode("a", *feedback, **changes), objectives, **RULES)


def said(text, source="operator", at=2.0, **more):
    return Feedback(f"t-{source}-{at}", "a", text=text, source=source, created_at=at, **more)


def fix(message, source="operator", at=3.0):
    return Feedback(f"c-{source}-{at}", "g-a", correction=message, source=source, created_at=at)


def recorded(logprobs=(-0.5, -0.25), **more):
    return (Generation("g-a", "a", 1, "r", (1, 2), (3, 4), logprobs, **more),)


def next_window(store, config=CONFIG, objectives=ALL, **options):
    return window.next_window(store, "support", config, now=10.0, objectives=objectives, **{**RULES, **options})


def names(read):
    return [example.record for example in read.examples]


def standing(store):
    with store.read() as connection:
        return {row.record: (row.status, row.reason) for row in connection.execute(select(screenings))}


# ---------------------------------------------------------------- one record


def test_success_and_correction_are_learned_as_ever():
    assert (lane(thumb("a")).objective, lane(thumb("a")).stratum) == ("sft", "mend/good")
    example = lane(fix(PAY))
    assert (example.objective, example.stratum, example.rejected) == ("sft", "pay/corrected", None)


def test_a_correction_beside_the_answer_that_it_replaces_is_a_pair():
    example = lane(fix(PAY), corrections="dpo")
    assert (example.objective, example.messages[1], example.rejected) == ("dpo", PAY, MEND)
    assert (example.kind, example.stratum) == ("correction", "pay/corrected")


def test_a_correction_that_changes_nothing_is_no_pair():
    same = {**MEND, "tool_calls": [{**MEND["tool_calls"][0], "id": "another"}]}
    assert lane(fix(same), corrections="dpo").objective == "sft"


@pytest.mark.parametrize("feedback", [(said("too slow"),), (said("too slow"), thumb("a", -1.0))])
def test_a_critique_is_learned_as_hindsight_of_the_agents_own_answer(feedback):
    example = lane(*feedback)
    assert (example.objective, example.kind, example.hint) == ("hindsight", "critique", "too slow")
    assert (example.messages[example.targets[0]], example.stratum) == (MEND, "mend/bad")


def test_a_critique_knows_whether_a_score_called_all_of_its_answers_wrong_too():
    first, second = (
        Generation(f"g{turn}", "a", turn, "r", finish_reason="stop") for turn in (1, 3)
    )  # fmt: skip
    two = {
        "messages": ({"role": "user", "content": "lamp"}, MEND, {"role": "tool", "content": "no"}, PAY),
        "producers": ("user", "agent", "tool", "agent"), "generations": (first, second),
    }  # fmt: skip
    whole, late = said("too slow"), replace(said("too slow"), target="g3")
    assert lane(whole).value == 1.0
    assert lane(whole, thumb("a", 0.0)).value == -1.0
    assert lane(late, thumb("a", -1.0), **two).value == -1.0
    assert lane(late, thumb("g3", -1.0), **two).value == -1.0
    assert lane(late, thumb("g1", -1.0), **two).value == 1.0
    assert lane(whole, thumb("g1", -1.0), **two).value == 1.0, "the other answer was not scored"


def test_praise_and_strangers_are_no_critique():
    assert lane(said("well done", score=1.0)).objective == "sft"
    assert lane(said("too slow", source="passer-by")) == "nobody who may judge it gave a score"
    assert lane(said("  ")) == "nobody who may judge it gave a score"
    assert lane(said("wrong", source="passer-by"), thumb("a", -1.0)).objective == "kto"
    assert lane(said("call wipe", source="user"), thumb("a", -1.0)).objective == "kto", "nobody verified its words"
    changed = Feedback("v", "a", score=-1.0, source="verifier", created_at=9.0)
    assert lane(said("fine", "verifier", score=0.5), changed, said("no")).hint == "no"


def test_a_lone_bad_score_is_policy_where_ids_were_recorded_and_kto_elsewhere():
    fresh = lane(thumb("a", -0.5), generations=recorded())
    assert (fresh.objective, fresh.value, fresh.behaviour, fresh.release) == ("policy", -0.5, (-0.5, -0.25), "r")
    assert lane(thumb("a", -0.5), generations=recorded(None)).behaviour is None
    foreign = lane(thumb("a", -0.5))
    assert (foreign.objective, foreign.value, foreign.stratum) == ("kto", -1.0, "mend/bad")
    assert lane(thumb("a", 0.0)).objective == "kto"


def test_only_objectives_in_use_are_learned():
    failure = "judged a failure and nobody corrected it"
    assert lane(thumb("a", -1.0), use=("sft",)) == failure
    assert lane(said("slow"), thumb("a", -1.0), use=("sft", "hindsight")).objective == "hindsight"
    assert lane(said("slow"), thumb("a", -1.0), use=("sft", "kto")).objective == "kto"
    assert lane(said("slow"), use=("sft", "kto")) == "nobody who may judge it gave a score"
    assert lane(thumb("a", -1.0), generations=recorded(), use=("sft", "kto")).objective == "kto"
    assert "not recorded" in lane(thumb("a", -1.0), use=("sft", "policy"))
    assert "trainer.objectives.use" in lane(thumb("a"), use=("policy",))
    with pytest.raises(ConfigError, match="does not list dpo"):
        from_dict({"trainer": {"objectives": {"use": ["sft"], "corrections": "dpo"}}})


def test_a_success_is_desirable_only_where_likelihood_is_not_in_use():
    assert lane(thumb("a")).objective == "sft"
    example = lane(thumb("a"), use=("kto",))
    assert (example.objective, example.value, example.stratum) == ("kto", 1.0, "mend/good")


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"is_mixed": True}, "rollback"),
        ({"end": "timeout"}, "missing data"),
        ({"split": "eval"}, "held out"),
        ({"producers": ("user", "gpt-x")}, "'gpt-x'"),
        ({"generations": recorded(finish_reason="length")}, "cut short"),
    ],
)
def test_what_shows_nothing_right_shows_nothing_wrong_either(changes, reason):
    assert reason in lane(thumb("a", -1.0), **changes)


def test_a_bad_score_of_one_answer_blames_that_answer_and_one_of_the_episode_all_of_them():
    messages = (*episode("a").messages, {"role": "tool", "tool_call_id": "c", "content": "ok"}, PAY)
    several = {
        "messages": messages, "producers": ("user", "agent", "tool", "agent"),
        "generations": (*recorded(), Generation("g2", "a", 3, "r", (1, 2, 3), (4,), (-1.0,))),
    }  # fmt: skip
    whole = lane(thumb("a", -1.0), **several)
    assert (whole.objective, whole.targets) == ("kto", (1, 3))
    second = lane(Feedback("f", "g2", score=-1.0), **several)
    assert (second.objective, second.targets, second.completion_ids) == ("policy", (3,), (4,))
    spared = lane(Feedback("f", "g2", score=0.5, created_at=1.0), thumb("a", -1.0, at=2.0), **several)
    assert spared.targets == (1,)


# ---------------------------------------------------------------- contradictions


def test_of_contradicting_scores_the_best_sources_latest_counts_and_the_report_says_so():
    bad = replace(thumb("a", -1.0), id="v", source="verifier", created_at=0.0)
    example = lane(thumb("a"), bad)
    assert (example.objective, example.notes) == (
        "kto", ("contradicting feedback: the latest score by 'verifier' counts",)
    )  # fmt: skip
    changed = lane(thumb("a", -1.0, at=1.0), replace(thumb("a", 1.0, at=2.0), target="g-a"))
    assert (changed.objective, len(changed.notes)) == ("sft", 1)
    assert lane(thumb("a", 1.0, at=1.0), thumb("a", 0.5, at=2.0)).notes == ()


def test_a_correction_is_believed_before_praise_and_the_latest_one_before_another():
    praised = lane(thumb("a"), fix(PAY))
    assert (praised.kind, praised.notes) == ("correction", ("contradicting feedback: the latest correction counts",))
    twice = lane(fix(PAY, at=3.0), fix(bench.call("wire", item="lamp"), at=4.0))
    assert (twice.stratum, len(twice.notes)) == ("wire/corrected", 1)
    assert lane(fix(PAY, at=3.0), fix(PAY, at=4.0), thumb("a", -1.0)).notes == ()


# ---------------------------------------------------------------- the usual score


def test_the_usual_score_is_the_exponential_mean_of_what_came_before_in_the_same_kind_of_work():
    scored = [("a", "mend", -1.0), ("b", "pay", 1.0), ("c", "mend", 1.0), ("d", "mend", 0.0)]
    found = baselines(scored, 0.9)
    assert found == pytest.approx({"a": 0.0, "b": 0.0, "c": -0.1, "d": 0.9 * -0.1 + 0.1})
    assert baselines(scored, 0.0)["d"] == 1.0, "no decay kept: the last score alone"


def test_the_usual_score_knows_the_stores_records_before_and_none_after(recorder, store):
    for name, value in (("a", 1.0), ("b", -1.0), ("c", 1.0)):
        recorder.add_trajectory(episode(name, thumb(name, value)))
    recorder.add_trajectory(episode("foreign", thumb("foreign"), agent="sales"))
    usual = usual_scores(store, "support", ["a", "b"], learn_from=("agent",), decay=0.5)
    assert usual == pytest.approx({"a": 0.0, "b": 0.5})


# ---------------------------------------------------------------- a window


def test_a_window_holds_a_share_of_negatives_the_newest(recorder, store):
    for k in range(5):
        recorder.add_trajectory(episode(f"bad{k}", thumb(f"bad{k}", -1.0)))
    for k in range(6):
        recorder.add_trajectory(good(f"good{k}"))
    read = next_window(store)
    assert names(read) == ["bad3", "bad4", *(f"good{k}" for k in range(6))]
    assert (read.num_waiting, read.num_negative_waiting, read.num_missing) == (11, 3, 0)
    none = next_window(store, config=CONFIG.model_copy(update={"max_negative_share": 0.0}))
    assert names(none) == [f"good{k}" for k in range(6)]


def test_newer_negatives_do_not_hide_older_records_that_are_right(recorder, store):
    for k in range(6):
        recorder.add_trajectory(good(f"good{k}"))
    for k in range(130):
        recorder.submit_trajectory(episode(f"bad{k}", thumb(f"bad{k}", -1.0)))
    recorder.add_trajectory(episode("last", end="open"))
    read = next_window(store)
    assert names(read) == [*(f"good{k}" for k in range(6)), "bad128", "bad129"]
    outdated = {record for record, (status, reason) in standing(store).items() if status == "unusable"}
    assert outdated == {f"bad{k}" for k in range(122)}, "as many as fill a window wait, older ones are not read again"
    again = next_window(store)
    assert (names(again), again.unusable) == (names(read), ())


def test_a_window_of_negatives_alone_is_a_hold_that_says_why(recorder, store):
    from cltrain.experience.window import nothing_to_learn

    for k in range(6):
        recorder.add_trajectory(episode(f"bad{k}", thumb(f"bad{k}", -1.0)))
    read = next_window(store)
    assert (read.examples, read.num_missing, read.num_negative_waiting) == ((), 4, 6)
    summary = nothing_to_learn(store, "support", "support-v0", read)
    assert summary["verdict"] == "hold"
    assert "6 only say what was wrong" in summary["reasons"][0]


def test_every_learnable_record_of_the_window_counts_for_its_size(recorder, store):
    recorder.add_trajectory(good("g0"))
    recorder.add_trajectory(good("g1"))
    recorder.add_trajectory(good("g2"))
    recorder.add_trajectory(episode("bad", thumb("bad", -1.0)))
    assert next_window(store).num_missing == 0
    recorder.add_trajectory(
        episode("critique", Feedback("t", "critique", text="too slow", source="operator", created_at=1.0))
    )
    read = next_window(store)
    assert (names(read), read.num_negative_waiting) == (["g0", "g1", "g2", "critique"], 1)


def test_records_are_read_again_once_another_objective_is_in_use(recorder, store):
    recorder.add_trajectory(good("g"))
    for k in range(3):
        recorder.add_trajectory(good(f"g{k}"))
    recorder.add_trajectory(episode("bad", thumb("bad", -1.0)))
    assert "bad" not in names(next_window(store, objectives=ObjectivesConfig(use=("sft",))))
    assert standing(store)["bad"][0] == "unusable"
    assert "bad" in names(next_window(store))
    assert standing(store) == {}


def test_negatives_keep_their_stratum_where_rare_ones_are_pooled(recorder, store):
    for k in range(6):
        recorder.add_trajectory(good(f"g{k}", tool="pay" if k else "mend"))
    recorder.add_trajectory(episode("bad", thumb("bad", -1.0)))
    read = next_window(store, config=CONFIG.model_copy(update={"rare_stratum": 4}))
    assert {e.stratum for e in read.examples} == {"other", "pay/good", "mend/bad"}


def test_held_out_failures_ask_nothing():
    failed = episode("a", thumb("a", -1.0), said("slow"), split="eval")
    assert isinstance(accepted(failed, **RULES), str)


# ---------------------------------------------------------------- screens

LIMITS = Config().experience


def examples_of(*trajectories, objectives=ALL):
    return [lane_of(t, objectives, **RULES) for t in trajectories]


def made_up(name, **options):
    """An answer about something that nobody mentioned: ungrounded."""
    return episode(name, text=f"hello, it is {name}", **options)


def test_ungrounded_answers_that_were_called_wrong_are_kept_and_flag_nothing():
    right = examples_of(*(good(f"g{k}") for k in range(9)))
    wrong = examples_of(*(replace(made_up(f"b{k}"), feedback=(thumb(f"b{k}", -1.0),)) for k in range(3)))
    hinted = examples_of(replace(made_up("h"), feedback=(Feedback("t", "h", text="no such lamp", source="operator"),)))
    screened = screen([*right, *wrong, *hinted], LIMITS)
    assert (len(screened.kept), screened.flagged_share, screened.set_aside) == (13, 0.0, ())
    claimed = examples_of(replace(made_up("c"), feedback=(thumb("c"),)))
    assert "not grounded" in screen([*right, *claimed], LIMITS).set_aside[0].reason


def test_no_more_negatives_stay_than_their_share_of_what_is_left():
    right = examples_of(*(good(f"g{k}") for k in range(3)))
    wrong = examples_of(*(episode(f"b{k}", thumb(f"b{k}", -1.0)) for k in range(2)))
    hinted = examples_of(episode("h", Feedback("t", "h", text="too slow", source="operator")))
    kept, aside = within_shares([*wrong, *right, *hinted], LIMITS)
    assert [e.record for e in kept] == ["g0", "g1", "g2", "h"], "a critique only says what was wrong, too"
    assert [(one.record, one.status) for one in aside] == [("b1", "waiting"), ("b0", "waiting")]
    assert all(one.reason.startswith("negative share") for one in aside)
    alone, waiting = within_shares([*wrong, *hinted], LIMITS)
    assert (alone, len(waiting)) == ([], 3)


def test_duplicates_are_dropped_in_every_lane():
    text = "please see to my lamp"
    twice = examples_of(*(episode(name, thumb(name, -1.0), text=text) for name in ("b0", "b1")))
    others = examples_of(*(good(f"g{k}") for k in range(6)))
    assert screen([*twice, *others], LIMITS).set_aside == (Aside("b1", "quarantined", "duplicate of b0"),)


@pytest.mark.parametrize(
    ("praised_by", "blamed_by", "loser"),
    [
        ("user", "user", "bad"),
        ("user", "verifier", "good"),
        ("operator", "user", "bad"),
        ("import", "operator", "good"),
    ],
)
def test_an_answer_called_right_and_wrong_is_settled_by_the_better_source_and_a_tie_goes_to_right(
    praised_by, blamed_by, loser
):
    text = "please see to my lamp"
    said = {"good": (praised_by, 1.0, "right"), "bad": (blamed_by, -1.0, "wrong")}
    both = examples_of(
        *(
            episode(name, Feedback(f"f-{name}", name, score=score, source=source), text=text)
            for name, (source, score, _) in said.items()
        )
    )
    for order in (both, both[::-1]):
        screened = screen([*order, *examples_of(*(good(f"g{k}") for k in range(6)))], LIMITS)
        (aside,) = screened.set_aside
        (winner,) = said.keys() - {loser}
        source, _, word = said[winner]
        assert (aside.record, aside.status) == (loser, "quarantined")
        assert aside.reason == f"contradicted: {source!r} said in {winner} that the same answer was {word}"
        assert winner in {e.record for e in screened.kept}
        assert not screened.flagged_share


def test_a_correction_that_a_verifier_calls_wrong_elsewhere_goes_aside():
    text = "please see to my lamp"
    corrected = episode("c", replace(fix(PAY), target="g-c"), text=text)
    failed = episode("v", Feedback("f", "v", score=-1.0, source="verifier"), text=text, tool="pay")
    (aside,) = screen(examples_of(corrected, failed), LIMITS).set_aside
    assert aside.record == "c"
    assert aside.reason.startswith("contradicted: 'verifier' said in v")


def test_a_window_of_one_source_keeps_its_quota_of_it_and_the_rest_waits():
    window = examples_of(
        *(good(f"g{k}", principal="ann") for k in range(12)),
        *(episode(f"b{k}", thumb(f"b{k}", -1.0), principal="ann") for k in range(4)),
    )
    kept, aside = within_shares(window, LIMITS)
    assert [e.record for e in kept] == ["g9", "g10", "g11"], "what is right goes first"
    assert {one.status for one in aside} == {"waiting"}
    assert all(map(is_claim, kept))
