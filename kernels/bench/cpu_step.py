"""One training step on one CPU thread: PEFT under the Hugging Face Trainer against the ops of this package.

Same model, tokens, labels, optimiser and clipping, in float32; 30 % of the tokens are supervised. Steps alternate and
CPU seconds are counted, so that other processes matter little; memory is the rise of the peak over one step, in a
process of its own for each side. Gradients are compared before anything is timed. Shapes have Qwen2.5-0.5B's
proportions.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

SUPERVISED = 0.3


@dataclass(frozen=True)
class Shape:
    hidden: int = 384
    inner: int = 2080
    num_layers: int = 8
    num_heads: int = 6
    num_kv_heads: int = 1
    vocabulary: int = 21760
    num_rows: int = 2
    num_tokens: int = 512
    rank: int = 16
    num_steps: int = 5


TINY = Shape(64, 128, 2, 2, 1, 320, 2, 32, 4, 2)


def figures(tiny: bool = False) -> dict[str, Any]:
    """Medians, their ratios, and how far the gradients of both sides are apart."""
    shape = TINY if tiny else Shape()
    torch.set_num_threads(1)
    found = {**compare_gradients(shape), **time_steps(shape)}
    mib = {side: measure_memory(side, tiny) for side in ("peft", "ours")}
    found |= {f"mib_step_{side}": round(value, 1) for side, value in mib.items()}
    found["ratio_memory"] = round(mib["peft"] / mib["ours"], 3)
    return {**found, "step_shape": str(shape)}


def make_base(shape: Shape) -> Any:
    """A causal language model of random weights."""
    from transformers import AutoModelForCausalLM, Qwen2Config

    config = Qwen2Config(
        vocab_size=shape.vocabulary, hidden_size=shape.hidden, intermediate_size=shape.inner,
        num_hidden_layers=shape.num_layers, num_attention_heads=shape.num_heads,
        num_key_value_heads=shape.num_kv_heads, tie_word_embeddings=True,
    )  # fmt: skip
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32)


def make_model(shape: Shape) -> Any:
    """With LoRA, and B drawn at random too: zeros would run faster."""
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(
        make_base(shape),
        LoraConfig(r=shape.rank, lora_alpha=2 * shape.rank, target_modules="all-linear", task_type="CAUSAL_LM"),
    )
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.02)
    return model.train()


def make_batches(shape: Shape, num_batches: int) -> list[dict[str, Tensor]]:
    """Random tokens; the labels of all but 30 % are -100, in runs as answers are."""
    generator = torch.Generator().manual_seed(1)
    batches = []
    for _ in range(num_batches):
        ids = torch.randint(shape.vocabulary, (shape.num_rows, shape.num_tokens), generator=generator)
        is_answer = torch.arange(shape.num_tokens) % 32 >= round(32 * (1 - SUPERVISED))
        batches.append({"input_ids": ids, "labels": torch.where(is_answer, ids, -100)})
    return batches


def our_loss(model: Any, batch: dict[str, Tensor]) -> Tensor:
    """The mean loss per supervised token, as the Trainer's, computed at those tokens alone."""
    from cltrain_kernels import hidden_at, linear_loss

    targets = batch["labels"].roll(-1, 1)
    targets[:, -1] = -100
    places = (targets.flatten() >= 0).nonzero()[:, 0]
    hidden_MD = hidden_at(model, batch["input_ids"], places)
    head_VD = model.get_base_model().get_output_embeddings().weight
    weights_M = torch.full((len(places),), 1 / len(places))
    return linear_loss(hidden_MD, head_VD, targets.flatten()[places], weights_M).loss


def make_our_step(shape: Shape) -> Callable[[dict[str, Tensor]], None]:
    """One step as the Trainer takes it: AdamW after clipping to 1."""
    from cltrain_kernels import apply

    model = make_model(shape)
    assert apply(model).why_not is None
    parameters = [p for p in model.parameters() if p.requires_grad]
    adam = torch.optim.AdamW(parameters, lr=1e-4, fused=True)

    def step(batch: dict[str, Tensor]) -> None:
        our_loss(model, batch).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        adam.step()
        adam.zero_grad()

    return step


