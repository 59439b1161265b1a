"""A base of a few thousand weights, rows of made-up tokens, and measurements that share nothing with the trainer."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cltrain.config import AdapterConfig, BoundsConfig, TrainerConfig
from cltrain.models.adapter import AdapterFile, read_adapter
from cltrain.models.anchors import load_anchors
from cltrain.models.base import Base, load_base
from cltrain.models.digest import MEMORY_FILE, adapter_digest
from cltrain.models.scoring import token_log_probs
from cltrain.records import Candidate, TokenRow
from cltrain.trainer.memory import Memory, read_memory
from cltrain.trainer.update import train_update
from tests.tiny import make_tiny_base

ADAPTER = AdapterConfig(rank=4, alpha=8)
TRAINER = TrainerConfig(num_steps=8, batch_size=4, kl_batch=3, lr=0.01, warmup_steps=1, checkpoint_every=3)
LOOSE = BoundsConfig(
    step_frobenius=99, drift_frobenius=99, step_spectral=99, drift_spectral=99, step_kl=99, drift_kl=99,
    day_frobenius=99,
)  # fmt: skip


@dataclass(frozen=True)
class Made:
    """A candidate as the next update finds it."""

    candidate: Candidate
    adapter: AdapterFile
    memory: Memory

    @property
    def content(self) -> tuple[str, bytes]:
        """What names its bytes: the adapter's digest, and the memory file."""
        path = Path(self.candidate.path)
        memory = path / MEMORY_FILE
        return adapter_digest(path), memory.read_bytes() if memory.exists() else b""


@dataclass(frozen=True)
class Tiny:
    """One tiny base with its anchors; every update gets a directory of its own under `directory`."""

    base: Base
    anchors: list[TokenRow]
    directory: Path

    def update(
        self, name: str, fresh: Sequence[TokenRow], replay: Sequence[TokenRow] = (), after: Made | None = None,
        *, trainer: dict[str, Any] | None = None, **changes: Any,
    ) -> Made:  # fmt: skip
        """Train from `after` (None: the bare base); `trainer` changes TRAINER, `changes` the other arguments."""
        arguments: dict[str, Any] = {
            "incumbent": after.adapter if after else None,
            "memory": after.memory if after else None,
            "adapter": ADAPTER,
            "fresh": fresh,
            "replay": replay,
            "anchors": self.anchors,
            "trainer": TRAINER.model_copy(update=trainer or {}),
            "bounds": LOOSE,
            "seed": 7,
            "work_dir": self.directory / name,
        }
        candidate = train_update(self.base, **{**arguments, **changes})
        adapter = read_adapter(Path(candidate.path))
        return Made(candidate, adapter, read_memory(Path(candidate.path), adapter))

    def nll(self, adapter: AdapterFile | None, rows: Sequence[TokenRow]) -> float:
        """Mean over rows of the mean NLL of their targets, nats."""
        return -sum(sum(row) / len(row) for row in token_log_probs(self.base, adapter, rows)) / len(rows)


def make_tiny(directory: Path, *, hidden: int = 32, num_layers: int = 1, seed: int = 0, family: str = "llama") -> Tiny:
    path = directory / f"base-{family}-{hidden}-{num_layers}-{seed}"
    make_tiny_base(path, family, hidden=hidden, num_layers=num_layers, seed=seed, initializer_range=0.3)
    base = load_base(path)
    anchors, _ = load_anchors(base, file=None, count=6, max_tokens=16, seed=1, directory=directory / "anchors")
    return Tiny(base, anchors, directory)


def skill_rows(skill: int, count: int, *, answer: int | None = None, seed: int = 0) -> list[TokenRow]:
    """Rows of one skill: its token behind noise, and four tokens that answer it (those of skill `answer`, if given)."""
    rows = []
    for i in range(count):
        noise = random.Random(f"{seed}/{skill}/{i}").choices(range(10, 60), k=6)
        first = 100 + 10 * (skill if answer is None else answer)
        ids = (*noise, 60 + skill, 61 + skill, *range(first, first + 4))
        rows.append(TokenRow(f"s{skill}-{i}", f"skill-{skill}", "anna", ids, (0.0,) * 8 + (1.0,) * 4))
    return rows


def dense(adapter: AdapterFile | None, module: str, shape: tuple[int, int]) -> np.ndarray:
    """The module's delta as a dense float64 matrix; zero without an adapter."""
    if adapter is None or module not in adapter.factors:
        return np.zeros(shape)
    a_RK, b_NR = (factor.numpy().astype(np.float64) for factor in adapter.factors[module])
    return adapter.alpha / adapter.rank * b_NR @ a_RK


def dense_distances(base: Base, adapter: AdapterFile, incumbent: AdapterFile | None) -> dict[str, float]:
    """The four weight distances of a BoundReport, from dense matrices in float64."""
    found = dict.fromkeys(("step_frobenius", "drift_frobenius", "step_spectral", "drift_spectral"), 0.0)
    for module in adapter.factors:
        w_NK = base.model.get_submodule(module).weight.detach().numpy().astype(np.float64)
        after, before = dense(adapter, module, w_NK.shape), dense(incumbent, module, w_NK.shape)
        size = np.linalg.norm(w_NK)
        for name, delta in (("step", after - before), ("drift", after)):
            for kind, order in (("frobenius", None), ("spectral", 2)):
                found[f"{name}_{kind}"] = max(found[f"{name}_{kind}"], float(np.linalg.norm(delta, order)) / size)
    return found
