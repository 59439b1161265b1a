"""What the tests of the embedded server share: random adapters with an effect, and rows answered without HTTP."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path

import torch

from cltrain.deploy.engine import Delta, Engine, Row
from cltrain.deploy.sampling import Sampling
from cltrain.models.adapter import new_factors, write_adapter
from cltrain.models.base import Base

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def random_adapter(base: Base, directory: Path, seed: int, rank: int = 4, targets: Sequence[str] = TARGETS) -> Path:
    """An adapter with random B, strong enough to change greedy answers."""
    adapter = new_factors(base, rank, 2.0 * rank, targets, seed)
    generator = torch.Generator().manual_seed(seed)
    noisy = {m: (a, 0.1 * torch.randn(b.shape, generator=generator)) for m, (a, b) in adapter.factors.items()}
    write_adapter(directory, adapter.with_factors(noisy))
    return directory


class Waiting:
    """A submitted row and what it said."""

    def __init__(
        self, engine: Engine, model: str, ids: Sequence[int], sampling: Sampling, *, is_streamed: bool = False
    ) -> None:
        self.deltas: list[Delta] = []
        self.done = threading.Event()
        self.row = Row(tuple(ids), sampling, engine.adapters.resolve(model), self._emit, is_streamed=is_streamed)
        engine.submit(self.row)

    def _emit(self, delta: Delta) -> None:
        self.deltas.append(delta)
        if delta.is_last:
            self.done.set()

    def result(self) -> Delta:
        assert self.done.wait(60), "the engine gave no answer"
        return self.deltas[-1]

    def ids(self) -> list[int]:
        self.result()
        return [token.id for delta in self.deltas for token in delta.tokens]
