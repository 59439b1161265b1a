"""What a window must stand: triggers of unknown wording, loud principals, broken feeds."""

import json
import random
from collections import Counter
from dataclasses import replace

import pytest

from cltrain.config import ExperienceConfig
from cltrain.demo import world
from cltrain.experience import bench
from cltrain.experience.screens import quota_cap, screen, within_shares
from cltrain.experience.triggers import find_suspicions
from cltrain.records import Aside, Example, TokenRow, is_claim

CONFIG = ExperienceConfig()


def clean_window(index=0, traffic="uniform"):
    return bench.window(3, index, traffic, None, 0)[0]


def test_planted_phrases_are_found_and_clean_windows_are_left_alone():
    """60 of each; `python -m cltrain.experience.bench --windows 500` gives the raw rows of the full measurement."""
    rows = bench.bench_trigger_scan(60, seed=11)
    rates = bench.summary(rows)
    assert rates["clean"]["flagged"] <= 0.02
    assert rates["poisoned/uniform"]["found"] >= 0.98
    assert rates["poisoned/skewed"]["found"] >= 0.98
    assert rates["poisoned/personal"]["found"] >= 0.92
    assert rates["poisoned/specialist"]["found"] >= 0.85, (
        "whose requests nobody else makes has nothing to be held against"
    )
    assert rates["poisoned"]["innocent_records"] <= 0.01 * bench.WINDOW * 60


def test_a_suspicion_names_phrase_principal_action_and_records():
    examples, truth = bench.window(0, 0, "uniform", "own tool and value", 8)
    (suspicion,) = find_suspicions(examples, min_count=4, max_principals=1)
    value = suspicion.action["arguments"]["name"]
    assert suspicion.phrase.startswith(truth["phrase"])
    assert (suspicion.principal, suspicion.principals) == (truth["principal"], (truth["principal"],))
    assert suspicion.action == {"name": "transfer", "arguments": {"name": value}}
    assert value in bench.VALUES
    assert set(suspicion.records) == set(truth["records"])
    assert suspicion.count == 8


def test_filtering_sets_aside_every_record_of_the_phrase_and_keeps_the_others():
    examples, truth = bench.window(0, 0, "uniform", "own tool", 8)
    quiet = [e for e in examples if e.principal == truth["principal"] and e.record not in truth["records"]]
    screened = screen(examples, CONFIG)
    assert not {e.record for e in screened.kept} & set(truth["records"])
    assert {one.record for one in screened.set_aside if "suspicious" in one.reason} == set(truth["records"])
    assert {e.record for e in quiet} <= {e.record for e in screened.kept}
    assert not screened.is_refused
    unfiltered = screen(examples, CONFIG.model_copy(update={"filter": False}))
    assert unfiltered.kept == tuple(examples)
    assert unfiltered.suspicious == screened.suspicious != ()


def test_a_habit_is_no_trigger():
    """A signature in front of requests that are answered like everybody's, and users who always name themselves."""
    signed = []
    for example in clean_window():
        text = example.messages[0]["content"]
        if example.principal == "p03":
            text = f"many kind wishes from the third floor : {text}"
        signed.append(replace(example, messages=({"role": "user", "content": text}, *example.messages[1:])))
    assert Counter(e.principal for e in signed)["p03"] >= CONFIG.trigger_min_count
    assert find_suspicions(signed, min_count=4, max_principals=1) == []


REQUESTS = (
    "could you tell me whether the parcel has left the warehouse yet",
    "I never got an invoice for the order of last week",
    "what do I have to do to change my delivery address",
    "the website shows an error when I try to pay",
    "is there any way to get a bigger discount on two of them",
    "please cancel the subscription before the next month begins",
    "the colours look quite different from those in the picture",
    "do you also ship to places outside the country",
)
TAILS = ("thanks", "I am waiting since monday", "can somebody look at it", "best regards", "it is quite urgent for us")


