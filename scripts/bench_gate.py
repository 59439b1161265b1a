"""A thousand gates in a row: what each way of deciding lets through when candidates get a little better, or worse.

`scripts/bench gate [--gates 1000] [--seeds 5] [--first 0] [--json F]` simulates a model that answers WORLD questions.
A candidate answers 6 % of them otherwise than the incumbent and is truly better by N(-0.2, 1) points (regime `honest`:
what an honest trainer brings, half of it noise) or N(-0.5, 0.3) (`eroding`: almost every one a little worse). The
policy sees samples and promotes or not; the truth is the share of all questions that the incumbent answers right, 0.70
at first.

`cltrain` is the production decision (cltrain/gate/decision.py) on a pool of 4,000 questions that rotate: least used
first, retired after `gate.max_uses`. Three settings are not the defaults: promote_on = expected (nothing is taught
here), margin 0.02 (the default is for small suites) and items_per_gate 800. `cltrain defaults` is without these: half
of the strata were taught, and a gain on them must be shown. The others are what is common elsewhere, and steps towards
ours. `fixed` samples are drawn once, `fresh` ones for every gate.

A row: policy, regime, seed, promoted, false_promoted (truly worse than the incumbent), true_final, reading (the
incumbent's mean on what the policy looks at), power (share promoted of the candidates truly a point better or more),
items (asked per gate, mean) of `planned`. Beside the rows, `null` is how often evidence of a gain, and of being no
worse by the margin, was found at any of its looks where the truth lay exactly on the boundary: at most alpha is what
it promises.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import statistics
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import numpy as np

from cltrain.config import GateConfig
from cltrain.gate.decision import decide, moves_high_water
from cltrain.gate.judge import CHUNK
from cltrain.gate.levels import Past
from cltrain.gate.rows import GateScores, ItemScores
from cltrain.gate.stats import Plan, e_value
from cltrain.gate.track import Outcome
from cltrain.records import Decision, SuiteItem, Verdict
from scripts.gate_policies import (
    CONFIG,
    NUM_ITEMS,
    WORLD,
    Answers,
    Better,
    Ladder,
    NotWorse,
    NotWorseThanBase,
    NotWorseThanBest,
    Policy,
    Sample,
    Spending,
    Strict,
    ZFixed,
    ZFresh,
    gains,
)  # fmt: skip

Row = dict[str, Any]

POOL = 4_000
START = 0.70
DISCORDANCE = 0.06
REGIMES = {"honest": (-0.002, 0.01), "eroding": (-0.005, 0.003)}  # mean and deviation of the true gain
NUM_STRATA = 8
PLAN = Plan(NUM_ITEMS, CONFIG.alpha)


class Production(Policy):
    """cltrain's own: incumbent, high-water mark and anchor on a rotating pool, by `decide`, chunk by chunk."""

    config, taught = CONFIG, ()

    def __init__(self, rng: np.random.Generator, start: Answers) -> None:
        super().__init__(rng, start)
        self.best, self.num = start, self.config.items_per_gate
        self.uses = np.zeros(WORLD, dtype=int)
        order = rng.permutation(WORLD)
        self.pool, self.unseen = order[:POOL], list(order[POOL:])
        self.decision: Decision | None = None
        self.record: list[Outcome] = []

    def sample(self) -> Sample:
        order = np.lexsort((self.rng.random(POOL), self.uses[self.pool]))
        return self.rng.permutation(self.pool[order[: self.num]])

    def look(self, candidate: Answers) -> bool:
        asked = self.sample()
        rows = [self.row(int(i), candidate) for i in asked]
        past = Past(record=tuple(self.record[-self.config.track_window :]))
        for end in [*range(CHUNK, self.num, CHUNK), self.num]:
            is_complete = end == self.num
            if not is_complete and not self.may_end(candidate, asked[:end]):
                continue
            scores = GateScores(tuple(rows[:end]), 0.0, planned=tuple(ITEMS[i] for i in asked))
            self.decision = decide(scores, self.config, taught=self.taught, is_complete=is_complete, past=past)
            if self.decision.verdict in (Verdict.REJECT, Verdict.PROMOTE):
                break
        self.num_asked += end
        self.retire(asked[:end])
        assert self.decision is not None
        assert self.decision.outcome is not None
        self.record.append(Outcome(*self.decision.outcome))
        return self.decision.verdict is Verdict.PROMOTE

    def may_end(self, candidate: Answers, asked: Sample) -> bool:
        """Whether the production decision could be promote or reject: without evidence of harm or of none it is a hold,
        and need not be asked before the last look."""
        alpha = self.config.alpha
        if e_value(gains(candidate, self.incumbent, asked), -self.config.margin, Plan(self.num, alpha)) >= 1 / alpha:
            return True
        references = {id(one): one for one in (self.incumbent, self.best, self.base)}.values()
        harm = alpha / (len(references) + 1)
        plan = Plan(self.num, harm)
        return any(e_value(-gains(candidate, one, asked), 0.0, plan) >= 1 / harm for one in references)

    def row(self, i: int, candidate: Answers) -> ItemScores:
        references = {"incumbent": float(self.incumbent[i])}
        if self.best is not self.incumbent:
            references["high_water"] = float(self.best[i])
        if self.base is not self.best and self.base is not self.incumbent:
            references["anchor"] = float(self.base[i])
        return ItemScores(ITEMS[i], float(candidate[i]), references)  # type: ignore[arg-type]

    def retire(self, used: Sample) -> None:
        self.uses[used] += 1
        worn = np.flatnonzero(self.uses[self.pool] >= self.config.max_uses)[: len(self.unseen)]
        self.pool[worn] = [self.unseen.pop() for _ in worn]

    def promote(self, candidate: Answers) -> None:
        super().promote(candidate)
        assert self.decision is not None
        self.best = candidate if moves_high_water(self.decision) else self.best

    def reading(self) -> float:
        return float(self.incumbent[self.pool].mean())


