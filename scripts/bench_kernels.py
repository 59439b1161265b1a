"""Training ops on one CPU thread against PEFT, the Trainer and plain PyTorch: time, memory, and equal gradients."""

from __future__ import annotations

import argparse
import importlib
import inspect
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

ROOT = Path(__file__).parent.parent
BENCHES = ROOT / "kernels/bench"
PROMISES = {  # figure -> (at least or at most, limit)
    "ratio_step": (">=", 1.2),
    "ratio_memory": (">=", 1.7),
    "ratio_head": (">=", 3.0),
    "ratio_gram": (">=", 20.0),
    "seconds_fixed": ("<=", 0.1),
}


def main(argv: list[str] | None = None) -> int:
    """Run every kernels/bench/cpu_*.py, print its figures and the promises; 1 if a promise is broken or unmeasured."""
    names = [path.stem.removeprefix("cpu_") for path in sorted(BENCHES.glob("cpu_*.py"))]
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--device", choices=("cpu",), default="cpu", help="a GPU: python kernels/bench/gpu.py --out DIR"
    )
    parser.add_argument("--json", type=Path, help="write all figures here, as one object")
    parser.add_argument("--only", nargs="+", choices=names, default=names, help="some benchmarks; judges only these")
    parser.add_argument("--tiny", action="store_true", help="shapes that only show that it runs; judges nothing")
    args = parser.parse_args(argv)
    sys.path.insert(0, str(ROOT / "kernels"))
    figures: dict[str, Any] = {}
    for name in args.only:
        measure = load(name).figures
        if args.tiny and "tiny" not in inspect.signature(measure).parameters:
            print(f"{name}: has no tiny shapes, not run")
            continue
        found = measure(tiny=True) if args.tiny else measure()
        figures |= found
        for key, value in found.items():
            print(f"{key:30} {value}", flush=True)
    if args.json:
        args.json.write_text(json.dumps(figures, indent=1) + "\n")
    if args.tiny:
        return 0
    verdicts = judge(figures, must_have_all=args.only == names)
    for line, _ in verdicts:
        print(line)
    return 0 if all(holds for _, holds in verdicts) else 1


def judge(figures: dict[str, Any], must_have_all: bool) -> list[tuple[str, bool]]:
    """One line for each promise, and whether it holds; one that was not measured is broken where all should be."""
    verdicts = []
    for name, (sense, limit) in PROMISES.items():
        if name in figures:
            holds = figures[name] >= limit if sense == ">=" else figures[name] <= limit
            verdicts.append((f"{'holds ' if holds else 'BROKEN'} {name} {sense} {limit}: {figures[name]}", holds))
        elif must_have_all:
            verdicts.append((f"BROKEN {name} {sense} {limit}: not measured", False))
    return verdicts


def load(name: str) -> ModuleType:
    """The module kernels/bench/cpu_`name`.py, which is in no package."""
    if str(BENCHES) not in sys.path:
        sys.path.insert(0, str(BENCHES))
    return importlib.import_module(f"cpu_{name}")


if __name__ == "__main__":
    sys.exit(main())
