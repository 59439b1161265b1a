"""Measure every kernel on a GPU against eager and compiled PyTorch and against peers that are installed.

    python kernels/bench/gpu.py --out DIR [--quick] [--op OP ...] [--seconds 460]

Runs the cases of `cases/*.py` without network, on random data, and with what is left of --seconds whole training steps
(`peers.py`). Refuses without a GPU. Each case is first checked against float64; one that is wrong, or raises, is
written with what was wrong and without any speed, and the exit code is 1. A peer that is not installed is reported as
absent. What does not fit into --seconds is reported as not run. The report is written anew after each case.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

PACKAGES = ("torch", "triton", "transformers", "peft", "trl", "liger-kernel", "cut-cross-entropy", "unsloth")
STEPS = "steps"  # the name of `peers.py` among the ops
FOR_STEPS = 1 / 3  # of the time, kept for it; a case that has begun is not stopped

Row = dict[str, Any]


def main(argv: list[str] | None = None) -> int:
    sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]
    import case as registry
    import peers

    names = [*registry.case_names(), STEPS]
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, required=True, help="directory for gpu.json")
    parser.add_argument("--quick", action="store_true", help="one small size per op")
    parser.add_argument("--op", nargs="*", choices=names, default=names, help="only these ops")
    parser.add_argument("--seconds", type=float, default=460.0, help="start nothing after this time")
    args = parser.parse_args(argv)
    import torch

    if not torch.cuda.is_available():
        print("no GPU here: nothing was measured", file=sys.stderr)
        return 2
    end, has_steps = time.monotonic() + args.seconds, STEPS in args.op
    report = Report(args.out / "gpu.json", {"versions": versions(), "num_timed": registry.NUM_TIMED})
    cases = registry.load_cases(args.quick, [op for op in args.op if op != STEPS])
    run_cases(cases, registry.measured, end - FOR_STEPS * args.seconds * has_steps, report.add)
    if has_steps:
        torch.cuda.empty_cache()  # the steps run in processes of their own
        peers.run_jobs(peers.jobs_of(["0.5B"] if args.quick else ["0.5B", "8B"]), list(peers.PEERS), end, report.add)
    print(f"wrote {report.path}")
    return 1 if report.is_red else 0


class Report:
    """Rows that are on disk as soon as they are known."""

    def __init__(self, path: Path, facts: Row) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path, self.facts, self.rows = path, facts, list[Row]()

    def add(self, row: Row) -> None:
        self.rows.append(row)
        self.path.write_text(json.dumps({**self.facts, "rows": self.rows}, indent=1) + "\n")
        print(json.dumps(short(row)), flush=True)

    @property
    def is_red(self) -> bool:
        return any("problem" in row for row in self.rows)


def run_cases(cases: list[Any], measure: Callable[[Any], Row], end: float, add: Callable[[Row], None]) -> None:
    """The rows of the cases one by one; of those that would begin after `end`, that they did not run."""
    for case in cases:
        is_over = time.monotonic() > end
        add({"op": case.op, **case.facts, "not_run": "the time was over"} if is_over else measure(case))


def short(row: dict[str, Any]) -> dict[str, Any]:
    """A row without every single time."""
    return {
        key: {k: v for k, v in value.items() if k != "all_ms"} if isinstance(value, dict) else value
        for key, value in row.items()
    }


def versions() -> dict[str, Any]:
    import torch

    found: dict[str, Any] = {"python": platform.python_version(), "cuda": torch.version.cuda}
    found |= {"gpu": torch.cuda.get_device_name(), "capability": torch.cuda.get_device_capability()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    return found


if __name__ == "__main__":
    sys.exit(main())
