"""The loss head on a CPU: forward and backward as Hugging Face computes it, over ours, on the same data.

    python kernels/bench/cpu_head.py [--tokens N] [--out FILE]

Qwen2.5-0.5B's head (hidden 896, vocabulary 151,936), 30% of the tokens supervised, float32, one thread, CPU time, the
two interleaved, median. Memory is the growth of a process's peak over a step, each in a process of its own. The
gradients are compared first. The default is 512 tokens, because 2048 take a minute of CPU time; the ratio hardly
depends on it.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

NUM_HIDDEN, NUM_VOCABULARY, SUPERVISED = 896, 151_936, 0.3
NUM_TIMED = 3


def figures(num_tokens: int = 512) -> dict[str, float]:
    """ratio_head and ratio_head_memory (eager over ours), with the seconds and bytes that they come from."""
    import torch

    torch.set_num_threads(1)
    steps = steps_over(num_tokens)
    (loss, gradient), (our_loss, our_gradient) = (steps[name]() for name in ("eager", "ours"))
    error = float((our_gradient - gradient).norm() / gradient.norm())
    if error > 1e-5 or abs(float(our_loss - loss)) > 1e-5 * abs(float(loss)):
        raise RuntimeError(f"not timed: gradients differ by {error:.2g}, losses {float(loss)} and {float(our_loss)}")
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(NUM_TIMED):
        for name, step in steps.items():
            start = time.process_time()
            step()
            seconds[name].append(time.process_time() - start)
    took = {name: statistics.median(values) for name, values in seconds.items()}
    grew = {name: memory_of(name, num_tokens) for name in steps}
    return {
        "ratio_head": took["eager"] / took["ours"],
        "ratio_head_memory": grew["eager"] / grew["ours"],
        "seconds_head_eager": took["eager"],
        "seconds_head": took["ours"],
        "bytes_head_eager": grew["eager"],
        "bytes_head": grew["ours"],
        "error_head_gradient": error,
        "num_head_tokens": num_tokens,
    }


def steps_over(num_tokens: int) -> dict[str, Callable[[], tuple]]:
    """Each step returns its loss and the gradient of the hidden states."""
    import torch
    from cltrain_kernels import linear_loss
    from transformers.loss.loss_utils import ForCausalLMLoss

    rng = torch.Generator().manual_seed(0)
    hidden = torch.randn(num_tokens, NUM_HIDDEN, generator=rng).requires_grad_()
    head = torch.randn(NUM_VOCABULARY, NUM_HIDDEN, generator=rng).div_(NUM_HIDDEN**0.5)  # no copy raises the peak
    ids = torch.randint(NUM_VOCABULARY, (num_tokens,), generator=rng)
    is_supervised = torch.rand(num_tokens, generator=rng) < SUPERVISED
    ids[~is_supervised] = -100
    weights = is_supervised / is_supervised.sum()

    def eager() -> tuple:
        logits = torch.nn.functional.linear(hidden[None], head)
        loss = ForCausalLMLoss(logits, None, NUM_VOCABULARY, shift_labels=ids[None])
        return loss.detach(), torch.autograd.grad(loss, hidden)[0]

    def ours() -> tuple:
        loss = linear_loss(hidden, head, ids, weights).loss
        return loss.detach(), torch.autograd.grad(loss, hidden)[0]

    return {"eager": eager, "ours": ours}


def memory_of(name: str, num_tokens: int) -> float:
    """Bytes by which the peak of a fresh process grows while it takes one step."""
    command = [sys.executable, str(Path(__file__)), "--tokens", str(num_tokens), "--memory", name]
    return float(subprocess.run(command, check=True, capture_output=True, text=True, timeout=900).stdout)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--out", type=Path, help="where to write the figures as JSON")
    parser.add_argument("--memory", choices=("eager", "ours"), help="only take one step and print the bytes it added")
    args = parser.parse_args(argv)
    if args.memory:
        import torch

        torch.set_num_threads(1)
        step = steps_over(args.tokens)[args.memory]
        before = peak_bytes()
        step()
        print(peak_bytes() - before)
        return 0
    found = figures(args.tokens)
    print(json.dumps(found, indent=1))
    if args.out:
        args.out.write_text(json.dumps(found, indent=1) + "\n")
    return 0


def peak_bytes() -> int:
    """Linux's getrusage would count what the parent held when it forked; VmHWM does not."""
    status = Path("/proc/self/status")
    if status.exists():
        (line,) = (line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # bytes on macOS


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent.parent))
    sys.exit(main())