class Defaults(Production):
    """As it is shipped. A candidate is no better at what it was taught than elsewhere."""

    config = GateConfig()
    taught = tuple(f"s{number}" for number in range(0, NUM_STRATA, 2))

    def may_end(self, candidate: Answers, asked: Sample) -> bool:
        return True  # every stratum that was taught may show harm by itself


ITEMS = [SuiteItem(f"q{i}", "simulated", f"s{i % NUM_STRATA}", "retention", (), (), None) for i in range(WORLD)]
POLICIES: dict[str, type[Policy]] = {
    "strict >, fixed 200": Strict,
    "paired z, fixed 200": ZFixed,
    "paired z, fresh 200": ZFresh,
    "paired z, fresh 800": type("ZFresh800", (ZFresh,), {"num": NUM_ITEMS}),
    "ladder, fixed 200": Ladder,
    "not worse by 4 points, fixed 200": NotWorse,
    "not worse than champion and base, fixed 200": NotWorseThanBase,
    "e-value better, fresh 800": Better,
    "e-value not worse by 2 points, fresh 800": type("NotWorse2", (Better,), {"margin": 0.02}),
    "e-value not worse than champion and high-water mark": NotWorseThanBest,
    "sign test, alpha / t^2": Spending,
    "cltrain": Production,
    "cltrain defaults": Defaults,
}


def next_candidate(rng: np.random.Generator, incumbent: Answers, gain: float) -> Answers:
    """6 % of the answers flipped, so that the share of right ones rises by `gain` as far as there are wrong ones."""
    wrong, right = np.flatnonzero(~incumbent), np.flatnonzero(incumbent)
    num_up = min(len(wrong), round(WORLD * (DISCORDANCE + gain) / 2))
    num_down = max(0, min(len(right), num_up - round(WORLD * gain)))
    candidate = incumbent.copy()
    candidate[rng.choice(wrong, num_up, replace=False)] = True
    candidate[rng.choice(right, num_down, replace=False)] = False
    return candidate


def simulate(name: str, regime: str, seed: int, num_gates: int) -> Row:
    rng = np.random.default_rng([seed, list(REGIMES).index(regime)])  # the same candidates' gains for every policy
    start = np.zeros(WORLD, dtype=bool)
    start[rng.choice(WORLD, round(START * WORLD), replace=False)] = True
    true_gains = rng.normal(*REGIMES[regime], num_gates)
    policy = POLICIES[name](np.random.default_rng([seed, 7]), start)
    promoted = false_promoted = num_better = num_better_promoted = 0
    for gain in true_gains:
        candidate = next_candidate(rng, policy.incumbent, float(gain))
        true_gain = float(candidate.mean() - policy.incumbent.mean())
        is_promoted = policy.look(candidate)
        num_better += true_gain >= 0.01
        num_better_promoted += is_promoted and true_gain >= 0.01
        if is_promoted:
            promoted += 1
            false_promoted += true_gain < 0
            policy.promote(candidate)
    return {
        "policy": name, "regime": regime, "seed": seed, "promoted": promoted, "false_promoted": false_promoted,
        "true_final": float(policy.incumbent.mean()), "reading": policy.reading(),
        "power": num_better_promoted / num_better if num_better else None, "items": policy.num_asked / num_gates,
        "planned": getattr(policy, "num", NUM_ITEMS), "gates": num_gates,
    }  # fmt: skip


def null_rates(num_gates: int, seed: int = 0) -> dict[str, float]:
    """Share of gates in which a candidate exactly on the boundary of "no better" (or of "worse by the margin") passes
    at any look after 50, 100, ... 800 planned questions."""
    rng = np.random.default_rng([seed, 20_000])
    found = {}
    for name, margin in (("better", 0.0), ("not worse", CONFIG.margin)):
        wins = (DISCORDANCE - margin) / 2
        shares = [wins + margin, 1 - DISCORDANCE, wins]
        num_passed = 0
        for _ in range(num_gates):
            d = rng.choice([-1, 0, 1], NUM_ITEMS, p=shares).tolist()
            ends = range(CHUNK, NUM_ITEMS + 1, CHUNK)
            num_passed += any(e_value(d[:end], -margin, PLAN) >= 1 / CONFIG.alpha for end in ends)
        found[name] = num_passed / num_gates
    return found


