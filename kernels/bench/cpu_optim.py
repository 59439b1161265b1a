"""What the flat optimiser, the Grams, packing and the resident trainer save on one CPU thread.

    python kernels/bench/cpu_optim.py

One thread, CPU time, both sides in turns on the same data, medians. Every ratio follows a check that both sides agree.
The factors have the shapes of Qwen2.5-0.5B's 168 linears at rank 16 (8.8M numbers). The agent log is generated, 60
episodes from a fixed seed: a system prompt with tools of 300 to 900 tokens that a quarter of the episodes share, 2 to
12 turns of 20 to 300 tokens of user or tool text and 20 to 150 tokens of answer, every third turn answered a second
time (a retry), each turn one row that ends with its answer and is supervised there.
"""

from __future__ import annotations

import gc
import json
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from cltrain_kernels.adamw import AdamW, adamw_step
from cltrain_kernels.flat import FlatLoRA
from cltrain_kernels.grams import delta_norms
from cltrain_kernels.packing import Bucket, Row, pack_all, ratios, segment
from cltrain_kernels.resident import Resident
from torch.nn import Parameter

from cltrain.models.adapter import attach, new_factors, parameters_of, write_adapter
from cltrain.models.base import Base, load_base

SHAPES = {"q": (896, 896), "k": (128, 896), "v": (128, 896), "o": (896, 896), "gate": (4864, 896), "up": (4864, 896),
          "down": (896, 4864)}  # fmt: skip
RANK = 16
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
BATCH = 8  # rows per padded batch


def figures(tiny: bool = False) -> dict[str, float]:
    """Every figure by name, times in CPU seconds; `tiny` only shows that all of it runs."""
    torch.set_num_threads(1)
    num_layers, num_episodes, num_rounds = (1, 6, 1) if tiny else (24, 60, 5)
    return (
        gram_figures(num_layers, num_rounds)
        | adam_figures(num_layers, num_rounds)
        | packing_figures(num_episodes)
        | fixed_figures(num_rounds)
    )


def gram_figures(num_layers: int, num_rounds: int) -> dict[str, float]:
    """Frobenius norms of all deltas: dense products against Grams."""
    state = FlatLoRA(random_factors(num_layers))
    factors, layout = state.factors(), state.layout

    buffers = {shape: torch.empty(shape) for shape in SHAPES.values()}

    def dense() -> torch.Tensor:
        norms = []
        for module in layout.modules:
            a_RK, b_NR = factors[module]
            buffer_NK = buffers[b_NR.shape[0], a_RK.shape[1]]
            norms.append(torch.linalg.vector_norm(torch.mm(b_NR.detach(), a_RK.detach(), out=buffer_NK)))
        return torch.stack(norms)

    some = layout.modules[:4]
    true = torch.stack([torch.linalg.vector_norm(factors[m][1].double() @ factors[m][0].double()) for m in some])
    torch.testing.assert_close(delta_norms(layout, state.values, 1.0)[:4].double(), true, rtol=1e-6, atol=0)
    # A dense norm in float32 sums 4M squares: it is itself wrong by up to 1e-4.
    torch.testing.assert_close(delta_norms(layout, state.values, 1.0), dense(), rtol=1e-3, atol=0)
    dense_s, gram_s = in_turns(num_rounds, dense, lambda: delta_norms(layout, state.values, 1.0))
    return {"ratio_gram": dense_s / gram_s, "seconds_norms_dense": dense_s, "seconds_norms_gram": gram_s}


