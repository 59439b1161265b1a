"""What of the GPU benchmark holds without a GPU: its registry, its refusals, and how it reports what is missing."""

from __future__ import annotations

import importlib
import importlib.util
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

REPO = Path(__file__).parent.parent
BENCH = REPO / "kernels/bench"


@pytest.fixture(scope="module")
def modules() -> Iterator[dict[str, Any]]:
    sys.path.insert(0, str(BENCH))
    names = ("case", "gpu", "peers", "steps")
    try:
        yield {name: importlib.import_module(name) for name in names}
    finally:
        sys.path.remove(str(BENCH))
        for name in names:
            sys.modules.pop(name, None)


@pytest.fixture(scope="module")
def registry(modules: dict[str, Any]) -> Any:
    return modules["case"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU to measure")
@pytest.mark.parametrize("script", ["gpu.py", "peers.py"])
def test_without_a_gpu_nothing_is_measured_or_written(tmp_path: Path, script: str) -> None:
    command = [sys.executable, str(BENCH / script), "--out", str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert "no GPU here: nothing was measured" in done.stderr
    assert not (tmp_path / "out").exists()


def test_every_kernel_has_cases_that_need_no_gpu_to_be_listed(registry: Any) -> None:
    kernels = {path.name.removesuffix("_triton.py") for path in (REPO / "kernels/cltrain_kernels").glob("*_triton.py")}
    assert kernels <= set(registry.case_names())
    for quick in (True, False):
        cases = registry.load_cases(quick)
        assert {case.op for case in cases} == set(registry.case_names())
        names = [json.dumps({"op": case.op, **case.facts}, sort_keys=True) for case in cases]
        assert len(set(names)) == len(names), "two cases cannot be told apart"


def never() -> Any:
    raise AssertionError("a wrong op was timed")


def test_a_wrong_case_is_reported_and_not_timed(registry: Any) -> None:
    case = registry.Case("op", {"M": 3}, lambda: "gradient: error 1", never)
    assert registry.measured(case) == {"op": "op", "M": 3, "problem": "gradient: error 1"}


def test_an_absent_peer_and_one_that_fails_are_rows_and_no_guesses(registry: Any) -> None:
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


def broken() -> Any:
    raise RuntimeError("CUDA error: an illegal memory access")


@pytest.mark.parametrize("broken_part", ["problem", "contenders", "truth", "ours"])
def test_a_case_that_raises_anywhere_is_red_and_has_no_speed(registry: Any, broken_part: str) -> None:
    ours, eager = registry.Contender("ours", broken), registry.Contender("eager", never)
    parts = {"problem": lambda: None, "contenders": lambda: ([ours, eager], {}), "truth": lambda: torch.ones(2)}
    if broken_part != "ours":
        parts[broken_part] = broken
    row = registry.measured(registry.Case("op", {"M": 3}, **parts))
    assert row.keys() == {"op", "M", "problem"}
    assert "RuntimeError: CUDA error: an illegal memory access" in row["problem"]


def test_a_gradient_that_points_elsewhere_is_not_timed(registry: Any) -> None:
    def row(name: str) -> dict[str, Any]:
        contender = registry.Contender(name, lambda: torch.tensor([1.0, 1.0]))
        truth = torch.tensor([1.0, 0.0])
        return dict(registry.measured(registry.Case("op", {}, lambda: None, lambda: ([contender], {}), lambda: truth)))

    assert row("peer")["peer"] == "failed: ArithmeticError: its gradient has a cosine of 0.7071 to float64's"
    assert "ours_fixed: ArithmeticError" in row("ours_fixed")["problem"]


def test_what_was_measured_is_on_disk_after_each_case_and_red_ones_too(modules: dict[str, Any], tmp_path: Path) -> None:
    registry, gpu = modules["case"], modules["gpu"]
    report = gpu.Report(tmp_path / "out/gpu.json", {"num_timed": 20})
    good = registry.Case("good", {}, lambda: None, lambda: ([], {}))

    def seen() -> None:
        rows = json.loads(report.path.read_text())["rows"]
        assert [row["op"] for row in rows] == ["good", "bad"]
        raise KeyboardInterrupt

    cases = [good, registry.Case("bad", {}, broken, never), registry.Case("interrupted", {}, seen, never)]
    with pytest.raises(KeyboardInterrupt):
        gpu.run_cases(cases, registry.measured, time.monotonic() + 60, report.add)
    assert report.is_red
    gpu.run_cases([good], registry.measured, time.monotonic() - 1, report.add)
    assert json.loads(report.path.read_text())["rows"][-1] == {"op": "good", "not_run": "the time was over"}


def test_a_file_of_cases_that_cannot_be_imported_is_red(registry: Any) -> None:
    (case,) = registry.load_cases(False, ["no_such_file"])
    assert "FileNotFoundError" in registry.measured(case)["problem"]


def test_cosine_sees_a_gradient_that_points_elsewhere(registry: Any) -> None:
    one = torch.tensor([1.0, 2.0, 2.0])
    assert registry.cosine(one, 7 * one) == pytest.approx(1.0)
    assert registry.cosine(one, torch.tensor([2.0, -1.0, 0.0])) == pytest.approx(0.0)


def test_our_step_is_pefts_and_another_one_is_a_problem(modules: dict[str, Any]) -> None:
    steps = modules["steps"]
    job = steps.Job("tiny", 64, "cpu")
    row = steps.check(job)
    assert "problem" not in row
    assert row["cosine"] > 0.99999
    assert row["our_losses"] == pytest.approx(row["losses"], rel=1e-4)

    def unscaled(job: Any, model: Any) -> Any:
        loss_of = steps.our_loss(job, model)
        return lambda batch: 2 * loss_of(batch)

    def of_other_tokens(job: Any, model: Any) -> Any:
        loss_of = steps.our_loss(job, model)
        return lambda batch: loss_of({**batch, "labels": batch["labels"].roll(7)})

    assert steps.check(job, unscaled)["problem"] == "our losses are not PEFT's"
    assert "cosine" in steps.check(job, of_other_tokens)["problem"]


@pytest.mark.parametrize(
    ("checked", "ours", "peer", "problems", "fast"),
    [
        ({}, {}, {}, [], ["ours", "peer"]),
        ({}, {}, {"losses": [3.0, 2.0, 1.5]}, [], ["ours"]),
        ({}, {"losses": [3.0, 2.0, 1.5]}, {}, ["ours"], ["peer"]),
        ({}, {"losses": [3.0, 2.0, float("nan")]}, {}, ["ours"], ["peer"]),
        ({}, {"losses": [3.0, 2.0]}, {}, ["ours"], ["peer"]),
        ({}, {"failed": "no kernel image", "losses": None}, {}, ["ours"], ["peer"]),
        ({}, {"absent": "not installed", "losses": None}, {"failed": "other version", "losses": None}, ["ours"], []),
        ({"problem": "cosine of 0.5"}, None, None, ["check"], []),
        ({"failed": "out of memory", "losses": None}, None, None, ["check"], []),
        ({"not_run": "the time was over", "losses": None}, None, None, [], []),
    ],
)
def test_only_a_step_with_pefts_losses_has_a_speed(
    modules: dict[str, Any], checked: Any, ours: Any, peer: Any, problems: list[str], fast: list[str]
) -> None:
    peers, steps = modules["peers"], modules["steps"]
    given = {"check": checked, "ours": {"ms": 1.0, **(ours or {})}, "peer": {"ms": 2.0, **(peer or {})}}
    rows: list[dict[str, Any]] = []

    def row_of(name: str, job: Any, seconds: float) -> dict[str, Any]:
        assert 0 < seconds <= 60
        assert name == "check" or ours is not None, "a red check was followed by a peer"
        row = {"peer": name, "losses": [3.0, 2.0, 1.0], **given[name]}
        if row["losses"] is None:
            del row["losses"]
            row.pop("ms", None)
        return row

    job = steps.Job("tiny", 64, "cpu")
    peers.run_jobs([job], ["ours", "peer"], time.monotonic() + 60, rows.append, row_of)
    assert [row["peer"] for row in rows if "problem" in row] == problems
    assert [row["peer"] for row in rows if "ms" in row] == fast


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
    assert rows["check"]["cosine"] > 0.99999


@pytest.mark.parametrize("is_tree", [False, True])
def test_every_way_to_attend_is_compared_with_float64(
    registry: Any, monkeypatch: pytest.MonkeyPatch, is_tree: bool
) -> None:
    case = registry.load(registry.CASES / "attention.py")
    monkeypatch.setattr(case, "DEVICE", torch.device("cpu"))
    packed = case.draw(is_tree)
    assert packed.is_tree == is_tree
    assert packed.num_used == 4096
    assert packed.num_flat == (27136 if is_tree else 4096)
    assert case.problem("0.5B", is_tree) is None
    everything = case.attending._attend_run
    monkeypatch.setattr(case.attending, "_attend_run", lambda q, k, *others: everything(q, -k, *others))
    said = case.problem("0.5B", is_tree)
    assert said is not None
    assert said.startswith("chains: its gradients have a cosine of")
