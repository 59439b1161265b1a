"""The judge of a candidate on live traffic: what it compares, how soon it sees harm, how seldom it stops an equal."""

from __future__ import annotations

import random
from collections.abc import Iterator

from scipy.stats import binom

from cltrain.gate.sequential import Arm, Outcome, judge, losses, weigh
from cltrain.gate.stats import BETS, STAKES
from cltrain.records import Verdict

BOTH = ("faults", "score")


def arms(pattern: str) -> list[Arm]:
    return ["candidate" if letter == "c" else "incumbent" for letter in pattern]


def test_what_is_compared_is_of_the_same_hours() -> None:
    faults = [1, 0, 1, 0, 0, 0, 1]
    outcomes = [Outcome(arm, bool(fault)) for arm, fault in zip(arms("iiciicc"), faults, strict=True)]
    # (i 1, i 0, c 1), (i 0, i 0, c 0), then a candidate that waits for an incumbent of its own time
    assert losses(outcomes, "faults") == [0.5, 0.0]
    assert losses([*outcomes, Outcome("incumbent", False)], "faults") == [0.5, 0.0, 1.0]


def test_a_missing_score_is_no_score() -> None:
    outcomes = [
        Outcome("incumbent", False, 1.0), Outcome("candidate", False, None), Outcome("candidate", True, -1.0),
    ]  # fmt: skip
    assert losses(outcomes, "score") == [1.0]
    assert losses(outcomes, "faults") == [0.0]


def steps_to(limit: float, growth: list[float]) -> int:
    """After how many equal comparisons the wealth of the mixture of bets is at the limit."""
    n = 0
    while sum(stake * factor**n for stake, factor in zip(STAKES, growth, strict=True)) < limit:
        n += 1
    return n


def test_harm_is_seen_as_soon_as_the_bets_allow() -> None:
    alpha, metrics = 0.05, ("faults",)
    needed = steps_to(1 / alpha, [1 + bet for bet in BETS])
    outcomes = [Outcome(arm, arm == "candidate") for arm in arms("ic" * needed)]
    assert judge(weigh(outcomes[:-2], metrics, 0.1), alpha)[0] is Verdict.HOLD
    verdict, reason = judge(weigh(outcomes, metrics, 0.1), alpha)
    assert (verdict, f"over {needed} comparisons" in reason) == (Verdict.REJECT, True), reason
    assert needed == 7


def test_two_that_never_fail_are_shown_to_be_alike_within_the_margin() -> None:
    alpha, margin = 0.05, 0.1
    needed = steps_to(1 / alpha, [1 + bet * margin / (1 - margin) for bet in BETS])
    outcomes = [Outcome(arm, False, 1.0) for arm in arms("ic" * needed)]
    assert judge(weigh(outcomes[:-2], BOTH, margin), alpha)[0] is Verdict.HOLD
    assert judge(weigh(outcomes, BOTH, margin), alpha)[0] is Verdict.PROMOTE


def test_no_data_never_passes() -> None:
    assert judge(weigh([], BOTH, 0.1), 0.05)[0] is Verdict.HOLD
    unrated = [Outcome(arm, False) for arm in arms("ic" * 500)]
    verdict, reason = judge(weigh(unrated, BOTH, 0.1), 0.05)
    assert (verdict, reason) == (Verdict.HOLD, "neither harm nor its absence is shown in score")


def traffic(rng: random.Random, weight: float, worse: float) -> Iterator[Outcome]:
    """Episodes as they come: 15 % faults, a quarter rated, 70 % of those well; `worse`: the candidate's excess."""
    while True:
        arm: Arm = "candidate" if rng.random() < weight else "incumbent"
        excess = worse if arm == "candidate" else 0.0
        is_rated = rng.random() < 0.25
        yield Outcome(
            arm, rng.random() < 0.15 + excess, (1.0 if rng.random() < 0.7 - excess else -1.0) if is_rated else None
        )


def stopped(seed: int, worse: float, alpha: float, num_episodes: int, every: int) -> Verdict:
    """What the judge said first, looking again and again."""
    rng = random.Random(seed)
    outcomes: list[Outcome] = []
    source = traffic(rng, 0.25, worse)
    while len(outcomes) < num_episodes:
        outcomes += [next(source) for _ in range(every)]
        verdict, _ = judge(weigh(outcomes, BOTH, 0.1), alpha)
        if verdict is Verdict.REJECT:
            return verdict
    return Verdict.HOLD


def test_an_equal_is_seldom_stopped_however_often_one_looks() -> None:
    alpha, num_runs = 0.2, 100
    wrong = sum(stopped(seed, 0.0, alpha, 400, 10) is Verdict.REJECT for seed in range(num_runs))
    assert wrong <= binom.ppf(0.999, num_runs, alpha)
    assert wrong > 0, "the limit is so far away that this shows nothing"


def test_a_harmful_one_is_stopped_within_a_few_hundred_episodes() -> None:
    found = [stopped(seed, 0.3, 0.05, 800, 10) for seed in range(30)]
    assert found.count(Verdict.REJECT) >= 29
