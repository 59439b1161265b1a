"""What of the GPU benchmark holds without a GPU: its registry, its refusals, and how it reports what is missing."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

REPO = Path(__file__).parent.parent
BENCH = REPO / "kernels/bench"


@pytest.fixture(scope="module")
def registry() -> Iterator[ModuleType]:
    sys.path.insert(0, str(BENCH))
    try:
        import case

        yield case
    finally:
        sys.path.remove(str(BENCH))
        sys.modules.pop("case", None)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU to measure")
def test_without_a_gpu_nothing_is_measured_or_written(tmp_path: Path) -> None:
    command = [sys.executable, str(BENCH / "gpu.py"), "--out", str(tmp_path / "out"), "--quick"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert "no GPU here: nothing was measured" in done.stderr
    assert not (tmp_path / "out").exists()


def test_every_kernel_has_cases_that_need_no_gpu_to_be_listed(registry: ModuleType) -> None:
    kernels = {path.name.removesuffix("_triton.py") for path in (REPO / "kernels/cltrain_kernels").glob("*_triton.py")}
    assert kernels <= set(registry.case_names())
    for quick in (True, False):
        cases = registry.load_cases(quick)
        assert {case.op for case in cases} == set(registry.case_names())
        names = [json.dumps({"op": case.op, **case.facts}, sort_keys=True) for case in cases]
        assert len(set(names)) == len(names), "two cases cannot be told apart"


def test_a_wrong_case_is_reported_and_not_timed(registry: ModuleType) -> None:
    def never() -> None:
        raise AssertionError("a wrong op was timed")

    case = registry.Case("op", {"M": 3}, lambda: "gradient: error 1", never)
    assert registry.measured(case) == {"op": "op", "M": 3, "problem": "gradient: error 1"}


def test_an_absent_peer_and_one_that_fails_are_rows_and_no_guesses(registry: ModuleType) -> None:
    def breaks() -> None:
        raise RuntimeError("another version")

    reason = registry.installed("no_such_peer")
    case = registry.Case(
        "op", {}, lambda: None, lambda: ([registry.Contender("peer", breaks)], {"no_such_peer": reason})
    )
    row = registry.measured(case)
    assert row["no_such_peer"].startswith("absent: No module named 'no_such_peer'")
    assert row["peer"] == "failed: RuntimeError: another version"
    assert registry.installed("json") is None


def test_cosine_sees_a_gradient_that_points_elsewhere(registry: ModuleType) -> None:
    one = torch.tensor([1.0, 2.0, 2.0])
    assert registry.cosine(one, 7 * one) == pytest.approx(1.0)
    assert registry.cosine(one, torch.tensor([2.0, -1.0, 0.0])) == pytest.approx(0.0)
