"""Whole LoRA training steps on a GPU: ours against PEFT under the Hugging Face Trainer, torch.compile, Liger, TRL,
Unsloth.

    python kernels/bench/peers.py --out DIR [--model 0.5B 8B] [--peer PEER ...] [--tokens 2048] [--seconds 420]

Every peer gets the same random-initialised model, tokens, mask, rank, optimiser and clipping, no gradient checkpointing
(the one exception is named so), and a process of its own, because some patch what others use. A step's time is between
CUDA events around its forward, backward and optimiser, as the peer's own trainer takes them. The losses of the first
steps stand in each row: a fast peer whose losses are others' is wrong. A peer that is not installed is reported as
absent, one that fails with its error; nothing is guessed. Refuses without a GPU; --tiny runs a toy model on the CPU and
prints no times, to see that the script works.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

RANK, SUPERVISED, NUM_WARMUP, NUM_TIMED = 16, 0.3, 5, 20


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
        return 3 if self.device == "cpu" else NUM_WARMUP + NUM_TIMED


Steps = list[tuple[float, float]]  # (ms, loss) of each


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


def ours(job: Job) -> Steps:
    """The ops of this package in a plain loop."""
    import torch
    from cltrain_kernels import apply, frozen_head, hidden_at, linear_loss

    model = make_model(job, adapters_in_float32=True)
    applied = apply(model)
    if applied.why_not:
        raise RuntimeError(f"the ops do not fit this model: {applied.why_not}")
    head = frozen_head(model.get_base_model().get_output_embeddings())
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    adam = torch.optim.AdamW(parameters, lr=1e-4, fused=True)
    steps = []
    for batch in make_batches(job):
        places = (batch["labels"][1:] >= 0).nonzero()[:, 0]
        targets, weights = batch["labels"][1:][places], torch.full((len(places),), 1 / len(places))
        ids = batch["input_ids"][None].to(job.device)
        watch = Watch(job)
        loss = linear_loss(hidden_at(model, ids, places.to(job.device)), head, targets, weights).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        adam.step()
        adam.zero_grad()
        steps.append((watch.ms(), float(loss)))
    return steps


def with_trainer(job: Job, adapters_in_float32: bool = True, **options: Any) -> Steps:
    """PEFT under the Hugging Face Trainer."""
    from transformers import Trainer, TrainingArguments

    return run(Trainer, make_model(job, adapters_in_float32), arguments(job, TrainingArguments, **options), job)


def trl(job: Job) -> Steps:
    from trl import SFTConfig, SFTTrainer

    options = {"dataset_kwargs": {"skip_prepare_dataset": True}, "max_length": None, "gradient_checkpointing": False}
    return run(SFTTrainer, make_model(job, True), arguments(job, SFTConfig, **options), job)


def unsloth(job: Job, checkpointing: Any = False) -> Steps:
    """Its model from a directory, as it wants it; what it patches stays in this process."""
    os.environ |= {"UNSLOTH_DISABLE_STATISTICS": "1", "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
    fast = importlib.import_module("unsloth").FastLanguageModel  # before transformers, which it patches
    import torch
    from transformers import Trainer, TrainingArguments

    with tempfile.TemporaryDirectory() as folder:
        make_base(job).save_pretrained(folder)
        model, _ = fast.from_pretrained(folder, max_seq_length=job.num_tokens, dtype=torch.bfloat16, load_in_4bit=False)
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    model = fast.get_peft_model(
        model, r=RANK, lora_alpha=2 * RANK, target_modules=targets, use_gradient_checkpointing=checkpointing
    )
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.02)
    return run(Trainer, model, arguments(job, TrainingArguments), job)


def arguments(job: Job, kind: Any, **options: Any) -> Any:
    common = {
        "output_dir": tempfile.mkdtemp(), "max_steps": job.num_steps, "per_device_train_batch_size": 1,
        "learning_rate": 1e-4, "lr_scheduler_type": "constant", "save_strategy": "no", "logging_strategy": "no",
        "report_to": [], "disable_tqdm": True, "remove_unused_columns": False, "seed": 0,
        "bf16": job.device != "cpu", "use_cpu": job.device == "cpu",
    }  # fmt: skip
    return kind(**(common | options))


def run(trainer: Any, model: Any, args: Any, job: Job) -> Steps:
    """Train on the job's batches in order; each step is timed around its forward, backward and optimiser."""
    import torch
    from transformers import TrainerCallback

    steps: Steps = []
    state: dict[str, Any] = {}

    class Timer(TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            state["watch"] = Watch(job)

        def on_step_end(self, *_: Any, **__: Any) -> None:
            steps.append((state["watch"].ms(), float(state["loss"])))

    class Seen(trainer):  # type: ignore[misc, valid-type]
        def compute_loss(self, *positional: Any, **named: Any) -> Any:
            found = super().compute_loss(*positional, **named)
            state["loss"] = (found[0] if isinstance(found, tuple) else found).detach()
            return found

        def _get_train_sampler(self, *_: Any, **__: Any) -> Any:
            return torch.utils.data.SequentialSampler(self.train_dataset)

    Seen(
        model, args, train_dataset=make_batches(job), callbacks=[Timer()],
        data_collator=lambda rows: {key: torch.stack([row[key] for row in rows]) for key in rows[0]},
    ).train()  # fmt: skip
    return steps


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


PEERS: dict[str, tuple[str, Callable[[Job], Steps]]] = {  # name -> the package that it needs, and how it runs
    "ours": ("cltrain_kernels.apply", ours),
    "peft_trainer": ("peft", with_trainer),
    "peft_trainer_bf16_adapters": ("peft", lambda job: with_trainer(job, adapters_in_float32=False)),
    "peft_trainer_compiled": ("peft", lambda job: with_trainer(job, torch_compile=True)),
    "peft_trainer_checkpointing": ("peft", lambda job: with_trainer(job, gradient_checkpointing=True)),
    "liger": ("liger_kernel", lambda job: with_trainer(job, use_liger_kernel=True)),
    "trl": ("trl", trl),
    "unsloth": ("unsloth", unsloth),
    "unsloth_checkpointing": ("unsloth", lambda job: unsloth(job, "unsloth")),
}


def absent(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is None
    except ModuleNotFoundError:
        return True


def row_of(name: str, job: Job, seconds: float) -> dict[str, Any]:
    """The row of one peer, from a process of its own."""
    row: dict[str, Any] = {"peer": name, "model": job.model, "num_tokens": job.num_tokens, "rank": RANK}
    package, _ = PEERS[name]
    if absent(package):
        return row | {"absent": f"{package} is not installed"}
    if seconds <= 0:
        return row | {"not_run": "the time was over"}
    command = [sys.executable, __file__, "--one", name, "--model", job.model, "--tokens", str(job.num_tokens)]
    command += ["--tiny"] if job.device == "cpu" else []
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds)
    except subprocess.TimeoutExpired:
        return row | {"failed": f"not done after {seconds:.0f} s"}
    if done.returncode:
        return row | {"failed": done.stderr.strip()[-600:]}
    return row | json.loads(done.stdout.strip().splitlines()[-1])


def measured(name: str, job: Job) -> dict[str, Any]:
    """In the peer's own process: its median step, tokens a second, peak memory, first losses."""
    import statistics

    import torch

    steps = PEERS[name][1](job)
    found: dict[str, Any] = {"losses": [loss for _, loss in steps[:3]]}
    if job.device == "cpu":
        return found
    ms = statistics.median(ms for ms, _ in steps[NUM_WARMUP:])
    peak = torch.cuda.max_memory_allocated()
    return found | {"ms": ms, "tokens_per_s": 1000 * job.num_tokens / ms, "peak_bytes": peak}


def main(argv: list[str] | None = None) -> int:
    sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, help="directory for peers.json")
    parser.add_argument("--model", nargs="*", choices=SHAPES, default=["0.5B", "8B"])
    parser.add_argument("--peer", nargs="*", choices=PEERS, default=list(PEERS))
    parser.add_argument("--tokens", type=int, default=2048, help="in one row, a row a step")
    parser.add_argument("--seconds", type=float, default=420.0, help="start no peer after this time")
    parser.add_argument("--tiny", action="store_true", help="a toy model on the CPU, without times")
    parser.add_argument("--one", choices=PEERS, help="only this peer, in this process")
    args = parser.parse_args(argv)
    jobs = [Job("tiny", 64, "cpu")] if args.tiny else [Job(model, args.tokens, "cuda") for model in args.model]
    if args.one:
        print(json.dumps(measured(args.one, jobs[0])))
        return 0
    if args.out is None:
        parser.error("--out is needed")
    import torch

    if not args.tiny and not torch.cuda.is_available():
        print("no GPU here: nothing was measured", file=sys.stderr)
        return 2
    from gpu import versions

    begun, rows = time.monotonic(), []
    for job in jobs:
        for name in args.peer:
            rows.append(row_of(name, job, args.seconds - (time.monotonic() - begun)))
            print(json.dumps(rows[-1]), flush=True)
    args.out.mkdir(parents=True, exist_ok=True)
    report = {"versions": {} if args.tiny else versions(), "num_timed": NUM_TIMED, "rows": rows}
    (args.out / "peers.json").write_text(json.dumps(report, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