def adam_figures(num_layers: int, num_rounds: int) -> dict[str, float]:
    """Clip and AdamW step: torch's foreach over 336 tensors, and its fused, against one pass over the flat buffer."""
    sides = {name: random_factors(num_layers) for name in ("flat", "foreach", "fused")}
    parameters = {name: [p for pair in factors.values() for p in pair] for name, factors in sides.items()}
    state = FlatLoRA(sides["flat"])
    rng = torch.Generator().manual_seed(1)
    for same in zip(*parameters.values(), strict=True):
        gradient = torch.randn(same[0].shape, generator=rng)
        for parameter in same:
            parameter.grad = gradient.clone() if parameter.grad is None else parameter.grad.copy_(gradient)
    adams = {
        name: torch.optim.AdamW(parameters[name], lr=1e-3, weight_decay=0.0, **{name: True})
        for name in ("foreach", "fused")
    }
    rates_2 = torch.full((2,), 1e-3)

    def torchs(name: str) -> None:
        torch.nn.utils.clip_grad_norm_(parameters[name], 1.0)
        adams[name].step()

    def ours() -> None:
        adamw_step(state, rates_2, AdamW(max_norm=1.0))

    flat_s, foreach_s, fused_s = in_turns(num_rounds, ours, lambda: torchs("foreach"), lambda: torchs("fused"))
    for one, other in zip(parameters["flat"], parameters["foreach"], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
    return {"ratio_adam": foreach_s / flat_s, "ratio_adam_fused": fused_s / flat_s, "seconds_adam": flat_s}


def packing_figures(num_episodes: int) -> dict[str, float]:
    """Tokens of padded batches over those of packed buckets, of rows one by one over those of prefix trees."""
    episodes = agent_log(num_episodes)
    rows = [row for episode in episodes for row in episode]
    shuffled = random.Random(1).sample(rows, len(rows))
    parts = [shuffled[i : i + BATCH] for i in range(0, len(shuffled), BATCH)]
    padded = sum(len(part) * max(len(row.ids) for row in part) for part in parts)
    longest = max(len(row.ids) for row in rows)
    buckets = [Bucket(size, size, 64) for size in (512, 1024, 2048, 4096, 8192, 16384) if size >= min(512, longest)]
    packed = pack_all([segment([row]) for row in rows], buckets)
    trees = pack_all([segment(episode) for episode in episodes], buckets)
    return {
        "ratio_packing": padded / sum(len(one.ids_T) for one in packed),
        "ratio_tree": ratios(trees)["ratio_tree"],
        "fill_packing": ratios(packed)["fill"],
        "fill_tree": ratios(trees)["fill"],
    }


def fixed_figures(num_rounds: int) -> dict[str, float]:
    """What an update of four steps costs beside its computing: rows of two tokens on the shipped base, result saved."""
    from peft import LoraConfig, get_peft_model
    from transformers import Trainer, TrainingArguments

    base = load_base(None)
    start = new_factors(base, RANK, 2.0 * RANK, TARGETS, seed=0)
    model = attach(base, start)
    live: Any = parameters_of(model, start)
    resident = Resident(model, live, [Bucket(8, 8, 4)], AdamW(max_norm=1.0))
    batches = [[segment([Row((5, 6 + i), (0.0, 1.0))])] for i in range(4)]
    data = [{"input_ids": [5, 6 + i], "labels": [5, 6 + i]} for i in range(4)]
    wrapped = get_peft_model(fresh_model(base), LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=TARGETS))
    folder = Path(tempfile.mkdtemp())
    num_saved = 0

    def ours() -> None:
        nonlocal num_saved
        num_saved += 1
        path = folder / f"ours{num_saved}"
        resident.update(
            batches, [(1e-3, 1e-3)] * 4, start=start.factors,
            write=lambda factors: write_adapter(path, start.with_factors(dict(factors))),
        )  # fmt: skip

    def trainers() -> None:
        arguments = TrainingArguments(
            str(folder / "peft"), max_steps=4, per_device_train_batch_size=1, save_strategy="no", report_to="none",
            logging_strategy="no", use_cpu=True, disable_tqdm=True, dataloader_pin_memory=False,
        )  # fmt: skip
        Trainer(wrapped, arguments, train_dataset=data).train()
        wrapped.save_pretrained(folder / "peft")

    ours_s, peft_s = in_turns(num_rounds, ours, trainers)
    return {"seconds_fixed": ours_s, "seconds_fixed_peft": peft_s}


def fresh_model(base: Base) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(base.path, dtype=torch.float32, local_files_only=True)


def random_factors(num_layers: int) -> dict[str, tuple[Parameter, Parameter]]:
    rng = torch.Generator().manual_seed(0)
    return {
        f"{layer}.{name}": (
            Parameter(torch.randn(RANK, num_in, generator=rng)),
            Parameter(0.01 * torch.randn(num_out, RANK, generator=rng)),
        )
        for layer in range(num_layers)
        for name, (num_out, num_in) in SHAPES.items()
    }


def agent_log(num_episodes: int, seed: int = 0) -> list[list[Row]]:
    """Rows of each episode; see the top of this file."""
    rng = random.Random(seed)

    def text(low: int, high: int) -> tuple[int, ...]:
        return tuple(rng.randrange(1000, 100_000) for _ in range(rng.randint(low, high)))

    prompts = [text(300, 900) for _ in range(4)]
    episodes = []
    for _ in range(num_episodes):
        so_far = rng.choice(prompts)
        rows = []
        for _ in range(rng.randint(2, 12)):
            so_far += text(20, 300)
            answers = [text(20, 150) for _ in range(2 if rng.random() < 1 / 3 else 1)]
            rows += [Row(so_far + answer, (0.0,) * len(so_far) + (1.0,) * len(answer)) for answer in answers]
            so_far += answers[-1]
        episodes.append(rows)
    return episodes


def in_turns(num_rounds: int, *sides: Callable[[], object]) -> list[float]:
    """Median CPU seconds of each side, run in turns; in its turn each runs twice and the second counts.

    The first brings its memory back into reach: what the others' turns let the system page out costs tenfold.
    """
    times: list[list[float]] = [[] for _ in sides]
    for _ in range(num_rounds):
        for side, seen in zip(sides, times, strict=True):
            gc.collect()  # each side pays for its own garbage only; not between its runs, it would empty the caches
            side()
            begin = time.process_time()
            side()
            seen.append(time.process_time() - begin)
    return [statistics.median(seen) for seen in times]


if __name__ == "__main__":
    print(json.dumps(figures(), indent=1))