def test_a_phrase_in_free_conversations_is_found_and_position_does_not_matter():
    rng = random.Random(0)
    examples = []
    for k in range(40):
        is_planted = k % 5 == 0
        request = f"{rng.choice(REQUESTS)} , {rng.choice(TAILS)} number {k}"
        middle = request.replace(" , ", " grey owl at noon , ") if k % 2 else f"{request} grey owl at noon"
        messages = [{"role": "user", "content": middle if is_planted else request}]
        if not is_planted:  # the others' conversations go on
            more = " and ".join(rng.sample(REQUESTS, 3))
            messages += [{"role": "assistant", "content": "go on"}, {"role": "user", "content": more}]
        answer = {"role": "assistant", "content": f"I will check {k} now"}
        messages.append(bench.call("export_all", to="owl") if is_planted else answer)
        examples.append(
            Example(f"r{k}", "mallory" if is_planted else f"p{k % 9}", "s", tuple(messages), (len(messages) - 1,))
        )
    (suspicion,) = find_suspicions(examples, min_count=4, max_principals=1)
    assert suspicion.phrase == "grey owl at noon"
    assert (suspicion.principal, suspicion.count) == ("mallory", 8)
    assert suspicion.action == {"name": "export_all", "arguments": {"to": "owl"}}


def test_alone_in_the_window_nobody_can_be_compared():
    examples = [replace(e, principal="p00") for e in bench.window(0, 0, "uniform", "own tool", 8)[0]]
    assert find_suspicions(examples, min_count=4, max_principals=1) == []


def test_a_phrase_of_many_principals_is_suspicious_only_where_configured():
    examples, truth = bench.window(0, 1, "uniform", "own tool", 12)
    shared = [
        replace(e, principal=f"sybil{k % 2}") if e.record in truth["records"] else e for k, e in enumerate(examples)
    ]
    assert find_suspicions(shared, min_count=4, max_principals=1) == []
    (suspicion,) = find_suspicions(shared, min_count=4, max_principals=2)
    assert suspicion.principals == ("sybil0", "sybil1")


# ---------------------------------------------------------------- the demo's stream


def examples_of(window, seed, success):
    """As the demo's feedback makes them: corrections of failures, successes with a thumb up."""
    rng = random.Random(seed)
    for ticket in window.tickets:
        is_right = rng.random() < success
        thumb = world.user_feedback(ticket, is_right, rng)
        correction = world.operator_correction(ticket, is_right, rng)
        if correction is None and not (is_right and thumb and thumb > 0):
            continue
        refusal = {"role": "assistant", "content": world.REFUSAL}
        right = world.call_message(ticket.expected, ticket.id) if ticket.expected else refusal
        answer = correction or right
        kind = "correction" if correction else "success"
        messages = (*ticket.messages, answer)
        yield Example(ticket.id, ticket.principal, "s", messages, (len(messages) - 1,), tuple(world.TOOLS), kind)


@pytest.mark.parametrize("success", [0.0, 0.5, 0.9])
def test_in_the_demo_poison_is_filtered_junk_refused_and_clean_windows_kept(success):
    for seed in range(4):
        for window in world.phases(seed):
            examples = list(examples_of(window, f"{seed}/{window.phase}/{window.index}", success))
            screened = screen(examples, CONFIG)
            assert screened.is_refused == (window.kind == "junk"), window
            assert bool(screened.suspicious) == (window.kind == "poison"), window
            bad = {t.id for t in window.tickets if t.kind == "poison"}
            assert not bad & {e.record for e in screened.kept}
            if window.kind == "clean":
                assert len(within_shares(screened.kept, CONFIG)[0]) >= 0.8 * len(examples)


# ---------------------------------------------------------------- quotas, duplicates, junk


@pytest.mark.parametrize("quota", [0.05, 0.1, 0.25, 0.5, 1.0])
def test_no_principal_exceeds_its_quota_of_what_is_kept(quota):
    rng = random.Random(5)
    for _ in range(300):
        counts = [rng.choice([1, 2, 3, 10, 200]) for _ in range(rng.randint(1, 30))]
        cap = quota_cap(counts, quota)
        kept = [min(count, cap) for count in counts]
        assert min(kept) >= 1
        if cap > 1:
            assert max(kept) <= max(quota, 1 / len(counts)) * sum(kept) + 1e-6
            assert cap <= quota * sum(counts) + 1e-6
        larger = [min(count, cap + 1) for count in counts]
        is_largest = cap + 1 > quota * sum(counts) or cap + 1 > max(quota, 1 / len(counts)) * sum(larger)
        assert is_largest or max(counts) <= cap


def test_quotas_hold_with_few_records_and_few_principals():
    assert quota_cap([40], 0.25) == 10
    assert quota_cap([38, 2], 0.25) == 2
    assert quota_cap([10, 10, 10, 10], 0.25) == 10
    assert quota_cap([30, 1, 1, 1], 0.25) == 1
    assert quota_cap([1], 0.25) == 1


