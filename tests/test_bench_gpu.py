"""What of the GPU benchmark holds without a GPU: its registry, its refusals, and how it reports what is missing."""

from __future__ import annotations

import importlib.util
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
@pytest.mark.parametrize("script", ["gpu.py", "peers.py"])
def test_without_a_gpu_nothing_is_measured_or_written(tmp_path: Path, script: str) -> None:
    command = [sys.executable, str(BENCH / script), "--out", str(tmp_path / "out")]
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


@pytest.mark.slow
def test_peers_that_are_here_see_the_same_losses_and_the_others_are_absent(tmp_path: Path) -> None:
    peers = ["ours", "peft_trainer", "peft_trainer_bf16_adapters", "liger", "trl", "unsloth"]  # compiling takes minutes
    command = [sys.executable, str(BENCH / "peers.py"), "--tiny", "--out", str(tmp_path), "--peer", *peers]
    subprocess.run(command, check=True, capture_output=True, text=True, timeout=280)
    rows = {row["peer"]: row for row in json.loads((tmp_path / "peers.json").read_text())["rows"]}
    plain = rows["peft_trainer"]["losses"]
    assert len(plain) == 3
    assert "ms" not in rows["peft_trainer"], "a CPU says nothing about a GPU's speed"
    for name, row in rows.items():
        package = {"liger": "liger_kernel", "trl": "trl", "unsloth": "unsloth"}.get(name.split("_")[0])
        if package and importlib.util.find_spec(package) is None:
            assert row["absent"] == f"{package} is not installed"
        elif "losses" in row:
            assert row["losses"] == pytest.approx(plain, rel=1e-4), name
    assert "losses" in rows["peft_trainer_bf16_adapters"]
