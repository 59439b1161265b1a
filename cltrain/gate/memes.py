"""Phrases and traits that move between agents. Pure: texts and numbers in, findings out; nothing here decides alone.

Agents on one base can infect each other through text that shows nothing (research/learning.md, B.7), so two things are
watched: phrases that no base sample and no user ever said, with the number of new adopters that each adopter makes; and
whether agents that share no data deviate from the base in the same traits.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

from scipy.stats import pearsonr

WORD = re.compile(r"\w+")
GRAM = 4  # words of a phrase
MIN_AGENTS = 3  # below it a phrase may be two agents' coincidence
MIN_PROBES = 3  # below it there is no correlation


@dataclass(frozen=True, slots=True)
class Said:
    """One answer of an agent."""

    agent: str
    period: int  # day, or whatever the caller counts in
    text: str


@dataclass(frozen=True, slots=True)
class Meme:
    """A phrase and who took it up when. `reproduction`: new adopters per agent that could have passed it on; an alarm
    is above 1 with at least MIN_AGENTS."""

    phrase: str
    adopted: tuple[tuple[str, int], ...]  # (agent, first period), in order
    reproduction: float

    @property
    def is_alarm(self) -> bool:
        return len(self.adopted) >= MIN_AGENTS and self.reproduction > 1


@dataclass(frozen=True, slots=True)
class SharedTrait:
    """Two agents whose deviations from the base go together; `p` is corrected for the number of pairs."""

    agents: tuple[str, str]
    correlation: float
    p: float


def find_memes(said: Sequence[Said], known: Iterable[str], *, min_uses: int = 2) -> list[Meme]:
    """Phrases of GRAM words that agents use at least `min_uses` times each and that stand in none of the `known` texts
    (samples of the base, what users wrote). Most adopters first; overlapping phrases of one longer phrase are one."""
    ordinary = {gram for text in known for gram in _grams(text)}
    uses: dict[str, dict[str, list[int]]] = defaultdict(lambda: defaultdict(list))
    for one in said:
        for gram in _grams(one.text) - ordinary:
            uses[gram][one.agent].append(one.period)
    memes: dict[tuple[tuple[str, int], ...], Meme] = {}
    for phrase in sorted(uses):
        first = {agent: min(periods) for agent, periods in uses[phrase].items() if len(periods) >= min_uses}
        adopted = tuple(sorted(first.items(), key=lambda pair: (pair[1], pair[0])))
        if len(adopted) > 1:
            memes.setdefault(adopted, Meme(phrase, adopted, reproduction([period for _, period in adopted])))
    return sorted(memes.values(), key=lambda meme: (-len(meme.adopted), -meme.reproduction, meme.phrase))


def reproduction(first_periods: Sequence[int]) -> float:
    """New adopters after the first period, over those who had adopted before the last one; 0 where all began at once.

    first_periods: one per adopter.
    """
    if not first_periods:
        return 0.0
    begin, end = min(first_periods), max(first_periods)
    new = sum(period > begin for period in first_periods)
    return new / sum(period < end for period in first_periods) if new else 0.0


def shared_traits(deviations: Mapping[str, Sequence[float]], *, alpha: float = 0.05) -> list[SharedTrait]:
    """Pairs of agents whose deviations on the same probes correlate beyond chance (Pearson, one-sided, Bonferroni).

    deviations: agent -> shift of its log-odds from the base on each probe, nats, in the same order; only agents that
    share no data should be given. Raises ValueError for lists of unlike or too little length.
    """
    lengths = {len(values) for values in deviations.values()}
    if len(lengths) > 1 or (lengths and min(lengths) < MIN_PROBES):
        raise ValueError(
            f"every agent needs a deviation on the same probes, {MIN_PROBES} at least; got {sorted(lengths)}"
        )
    pairs = list(combinations(sorted(deviations), 2))
    found = []
    for one, other in pairs:
        if len(set(deviations[one])) == 1 or len(set(deviations[other])) == 1:
            continue  # an agent that deviates alike on all probes correlates with nobody
        result = pearsonr(deviations[one], deviations[other], alternative="greater")
        p = min(1.0, float(result.pvalue) * len(pairs))
        if p <= alpha:
            found.append(SharedTrait((one, other), float(result.statistic), p))
    return sorted(found, key=lambda trait: trait.p)


def _grams(text: str) -> set[str]:
    words = WORD.findall(text.casefold())
    return {" ".join(words[i : i + GRAM]) for i in range(len(words) - GRAM + 1)}
