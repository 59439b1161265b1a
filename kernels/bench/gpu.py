"""Measure every kernel on a GPU against eager and compiled PyTorch and against peers that are installed.

    python kernels/bench/gpu.py --out DIR [--quick] [--op OP ...] [--seconds 420]

Runs the cases of `cases/*.py` without network, on random data. Refuses without a GPU. Each case is first checked
against float64; a wrong one is written as wrong, is not timed, and the exit code is 1. A peer that is not installed is
reported as absent. What does not fit into --seconds is reported as not run.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

PACKAGES = ("torch", "triton", "transformers", "peft", "trl", "liger-kernel", "cut-cross-entropy", "unsloth")


def main(argv: list[str] | None = None) -> int:
    sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]
    import case as registry

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, required=True, help="directory for gpu.json")
    parser.add_argument("--quick", action="store_true", help="one small size per op")
    parser.add_argument("--op", nargs="*", choices=registry.case_names(), help="only these ops")
    parser.add_argument("--seconds", type=float, default=420.0, help="start no further case after this time")
    args = parser.parse_args(argv)
    import torch

    if not torch.cuda.is_available():
        print("no GPU here: nothing was measured", file=sys.stderr)
        return 2
    start, rows = time.monotonic(), []
    for case in registry.load_cases(args.quick, args.op):
        if time.monotonic() - start > args.seconds:
            row: dict[str, Any] = {"op": case.op, **case.facts, "not_run": f"{args.seconds:.0f} s were over"}
        else:
            row = registry.measured(case)
        rows.append(row)
        print(json.dumps(short(row)), flush=True)
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / "gpu.json"
    path.write_text(
        json.dumps({"versions": versions(), "num_timed": registry.NUM_TIMED, "rows": rows}, indent=1) + "\n"
    )
    print(f"wrote {path}")
    return 1 if any("problem" in row for row in rows) else 0


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
