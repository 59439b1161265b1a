"""Whole LoRA training steps on a GPU: ours against PEFT under the Hugging Face Trainer, torch.compile, Liger, TRL,
Unsloth.

    python kernels/bench/peers.py --out DIR [--model 0.5B 8B] [--peer PEER ...] [--tokens 2048] [--seconds 420]

Every peer gets the same random-initialised model, tokens, mask, rank, optimiser and clipping, no gradient checkpointing
(the one exception is named so), and a process of its own, because some patch what others use. A step's time is between
CUDA events around its forward, backward and optimiser, as the peer's own trainer takes them.

Before anything is timed, our gradient and three losses are compared with those of PEFT's modules: if they differ, that
is all that is written of the model, and the exit code is 1. So it is when our steps fail. Whoever's first losses are
not PEFT's gets no speed. A peer that is not installed is reported as absent, one that fails with its error; nothing is
guessed. Refuses without a GPU; --tiny runs a toy model on the CPU and prints no times, to see that the script works.
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
from pathlib import Path
from typing import Any

from steps import (
    NUM_CHECKED,
    NUM_TIMED,
    NUM_WARMUP,
    RANK,
    SHAPES,
    Job,
    Row,
    Steps,
    Watch,
    are_alike,
    check,
    make_base,
    make_batches,
    make_model,
    our_loss,
    plain_steps,
)

CHECK = "check"  # its name beside the peers'
SPEED = ("ms", "tokens_per_s", "peak_bytes")


def ours(job: Job) -> Steps:
    """The ops of this package in a plain loop."""
    model = make_model(job, adapters_in_float32=True)
    return plain_steps(job, model, our_loss(job, model), job.num_steps)[0]


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


def row_of(name: str, job: Job, seconds: float) -> Row:
    """The row of one peer, or of the check, from a process of its own."""
    row: Row = {"op": "steps", "peer": name, "model": job.model, "num_tokens": job.num_tokens, "rank": RANK}
    package = "peft" if name == CHECK else PEERS[name][0]
    if absent(package):
        return row | {"absent": f"{package} is not installed"}
    if seconds <= 0:
        return row | {"not_run": "the time was over"}
    command = [sys.executable, __file__, "--one", name, "--model", job.model, "--tokens", str(job.num_tokens)]
    command += ["--tiny"] if job.device == "cpu" else []
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds)
    except subprocess.TimeoutExpired:
        return row | {"not_run": f"not done after the {seconds:.0f} s that were left"}
    if done.returncode:
        return row | {"failed": done.stderr.strip()[-600:]}
    return row | json.loads(done.stdout.strip().splitlines()[-1])


def measured(name: str, job: Job) -> Row:
    """In the peer's own process: its median step, tokens a second, peak memory, first losses."""
    import statistics

    import torch

    steps = PEERS[name][1](job)
    found: Row = {"losses": [loss for _, loss in steps[:NUM_CHECKED]]}
    if job.device == "cpu":
        return found
    ms = statistics.median(ms for ms, _ in steps[NUM_WARMUP:])
    peak = torch.cuda.max_memory_allocated()
    return found | {"ms": ms, "tokens_per_s": 1000 * job.num_tokens / ms, "peak_bytes": peak}


def judged(row: Row, losses: list[float], job: Job) -> Row:
    """A row beside PEFT's losses: who has others gets no speed, and it is a problem where ours fail or differ."""
    if "losses" in row and not are_alike(row["losses"], losses, job):
        row = {key: value for key, value in row.items() if key not in SPEED}
        row["failed"] = f"its losses are not PEFT's, {losses}"
    if row["peer"] != "ours":
        return row
    wrong = row.get("failed") or row.get("absent")
    return row | {"problem": f"our steps: {wrong}"} if wrong else row


def jobs_of(models: list[str], num_tokens: int = 2048) -> list[Job]:
    return [Job(model, num_tokens, "cuda") for model in models]


def run_jobs(
    jobs: list[Job], names: list[str], end: float, add: Callable[[Row], None],
    row_of: Callable[[str, Job, float], Row] = row_of,
) -> None:  # fmt: skip
    """Per model the check's row and then one of each peer, until `end`; after a check that did not pass nothing."""
    for job in jobs:
        checked = row_of(CHECK, job, end - time.monotonic())
        if "failed" in checked or "absent" in checked:
            checked["problem"] = checked.get("failed") or checked["absent"]
        add(checked)
        if "problem" in checked or "not_run" in checked:
            continue
        for name in names:
            add(judged(row_of(name, job, end - time.monotonic()), checked["losses"], job))


def main(argv: list[str] | None = None) -> int:
    sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, help="directory for peers.json")
    parser.add_argument("--model", nargs="*", choices=SHAPES, default=["0.5B", "8B"])
    parser.add_argument("--peer", nargs="*", choices=PEERS, default=list(PEERS))
    parser.add_argument("--tokens", type=int, default=2048, help="in one row, a row a step")
    parser.add_argument("--seconds", type=float, default=460.0, help="whatever is not done by then is not run")
    parser.add_argument("--tiny", action="store_true", help="a toy model on the CPU, without times")
    parser.add_argument("--one", choices=[CHECK, *PEERS], help="only this peer or the check, in this process")
    args = parser.parse_args(argv)
    jobs = [Job("tiny", 64, "cpu")] if args.tiny else jobs_of(args.model, args.tokens)
    if args.one:
        print(json.dumps(check(jobs[0]) if args.one == CHECK else measured(args.one, jobs[0])))
        return 0
    if args.out is None:
        parser.error("--out is needed")
    import torch

    if not args.tiny and not torch.cuda.is_available():
        print("no GPU here: nothing was measured", file=sys.stderr)
        return 2
    from gpu import Report, versions

    report = Report(args.out / "peers.json", {"versions": {} if args.tiny else versions(), "num_timed": NUM_TIMED})
    run_jobs(jobs, args.peer, time.monotonic() + args.seconds, report.add)
    return 1 if report.is_red else 0


if __name__ == "__main__":
    sys.exit(main())
