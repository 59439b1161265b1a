"""Measure the kernels on a GPU against eager and compiled PyTorch; write every timing as JSON.

    python kernels/bench/gpu.py --out DIR [--quick] [--sweep]

Refuses without a GPU. Each case is first checked against float64; a wrong case is written as wrong, is not timed, and
the exit code is 1.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from cltrain_kernels import token_logprob_reference
from cltrain_kernels.testing import assert_as_accurate_as_eager
from torch import Tensor

Op = Callable[[Tensor, Tensor], Tensor]
SHAPES = [(m, v) for v in (32_000, 128_256, 151_936) for m in (1024, 4096, 8192)]
QUICK_SHAPES = [(1024, 32_000)]
NUM_WARMUP, NUM_TIMED = 5, 30


def eager(logits_MV: Tensor, ids_M: Tensor) -> Tensor:
    return logits_MV.log_softmax(-1).gather(1, ids_M[:, None])[:, 0]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, required=True, help="directory for token_logprob.json")
    parser.add_argument("--quick", action="store_true", help="one small shape")
    parser.add_argument("--sweep", action="store_true", help="also try other block sizes")
    args = parser.parse_args(argv)
    if not torch.cuda.is_available():
        print("no GPU here: nothing was measured", file=sys.stderr)
        return 2
    import cltrain_kernels.token_logprob_triton as fast
    import triton

    rows: list[dict[str, Any]] = []
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for num_rows, num_vocabulary in QUICK_SHAPES if args.quick else SHAPES:
            row: dict[str, Any] = {"dtype": str(dtype), "M": num_rows, "V": num_vocabulary}
            problem = wrong(fast.token_logprob_triton, dtype, num_vocabulary)
            row |= {"problem": problem} if problem else measure(fast, num_rows, num_vocabulary, dtype, args.sweep)
            rows.append(row)
            print(json.dumps({k: v for k, v in row.items() if not k.endswith("_all")}), flush=True)
    args.out.mkdir(parents=True, exist_ok=True)
    versions = {
        "gpu": torch.cuda.get_device_name(),
        "capability": torch.cuda.get_device_capability(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "triton": triton.__version__,
        "python": platform.python_version(),
    }
    report = {"op": "token_logprob", "unit": "ms", "num_timed": NUM_TIMED, "versions": versions, "rows": rows}
    path = args.out / "token_logprob.json"
    path.write_text(json.dumps(report, indent=1) + "\n")
    print(f"wrote {path}")
    return 1 if any("problem" in row for row in rows) else 0


def draw(num_rows: int, num_vocabulary: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    rng = torch.Generator("cuda").manual_seed(0)
    logits = torch.randn(num_rows, num_vocabulary, generator=rng, device="cuda", dtype=torch.float32) * 3
    ids = torch.randint(num_vocabulary, (num_rows,), generator=rng, device="cuda")
    return logits.to(dtype), ids


def wrong(op: Op, dtype: torch.dtype, num_vocabulary: int) -> str | None:
    """What is wrong with `op` at this dtype and vocabulary, on few rows; None when nothing is."""
    for check in (eager, token_logprob_reference):
        try:
            assert_as_accurate_as_eager(op, check, *draw(65, num_vocabulary, dtype))
        except AssertionError as error:
            return str(error)
        if dtype is not torch.float32:
            break  # the reference sums in float32, a tighter rule than eager's own only there
    return None


def measure(fast: Any, num_rows: int, num_vocabulary: int, dtype: torch.dtype, is_sweep: bool) -> dict[str, Any]:
    logits, ids = draw(num_rows, num_vocabulary, dtype)
    row: dict[str, Any] = {}
    for name, op in {"triton": fast.token_logprob_triton, "eager": eager, "compiled": torch.compile(eager)}.items():
        row |= timed(f"{name}_forward", lambda op=op: op(logits.detach(), ids))
        leaf = logits.detach().requires_grad_()
        row |= timed(f"{name}_both", lambda op=op, leaf=leaf: torch.autograd.grad(op(leaf, ids).sum(), leaf))
    if is_sweep:
        default = fast.MAX_BLOCK
        for block in (1024, 2048, 8192, 16384):
            fast.MAX_BLOCK = block
            leaf = logits.detach().requires_grad_()
            row |= timed(
                f"triton_block{block}_both",
                lambda leaf=leaf: torch.autograd.grad(fast.token_logprob_triton(leaf, ids).sum(), leaf),
            )
        fast.MAX_BLOCK = default
    return row


def timed(name: str, run: Callable[[], object]) -> dict[str, Any]:
    """Median and all times in ms by CUDA events, and the peak of memory allocated beyond the inputs, in bytes."""
    for _ in range(NUM_WARMUP):
        run()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    times = []
    for _ in range(NUM_TIMED):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        run()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end))
    peak = torch.cuda.max_memory_allocated() - before
    return {f"{name}_ms": statistics.median(times), f"{name}_peak_bytes": peak, f"{name}_all": times}


if __name__ == "__main__":
    sys.exit(main())
