"""What a file in `cases/` hands to `gpu.py`, and the timing of one contender."""

from __future__ import annotations

import importlib.util
import statistics
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

CASES = Path(__file__).parent / "cases"
NUM_WARMUP, NUM_TIMED = 5, 20


@dataclass(frozen=True)
class Contender:
    """One way to do a case's work, ours among them. `run` returns its gradient, or None where it has none."""

    name: str
    run: Callable[[], Tensor | None]


@dataclass(frozen=True)
class Case:
    """One op at one size and dtype. Nothing is allocated until it is `problem`'s or `contenders`' turn.

    `problem` says what is wrong with our op against float64, None if nothing is. `contenders` come with those that
    cannot take part and why. `truth` is the gradient in float64 that every contender's is compared with.
    """

    op: str
    facts: Mapping[str, Any]
    problem: Callable[[], str | None]
    contenders: Callable[[], tuple[list[Contender], dict[str, str]]]
    truth: Callable[[], Tensor] | None = None


def load_cases(quick: bool, ops: list[str] | None = None) -> list[Case]:
    """The cases of every file in `cases/`, each of which has `def cases(quick: bool) -> list[Case]`."""
    return [case for op in (ops or case_names()) for case in load(CASES / f"{op}.py").cases(quick)]


def case_names() -> list[str]:
    return sorted(path.stem for path in CASES.glob("*.py"))


def load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"bench_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def installed(name: str) -> str | None:
    """Why the package `name` cannot be compared with; None if it can be imported."""
    try:
        importlib.import_module(name)
    except ImportError as error:
        return f"absent: {error}"
    except Exception as error:  # a peer may break in any way on another version of what it patches
        return f"absent: importing it fails: {type(error).__name__}: {error}"
    return None


def measured(case: Case) -> dict[str, Any]:
    """The row of one case: a problem, or per contender ms, peak bytes and cosine to float64; a contender that raises is
    reported with its error."""
    row: dict[str, Any] = {"op": case.op, **case.facts}
    problem = case.problem()
    if problem:
        return row | {"problem": problem}
    contenders, absent = case.contenders()
    truth = case.truth() if case.truth else None
    row |= absent
    for contender in contenders:
        try:
            gradient = contender.run()
            found = {} if gradient is None or truth is None else {"cosine": cosine(gradient, truth)}
            del gradient
            row[contender.name] = found | timed(contender.run)
        except Exception as error:  # somebody else's code on a GPU of its own kind
            row[contender.name] = f"failed: {type(error).__name__}: {str(error)[:300]}"
        torch.cuda.empty_cache()
    return row


def cosine(one: Tensor, other: Tensor) -> float:
    one, other = one.double().flatten(), other.double().flatten()
    return float(one @ other / (one.norm() * other.norm()))


def timed(run: Callable[[], object]) -> dict[str, Any]:
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
    return {"ms": statistics.median(times), "peak_bytes": peak, "all_ms": times}
