"""Ways of deciding that are common elsewhere, and steps towards ours: what `scripts/bench gate` compares ours with."""

from __future__ import annotations

import math

import numpy as np

from cltrain.config import GateConfig
from cltrain.gate.judge import CHUNK
from cltrain.gate.stats import e_value

Answers = np.ndarray  # (WORLD,) bool: which questions are answered right
Sample = np.ndarray  # indices of questions

WORLD = 24_000
NUM_ITEMS = 800
CONFIG = GateConfig(promote_on="expected", margin=0.02, items_per_gate=NUM_ITEMS)
Z = 1.645


class Policy:
    """One way of deciding, with what it remembers from gate to gate. `look` answers whether to promote."""

    def __init__(self, rng: np.random.Generator, start: Answers) -> None:
        self.rng, self.incumbent, self.base = rng, start, start
        self.num_asked = 0

    def sample(self) -> Sample:
        raise NotImplementedError

    def passes(self, candidate: Answers, asked: Sample) -> bool:
        raise NotImplementedError

    def look(self, candidate: Answers) -> bool:
        asked = self.sample()
        self.num_asked += len(asked)
        return self.passes(candidate, asked)

    def promote(self, candidate: Answers) -> None:
        self.incumbent = candidate

    def reading(self) -> float:
        """What the policy believes of its incumbent."""
        return float(self.incumbent[self.sample()].mean())


def gains(candidate: Answers, reference: Answers, asked: Sample) -> np.ndarray:
    """Per question asked: 1 won, -1 lost, 0 the same."""
    return candidate[asked].astype(np.int8) - reference[asked].astype(np.int8)


class Fixed(Policy):
    num = 200

    def __init__(self, rng: np.random.Generator, start: Answers) -> None:
        super().__init__(rng, start)
        self.kept = rng.choice(WORLD, self.num, replace=False)

    def sample(self) -> Sample:
        return self.kept


class Fresh(Policy):
    num = 200

    def sample(self) -> Sample:
        return self.rng.choice(WORLD, self.num, replace=False)


def z_bound(differences: np.ndarray) -> float:
    """Lower end of a one-sided 95 % interval of the mean, by the normal approximation."""
    return float(differences.mean() - Z * differences.std() / math.sqrt(len(differences)))


class Strict(Fixed):
    def passes(self, candidate: Answers, asked: Sample) -> bool:
        return float(gains(candidate, self.incumbent, asked).mean()) > 0


class ZFixed(Fixed):
    def passes(self, candidate: Answers, asked: Sample) -> bool:
        return z_bound(gains(candidate, self.incumbent, asked)) > 0


class ZFresh(Fresh):
    passes = ZFixed.passes


class Ladder(Fixed):
    """Blum and Hardt, "The Ladder" (2015), parameter-free: better by a standard error."""

    def passes(self, candidate: Answers, asked: Sample) -> bool:
        d = gains(candidate, self.incumbent, asked)
        return float(d.mean()) > float(d.std()) / math.sqrt(len(d))


class NotWorse(Fixed):  # by 4 points
    def passes(self, candidate: Answers, asked: Sample) -> bool:
        return z_bound(gains(candidate, self.incumbent, asked)) > -0.04


class NotWorseThanBase(NotWorse):
    def passes(self, candidate: Answers, asked: Sample) -> bool:
        return super().passes(candidate, asked) and z_bound(gains(candidate, self.base, asked)) > -0.04


class Better(Fresh):
    """e-value that it is better, looked at after every chunk."""

    num, margin = NUM_ITEMS, 0.0

    def passes(self, candidate: Answers, asked: Sample) -> bool:
        d = gains(candidate, self.incumbent, asked)
        ends = range(CHUNK, len(d) + 1, CHUNK)
        return any(e_value(d[:end].tolist(), -self.margin) >= 1 / CONFIG.alpha for end in ends)


class NotWorseThanBest(Better):
    """And not inferior to a high-water mark, which moves only on overwhelming evidence."""

    margin = 0.02

    def __init__(self, rng: np.random.Generator, start: Answers) -> None:
        super().__init__(rng, start)
        self.best, self.moves = start, False

    def passes(self, candidate: Answers, asked: Sample) -> bool:
        against = gains(candidate, self.best, asked).tolist()
        self.moves = e_value(against, 0.0) >= CONFIG.high_water_evidence
        return super().passes(candidate, asked) and e_value(against, -self.margin) >= 1 / CONFIG.alpha

    def promote(self, candidate: Answers) -> None:
        super().promote(candidate)
        self.best = candidate if self.moves else self.best


class Spending(Fresh):
    """A sign test at alpha / t^2: never more than alpha in all, for ever."""

    num = NUM_ITEMS

    def __init__(self, rng: np.random.Generator, start: Answers) -> None:
        super().__init__(rng, start)
        self.gate = 0

    def passes(self, candidate: Answers, asked: Sample) -> bool:
        self.gate += 1
        d = gains(candidate, self.incumbent, asked)
        wins, losses = int((d > 0).sum()), int((d < 0).sum())
        above = (wins - losses - 1) / math.sqrt(max(1, wins + losses))
        p = 0.5 * math.erfc(above / math.sqrt(2))
        return p <= CONFIG.alpha * 6 / math.pi**2 / self.gate**2