def run_trainer(
    shape: Shape, batches: list[dict[str, Tensor]], before: Callable[[], None], after: Callable[[], None]
) -> None:
    """Train with PEFT and the Trainer on these batches, calling `before` and `after` at each step."""
    from transformers import Trainer, TrainerCallback, TrainingArguments
    from transformers.utils import logging as transformers_logging

    class Watch(TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            before()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            after()

    transformers_logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder, max_steps=len(batches), per_device_train_batch_size=1, learning_rate=1e-4, use_cpu=True,
            save_strategy="no", logging_strategy="no", report_to=[], disable_tqdm=True, remove_unused_columns=False,
            dataloader_pin_memory=False, seed=0,
        )  # fmt: skip
        Trainer(
            make_model(shape), arguments, data_collator=lambda one: one[0], train_dataset=batches, callbacks=[Watch()]
        ).train()


def time_steps(shape: Shape) -> dict[str, float]:
    """CPU seconds of both sides' steps, one after the other in turn; the first of each warms up."""
    seconds: dict[str, list[float]] = {"peft": [], "ours": []}
    batches = make_batches(shape, shape.num_steps + 1)
    our_step, started = make_our_step(shape), [0.0]

    def before() -> None:
        started[0] = time.process_time()

    def after() -> None:
        seconds["peft"].append(time.process_time() - started[0])
        begun = time.process_time()
        our_step(batches[len(seconds["ours"])])
        seconds["ours"].append(time.process_time() - begun)

    run_trainer(shape, batches, before, after)
    medians = {side: statistics.median(taken[1:]) for side, taken in seconds.items()}
    return {
        **{f"seconds_step_{side}": round(median, 4) for side, median in medians.items()},
        "ratio_step": round(medians["peft"] / medians["ours"], 3),
    }


def compare_gradients(shape: Shape) -> dict[str, float]:
    """Our gradients against PEFT's, of the first batch."""
    from cltrain_kernels import apply

    model, (batch,) = make_model(shape), make_batches(shape, 1)
    model(**batch).loss.backward()
    theirs = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    assert apply(model).why_not is None
    our_loss(model, batch).backward()
    ours = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert ours.keys() == theirs.keys()
    a, b = (torch.cat([one[name].flatten() for name in theirs]).double() for one in (ours, theirs))
    return {
        "gradient_cosine": float(torch.dot(a, b) / a.norm() / b.norm()),
        "gradient_relative_error": float((a - b).norm() / b.norm()),
        "gradient_max_relative_error": float((a - b).abs().max() / b.abs().max()),
    }


def measure_memory(side: str, tiny: bool) -> float:
    """MiB that one step of a side adds to the peak of a process that has nothing else to do."""
    command = [sys.executable, __file__, side, *(["--tiny"] if tiny else [])]
    done = subprocess.run(command, capture_output=True, text=True, timeout=3600)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")
    return float(json.loads(done.stdout.splitlines()[-1]))


def memory_of_a_step(side: str, shape: Shape) -> float:
    """MiB from what is resident after a first step of a few tokens to the peak of the second."""
    torch.set_num_threads(1)
    short, full = make_batches(shape, 2)
    batches = [{name: tensor[:, :33] for name, tensor in short.items()}, full]
    resident: list[float] = []

    def before() -> None:
        resident.append(status_mib("VmRSS"))

    if side == "peft":
        run_trainer(shape, batches, before, lambda: None)
    else:
        step = make_our_step(shape)
        for batch in batches:
            before()
            step(batch)
    return status_mib("VmHWM") - resident[1]


def status_mib(name: str) -> float:
    """A figure of this process from Linux. (`ru_maxrss` would be the caller's where that is larger: exec keeps it.)"""
    line = next(row for row in Path("/proc/self/status").read_text().splitlines() if row.startswith(f"{name}:"))
    return int(line.split()[1]) / 2**10


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent.parent))
    print(json.dumps(memory_of_a_step(sys.argv[1], TINY if "--tiny" in sys.argv else Shape())))
