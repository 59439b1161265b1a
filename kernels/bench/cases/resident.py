"""resident: 4 steps of 512 or 2048 packed tokens on a random 0.5B in bfloat16, from rows on the host to factors on the
host, against PEFT's layers with padded rows, autocast and torch's fused AdamW.

The fixed costs of the HF Trainer, of wrapping and of a process's start are not in the peer's time: kernels/bench/
cpu_optim.py has those.
"""

from __future__ import annotations

import functools
import random
from typing import Any

import torch
from case import Case, Contender
from cltrain_kernels.adamw import AdamW
from cltrain_kernels.packing import Bucket, Row, segment
from cltrain_kernels.resident import Resident
from torch import Tensor
from torch.nn import functional as F

CONFIG = {
    "vocab_size": 151_936, "hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24,
    "num_attention_heads": 14, "num_key_value_heads": 2, "max_position_embeddings": 32768, "tie_word_embeddings": True,
}  # fmt: skip
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
NUM_STEPS, ROWS_PER_STEP, RATE = 4, 8, 1e-4


def cases(quick: bool) -> list[Case]:
    return [
        Case(
            "resident",
            {"model": "0.5B", "steps": NUM_STEPS, "tokens_per_step": tokens, "supervised": 0.3, "rank": 16},
            functools.partial(problem, tokens),
            functools.partial(contenders, tokens),
        )
        for tokens in ([512] if quick else [512, 2048])
    ]


def peft_model() -> Any:
    from peft import LoraConfig, get_peft_model
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    with torch.device("cuda"):
        base = Qwen2ForCausalLM(Qwen2Config(**CONFIG)).to(torch.bfloat16)
    base.requires_grad_(False)
    model = get_peft_model(base, LoraConfig(r=16, lora_alpha=32, target_modules=TARGETS))
    for parameter in model.parameters():
        if parameter.requires_grad:  # B too: zeros would run faster
            torch.nn.init.normal_(parameter.data, std=0.02)
            parameter.data = parameter.data.float()
    return model.eval()


def live_of(model: Any) -> dict[str, Any]:
    layers = {n: m for n, m in model.named_modules() if hasattr(m, "lora_A") and hasattr(m, "base_layer")}
    return {n: (m.lora_A["default"].weight, m.lora_B["default"].weight) for n, m in layers.items()}


def draw(num_tokens: int) -> list[list[Row]]:
    """Rows of unlike lengths for each step, `num_tokens` together; the last 30 % of each is supervised."""
    rng = random.Random(0)
    steps = []
    for _ in range(NUM_STEPS):
        cuts = sorted(rng.sample(range(16, num_tokens - 16, 16), ROWS_PER_STEP - 1))
        sizes = [end - begin for begin, end in zip([0, *cuts], [*cuts, num_tokens], strict=True)]
        steps.append([row(rng, size, 0.3) for size in sizes])
    total = sum(sum(one.weights) for one in steps[0])
    return [[Row(one.ids, tuple(w / total for w in one.weights)) for one in rows] for rows in steps]


def row(rng: random.Random, size: int, supervised: float) -> Row:
    num_silent = size - max(1, int(size * supervised))
    ids = tuple(rng.randrange(CONFIG["vocab_size"]) for _ in range(size))
    return Row(ids, (0.0,) * num_silent + (1.0,) * (size - num_silent))


class Ours:
    """A resident trainer and what it begins every update with."""

    def __init__(self, num_tokens: int, is_applied: bool) -> None:
        model = peft_model()
        if is_applied:
            from cltrain_kernels.apply import apply

            if (why_not := apply(model).why_not) is not None:
                raise RuntimeError(why_not)
        self.start = {m: (a.detach().clone(), b.detach().clone()) for m, (a, b) in live_of(model).items()}
        self.batches = [[segment([one]) for one in rows] for rows in draw(num_tokens)]
        bucket = Bucket(num_tokens, num_tokens // 2, ROWS_PER_STEP)
        self.resident = Resident(model, live_of(model), [bucket], AdamW(max_norm=1.0))
        self.resident.prepare()

    def update(self) -> list[Tensor]:
        saved: list[Tensor] = []
        self.resident.update(
            self.batches, [(RATE, RATE)] * NUM_STEPS, start=self.start,
            write=lambda factors: saved.extend(p.cpu() for pair in factors.values() for p in pair),
        )  # fmt: skip
        return saved


def peer(num_tokens: int) -> Any:
    """The same update by PEFT: rows padded to the longest, autocast, clip, fused AdamW, factors to the host."""
    model = peft_model()
    parameters = [p for pair in live_of(model).values() for p in pair]
    start = [p.detach().clone() for p in parameters]
    steps = draw(num_tokens)

    def update() -> list[Tensor]:
        with torch.no_grad():
            for parameter, value in zip(parameters, start, strict=True):
                parameter.copy_(value)
        adam = torch.optim.AdamW(parameters, lr=RATE, weight_decay=0.0, fused=True)
        for rows in steps:
            longest = max(len(one.ids) for one in rows)
            ids = torch.tensor([[*one.ids, *[0] * (longest - len(one.ids))] for one in rows], device="cuda")
            weights = torch.tensor([[*one.weights, *[0.0] * (longest - len(one.ids))] for one in rows], device="cuda")
            adam.zero_grad()
            with torch.autocast("cuda", torch.bfloat16):
                logits = model(input_ids=ids, use_cache=False).logits
            nll = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten(), reduction="none")
            (nll * weights[:, 1:].flatten()).sum().backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            adam.step()
        return [p.detach().cpu() for p in parameters]

    return update


def problem(num_tokens: int) -> str | None:
    """Two updates from one start are equal to the bit, and move the factors as PEFT's layers do, as far as bfloat16
    and Adam's first steps, which look at signs, let them; over PEFT's layers and over the fused ones."""
    theirs = peer(num_tokens)()
    for is_applied in (False, True):
        ours = Ours(num_tokens, is_applied)
        first, again = ours.update(), ours.update()
        what = "fused layers" if is_applied else "PEFT's layers"
        if not all(torch.equal(one, other) for one, other in zip(first, again, strict=True)):
            return f"{what}: two updates from one start differ"
        start = torch.cat([p.flatten() for pair in ours.start.values() for p in pair]).cpu()
        moves, expected = (torch.cat([p.flatten() for p in result]) - start for result in (first, theirs))
        cosine = float(moves @ expected / (moves.norm() * expected.norm()))
        if not cosine > 0.8:
            return f"{what}: the update's direction has a cosine of {cosine:.3f} to PEFT's"
    return None


def contenders(num_tokens: int) -> tuple[list[Contender], dict[str, str]]:
    updates = {
        "ours": Ours(num_tokens, is_applied=True).update,
        "ours_peft_layers": Ours(num_tokens, is_applied=False).update,
        "peft": peer(num_tokens),
    }
    return [Contender(name, quiet(update)) for name, update in updates.items()], {}


def quiet(update: Any) -> Any:
    """An update without its result: it is no gradient to compare."""

    def run() -> None:
        update()

    return run
