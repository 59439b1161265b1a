"""One LoRA training step of ours and one of PEFT's modules on the same random model, and whether they are the same.

`peers.py` times them beside the trainers of others.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

RANK, SUPERVISED, NUM_WARMUP, NUM_TIMED = 16, 0.3, 5, 20
NUM_CHECKED = 3  # steps whose losses must be PEFT's
MIN_COSINE = {"cpu": 0.99999, "cuda": 0.98}  # of our first gradient to PEFT's, float32 and bfloat16
LOSS_TOLERANCE = {"cpu": 1e-4, "cuda": 2e-3}  # relative; random models' losses are near log V whatever they are shown


@dataclass(frozen=True)
class Shape:
    hidden: int
    inner: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    vocabulary: int


SHAPES = {
    "0.5B": Shape(896, 4864, 24, 14, 2, 151_936),
    "8B": Shape(4096, 14336, 32, 32, 8, 128_256),
    "tiny": Shape(64, 128, 2, 2, 1, 320),
}


@dataclass(frozen=True)
class Job:
    model: str
    num_tokens: int
    device: str

    @property
    def num_steps(self) -> int:
        return NUM_CHECKED if self.device == "cpu" else NUM_WARMUP + NUM_TIMED


Row = dict[str, Any]
Steps = list[tuple[float, float]]  # (ms, loss) of each
LossOf = Callable[[dict[str, Any]], Any]  # a batch's loss, to be differentiated


def make_model(job: Job, adapters_in_float32: bool) -> Any:
    """Random weights in bfloat16 (float32 on a CPU), LoRA on every linear, and B random too: zeros would run faster."""
    import torch
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(
        make_base(job),
        LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear", task_type="CAUSAL_LM"),
        autocast_adapter_dtype=adapters_in_float32,
    )
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.02)
    return model.train()


def make_base(job: Job) -> Any:
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    shape = SHAPES[job.model]
    config = LlamaConfig(
        vocab_size=shape.vocabulary, hidden_size=shape.hidden, intermediate_size=shape.inner,
        num_hidden_layers=shape.num_layers, num_attention_heads=shape.num_heads,
        num_key_value_heads=shape.num_kv_heads, max_position_embeddings=max(8192, job.num_tokens),
    )  # fmt: skip
    torch.manual_seed(0)
    with torch.device(job.device):
        dtype = torch.float32 if job.device == "cpu" else torch.bfloat16
        return AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa")


def make_batches(job: Job) -> list[dict[str, Any]]:
    """One row of random tokens a step; runs of 30% of them are supervised, as answers are."""
    import torch

    rng, batches = torch.Generator().manual_seed(2), []
    for _ in range(job.num_steps):
        ids = torch.randint(SHAPES[job.model].vocabulary, (job.num_tokens,), generator=rng)
        is_answer = torch.arange(job.num_tokens) % 64 >= round(64 * (1 - SUPERVISED))
        batches.append({"input_ids": ids, "labels": torch.where(is_answer, ids, -100)})
    return batches


def our_loss(job: Job, model: Any) -> LossOf:
    """Let the ops run the model; the loss by its hidden states and `linear_loss`."""
    import torch
    from cltrain_kernels import apply, frozen_head, hidden_at, linear_loss

    applied = apply(model)
    if applied.why_not:
        raise RuntimeError(f"the ops do not fit this model: {applied.why_not}")
    head = frozen_head(model.get_base_model().get_output_embeddings())

    def loss_of(batch: dict[str, Any]) -> Any:
        places = (batch["labels"][1:] >= 0).nonzero()[:, 0]
        targets, weights = batch["labels"][1:][places], torch.full((len(places),), 1 / len(places))
        ids = batch["input_ids"][None].to(job.device)
        return linear_loss(hidden_at(model, ids, places.to(job.device)), head, targets, weights).loss

    return loss_of


def pefts_loss(job: Job, model: Any) -> LossOf:
    """The model's own loss by its own modules, under autocast as the Trainer runs it."""
    import torch

    def loss_of(batch: dict[str, Any]) -> Any:
        inputs = {name: values[None].to(job.device) for name, values in batch.items()}
        with torch.autocast("cuda", torch.bfloat16, enabled=job.device != "cpu"):
            return model(**inputs).loss

    return loss_of


def plain_steps(job: Job, model: Any, loss_of: LossOf, num_steps: int) -> tuple[Steps, Any]:
    """(ms, loss) of each step, and the first step's gradient as one vector."""
    import torch

    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    adam = torch.optim.AdamW(parameters, lr=1e-4, weight_decay=0.0, fused=True)
    steps, first = [], None
    for batch in make_batches(job)[:num_steps]:
        watch = Watch(job)
        loss = loss_of(batch)
        loss.backward()
        if first is None:
            first = torch.cat([parameter.grad.flatten() for parameter in parameters])
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        adam.step()
        adam.zero_grad()
        steps.append((watch.ms(), float(loss)))
    return steps, first


def check(job: Job, make_ours: Callable[[Job, Any], LossOf] = our_loss) -> Row:
    """PEFT's losses, the cosine of our first gradient to PEFT's, and a `problem` where ours differ. Times nothing."""
    import torch

    found = []
    for make_loss in (pefts_loss, make_ours):
        model = make_model(job, adapters_in_float32=True)
        steps, gradient = plain_steps(job, model, make_loss(job, model), NUM_CHECKED)
        found.append(([loss for _, loss in steps], gradient.double().cpu()))
        del model, gradient
        if job.device != "cpu":
            torch.cuda.empty_cache()
    (losses, theirs), (our_losses, mine) = found
    row = {"losses": losses, "our_losses": our_losses, "cosine": float(mine @ theirs / (mine.norm() * theirs.norm()))}
    if not row["cosine"] >= MIN_COSINE[job.device]:  # NaN too
        return row | {"problem": f"our gradient has a cosine of {row['cosine']:.6f} to PEFT's"}
    return row | ({} if are_alike(our_losses, losses, job) else {"problem": "our losses are not PEFT's"})


def are_alike(losses: list[float], expected: list[float], job: Job) -> bool:
    limit = LOSS_TOLERANCE[job.device]
    pairs = zip(losses, expected, strict=True)
    return len(losses) == NUM_CHECKED and all(abs(one - other) <= limit * abs(other) for one, other in pairs)


class Watch:
    """Milliseconds since it was made: by CUDA events on a GPU."""

    def __init__(self, job: Job) -> None:
        import torch

        self.start = None if job.device == "cpu" else torch.cuda.Event(enable_timing=True)
        if self.start is not None:
            self.start.record()

    def ms(self) -> float:
        import torch

        if self.start is None:
            return 0.0
        end = torch.cuda.Event(enable_timing=True)
        end.record()
        torch.cuda.synchronize()
        return float(self.start.elapsed_time(end))