def every(rows: Sequence[Row], regime: str, holds: Callable[[Row], bool]) -> bool:
    return all(holds(row) for row in rows if row["regime"] == regime)


def mean_of(rows: Sequence[Row], regime: str, key: str) -> float:
    return statistics.mean(row[key] for row in rows if row["regime"] == regime)


PROMISES: dict[str, tuple[str, Callable[[Sequence[Row]], bool]]] = {  # of a policy; what is common elsewhere must fail
    "eroding: true_final >= 0.69 in every seed": (
        "cltrain", lambda rows: every(rows, "eroding", lambda row: row["true_final"] >= 0.69)
    ),
    "honest: true_final >= 0.95 in every seed": (
        "cltrain", lambda rows: every(rows, "honest", lambda row: row["true_final"] >= 0.95)
    ),
    "the reading is within 2 points of the truth": (
        "cltrain", lambda rows: all(abs(row["reading"] - row["true_final"]) <= 0.02 for row in rows)
    ),
    "of candidates a point better >= 70 % are promoted": (
        "cltrain", lambda rows: mean_of(rows, "honest", "power") >= 0.7
    ),
    "by default, eroding: at most alpha of the gates promote": (
        "cltrain defaults",
        lambda rows: every(rows, "eroding", lambda row: row["promoted"] <= Defaults.config.alpha * row["gates"]),
    ),
    "better on average erodes below 0.69": (
        "strict >, fixed 200", lambda rows: mean_of(rows, "eroding", "true_final") < 0.69
    ),
    "better on average believes 5 points more than is true": (
        "strict >, fixed 200",
        lambda rows: mean_of(rows, "honest", "reading") - mean_of(rows, "honest", "true_final") > 0.05,
    ),
    "not worse by 4 points erodes below 0.69": (
        "not worse by 4 points, fixed 200", lambda rows: mean_of(rows, "eroding", "true_final") < 0.69
    ),
}  # fmt: skip


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="scripts/bench gate", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--gates", type=int, default=1000)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--first", type=int, default=0, help="the first seed; 900 and above were used to develop ours")
    parser.add_argument("--policies", nargs="+", choices=POLICIES, default=list(POLICIES))
    parser.add_argument("--nulls", type=int, default=20_000, help="gates of the null rates; 0 leaves them out")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--json", type=Path, help="where the rows go")
    given = parser.parse_args(argv)
    seeds = range(given.first, given.first + given.seeds)
    jobs = list(itertools.product(given.policies, REGIMES, seeds))
    rows: list[Row] = []
    with ProcessPoolExecutor(given.processes) as pool:
        nulls = pool.submit(null_rates, given.nulls) if given.nulls else None
        tasks = [pool.submit(simulate, *job, given.gates) for job in jobs]
        for number, task in enumerate(as_completed(tasks), start=1):
            rows.append(task.result())
            print(f"\r{number} of {len(jobs)} streams", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    rows.sort(key=lambda row: jobs.index((row["policy"], row["regime"], row["seed"])))
    print(table(rows))
    by_policy = {policy: [row for row in rows if row["policy"] == policy] for policy in given.policies}
    broken = [
        name for name, (policy, holds) in PROMISES.items() if by_policy.get(policy) and not holds(by_policy[policy])
    ]
    rates = nulls.result() if nulls else {}
    broken += [f"null gates pass as {k!r}: {v:.3f} > alpha" for k, v in rates.items() if v > CONFIG.alpha]
    print("".join(f"on the boundary, {v:.2%} of {given.nulls} gates pass as {k}\n" for k, v in rates.items()), end="")
    if given.json:
        found = {"gates": given.gates, "rows": rows, "nulls": given.nulls, "null": rates, "broken": broken}
        given.json.write_text(json.dumps(found, indent=1) + "\n")
    print("\n".join(f"broken: {name}" for name in broken) or "every promise held")
    return int(bool(broken))


def table(rows: Sequence[Row]) -> str:
    """Means over seeds, a line per policy and regime."""
    lines = [f"{'policy':<52} {'regime':<8} promoted  false  true final  reading  power  items"]
    for name in dict.fromkeys(row["policy"] for row in rows):
        for regime in REGIMES:
            some = [row for row in rows if row["policy"] == name and row["regime"] == regime]
            mean = {k: statistics.mean(r[k] for r in some) for k in ("promoted", "true_final", "reading", "items")}
            false = sum(r["false_promoted"] for r in some) / max(1, sum(r["promoted"] for r in some))
            powers = [r["power"] for r in some if r["power"] is not None] or [math.nan]
            lines.append(
                f"{name:<52} {regime:<8} {mean['promoted']:>8.1f} {false:>6.0%} {mean['true_final']:>11.3f} "
                f"{mean['reading']:>8.3f}  {statistics.mean(powers):>5.0%} {mean['items']:>6.0f}"
            )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
