"""A whole update of cltrain on one CPU thread: `trainer.kernels = "off"` (PEFT's modules, padded batches) over `auto`.

Same rows, seed, bounds and optimiser, in float32; what the steps measured is compared first. The rows are whole
episodes as the trainer makes them of an agent's log: one of three system prompts with its tools, then turns of which
the agent's own are supervised. Everything that an update does counts: reference passes, steps, bounds, the candidate
measured and written. Shapes have Qwen2.5-0.5B's proportions.
"""

from __future__ import annotations

import json
import random
import statistics
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import torch
from cpu_step import TINY, Shape, make_base

from cltrain.config import AdapterConfig, BoundsConfig, Kernels, TrainerConfig
from cltrain.models.base import Base
from cltrain.records import Candidate, TokenRow
from cltrain.trainer.update import train_update

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
FREE = BoundsConfig(
    step_frobenius=99, drift_frobenius=99, step_spectral=99, drift_spectral=99, step_kl=99, drift_kl=99,
    day_frobenius=99,
)  # fmt: skip


NUM_ROUNDS = 3


def figures(tiny: bool = False) -> dict[str, float]:
    """Median CPU seconds of both, their ratio, and how far apart what they measured is, relative to it."""
    torch.set_num_threads(1)
    shape, prompt = (TINY, 24) if tiny else (Shape(), 150)
    base = random_base(shape)
    rows, anchors = (episodes(shape.vocabulary, prompt, num, seed) for seed, num in enumerate((32, 4)))
    seconds: dict[Kernels, list[float]] = {"off": [], "auto": []}
    made: dict[Kernels, Candidate] = {}
    with tempfile.TemporaryDirectory() as folder:
        for turn in range(1 + (1 if tiny else NUM_ROUNDS)):  # the first is not counted
            for kernels, seen in seconds.items():
                begin = time.process_time()
                made[kernels] = update(base, rows, anchors, kernels, Path(folder) / f"{kernels}{turn}")
                seen.append(time.process_time() - begin)
    error = difference(made["off"], made["auto"])
    if error > 1e-4:
        raise RuntimeError(f"not timed: what the two updates measured differs by {error:.2g} of it")
    off_s, auto_s = (statistics.median(seen[1:]) for seen in seconds.values())
    return {
        "ratio_update": round(off_s / auto_s, 3),
        "seconds_update": round(auto_s, 3),
        "seconds_update_peft": round(off_s, 3),
        "update_max_relative_error": error,
    }


def update(base: Base, rows: list[TokenRow], anchors: list[TokenRow], kernels: Kernels, path: Path) -> Candidate:
    trainer = TrainerConfig(num_steps=2, batch_size=8, kl_batch=2, lr=1e-4, warmup_steps=1, kernels=kernels)
    return train_update(
        base, incumbent=None, adapter=AdapterConfig(rank=16, alpha=32, targets=TARGETS), fresh=rows[::2],
        replay=rows[1::2], anchors=anchors, trainer=trainer, bounds=FREE, seed=1, work_dir=path,
    )  # fmt: skip


def difference(one: Candidate, other: Candidate) -> float:
    """The largest relative difference of the losses and gradient norms of the last step. (The KL itself, some 1e-5 nats
    here, is rounding in its fourth digit.)"""
    names = [name for name in one.metrics if name.startswith(("nll_", "grad_norm")) and name.endswith("_last")]
    return max(abs(one.metrics[name] - other.metrics[name]) / one.metrics[name] for name in names)


def random_base(shape: Shape) -> Base:
    model = make_base(shape).eval().requires_grad_(False)
    return Base(Path("random"), model, SimpleNamespace(eos_token_id=0), "random", 4096, "cpu")


def episodes(vocabulary: int, prompt: int, num: int, seed: int) -> list[TokenRow]:
    """Rows of 3 to 5 turns behind one of three prompts of so many tokens; the agent's own are a third or so."""

    def draw(rng: random.Random, size: int) -> tuple[int, ...]:
        return tuple(rng.randrange(1, vocabulary) for _ in range(size))

    prompts = [draw(random.Random(i), prompt) for i in range(3)]
    rows = []
    for i in range(num):
        rng = random.Random(f"{seed}/{i}")
        ids, weights = prompts[i % 3], (0.0,) * prompt
        for _ in range(rng.randint(3, 5)):
            asked, answer = draw(rng, rng.randint(5, 40)), draw(rng, rng.randint(5, 40))
            ids, weights = (*ids, *asked, *answer), (*weights, *[0.0] * len(asked), *[1.0] * len(answer))
        rows.append(TokenRow(f"{seed}-{i}", f"stratum-{i % 3}", f"user-{i % 5}", ids, weights))
    return rows


if __name__ == "__main__":
    print(json.dumps(figures(), indent=1))
