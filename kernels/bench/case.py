"""What a file in `cases/` hands to `gpu.py`, and the timing of one contender."""

from __future__ import annotations

import functools
import importlib.util
import statistics
import sys
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

CASES = Path(__file__).parent / "cases"
NUM_WARMUP, NUM_TIMED = 5, 20
MIN_COSINE = 0.99  # to the gradient in float64; below it no speed counts


@dataclass(frozen=True)
class Contender:
    """One way to do a case's work; the names of ours begin with "ours". `run` returns its gradient, or None where it
    has none."""

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
    """The cases of every file in `cases/`, each of which has `def cases(quick: bool) -> list[Case]`. A file that cannot
    be imported is a case with a problem."""
    found: list[Case] = []
    for op in case_names() if ops is None else ops:
        try:
            found += load(CASES / f"{op}.py").cases(quick)
        except Exception:  # whatever it is: one broken file must not cost the figures of all others
            found.append(Case(op, {}, functools.partial(str, traceback.format_exc()[-600:]), lambda: ([], {})))
    return found


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
    """The row of one case: a problem and no speed of anybody, or per contender ms, peak bytes and cosine to float64.

    A problem is what `problem` says, any error of ours, and a gradient of ours that points elsewhere. Others that raise
    or point elsewhere are rows of words.
    """
    row: dict[str, Any] = {"op": case.op, **case.facts}
    try:
        return row | (_problem(case) or _contest(case))
    except Exception as error:  # whatever a kernel on a new GPU raises, the other cases' rows are wanted
        where = traceback.extract_tb(error.__traceback__)[-1]
        return row | {"problem": f"{_said(error)} ({Path(where.filename).name}:{where.lineno})"}


def _problem(case: Case) -> dict[str, Any]:
    problem = case.problem()
    return {"problem": problem} if problem else {}


def _contest(case: Case) -> dict[str, Any]:
    contenders, absent = case.contenders()
    truth = case.truth() if case.truth else None
    found: dict[str, Any] = dict(absent)
    for contender in contenders:
        is_ours = contender.name.startswith("ours")
        try:
            gradient = contender.run()
            checked = {} if gradient is None or truth is None else {"cosine": cosine(gradient, truth)}
            del gradient
            if not checked.get("cosine", 1.0) >= MIN_COSINE:  # NaN too
                raise ArithmeticError(f"its gradient has a cosine of {checked['cosine']:.4f} to float64's")
            found[contender.name] = checked | timed(contender.run)
        except Exception as error:  # somebody else's code on a GPU of its own kind
            if is_ours:
                return {"problem": f"{contender.name}: {_said(error)}"}
            found[contender.name] = f"failed: {_said(error)}"
        torch.cuda.empty_cache()
    return found


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error)[:300]}"


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