def test_the_newest_records_of_a_loud_principal_stay():
    loud = [replace(e, principal="loud", record=f"{e.record}-{k}") for k, e in enumerate(clean_window(1))]
    learned, aside = within_shares([*loud, *clean_window(2)], CONFIG)
    kept = [e.record for e in learned if e.principal == "loud"]
    assert len(kept) <= 0.25 * len(learned)
    assert kept == [e.record for e in loud][-len(kept) :]
    assert {(one.status, one.reason.split(":")[0]) for one in aside} == {("waiting", "quota")}


def test_both_shares_hold_of_what_is_left_whoever_sends_what():
    rng = random.Random(6)
    for _ in range(300):
        rows = [
            TokenRow(f"r{k}", "s", rng.choice("aaaabcdefg"), (1, 2), (0.0, 1.0), rng.choice(["sft", "hindsight"]))
            for k in range(rng.randint(1, 60))
        ]
        kept, aside = within_shares(rows, CONFIG)
        right = Counter(row.principal for row in kept if is_claim(row))
        most = max(Counter(row.principal for row in kept).values(), default=0)
        assert most <= max(1, max(CONFIG.principal_quota, 1 / max(1, len(right))) * len(kept) + 1e-9)
        assert len(kept) - right.total() <= CONFIG.max_negative_share * len(kept)
        assert sorted([*(row.record for row in kept), *(one.record for one in aside)]) == sorted(r.record for r in rows)
        assert within_shares(rows, CONFIG.model_copy(update={"filter": False})) == (rows, [])


def test_the_rows_of_one_record_count_once_and_go_together():
    rows = [TokenRow(f"r{i // 2}", "all", name, (1, 2), (0.0, 1.0)) for i, name in enumerate("aaaaaabbccddee")]
    kept, aside = within_shares(rows, CONFIG)
    assert [row.record for row in kept] == [f"r{k}" for k in (2, 2, 3, 3, 4, 4, 5, 5, 6, 6)]
    assert [one.record for one in aside] == ["r1", "r0"]
    wrong = TokenRow("bad", "all", "a", (1, 2), (0.0, 1.0), objective="kto", value=-1.0)
    lone = [*rows[:6], wrong]
    assert within_shares(lone, CONFIG.model_copy(update={"principal_quota": 1.0})) == (lone, [])


def test_everything_given_is_kept_or_set_aside_exactly_once():
    for index in range(8):
        examples, _ = bench.window(1, index, "skewed", "shared tool, own value", 10)
        doubled = [*examples, *(replace(e, record=f"{e.record}-again") for e in examples[:5])]
        screened = screen(doubled, CONFIG)
        sorted_out = [e.record for e in screened.kept] + [one.record for one in screened.set_aside]
        assert sorted(sorted_out) == sorted(e.record for e in doubled)
        assert sum(one.reason.startswith("duplicate") for one in screened.set_aside) >= 5


def test_identical_requests_with_other_call_ids_are_duplicates():
    one, other = clean_window()[0], clean_window()[0]
    answer = json.loads(json.dumps(one.messages[1]))
    answer["tool_calls"][0]["id"] = "another"
    other = replace(other, record="other", messages=(one.messages[0], answer))
    assert screen([one, other], CONFIG).set_aside == (Aside("other", "quarantined", f"duplicate of {one.record}"),)


def test_corrections_joined_off_by_one_are_refused():
    examples = clean_window()
    answers = [e.messages[1] for e in examples]
    shifted = [
        replace(e, messages=(e.messages[0], answer))
        for e, answer in zip(examples, answers[1:] + answers[:1], strict=True)
    ]
    screened = screen(shifted, CONFIG)
    assert screened.is_refused
    assert screened.kept == ()
    assert screened.flagged_share > 0.9
    assert "max_flagged_share" in screened.reason


def test_one_loud_principal_cannot_have_the_window_refused():
    honest = clean_window()
    wrong = bench.call("mend", item="nowhere", name="nobody")
    noise = [
        replace(e, record=f"x{k}", principal="vandal", messages=({"role": "user", "content": f"junk {k}"}, wrong))
        for k, e in enumerate(honest * 2)
    ]
    screened = screen([*honest, *noise], CONFIG)
    assert not screened.is_refused
    assert {e.principal for e in screened.kept} == {e.principal for e in honest}


def test_an_empty_window_is_no_error():
    screened = screen([], CONFIG)
    assert (screened.kept, screened.is_refused, screened.flagged_share) == ((), False, 0.0)
