"""scripts/bench kernels runs, compares gradients before it times anything, and says which promises hold."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from scripts import bench_kernels


def test_a_step_is_compared_and_timed_on_tiny_shapes() -> None:
    bench: Any = bench_kernels.load("step")
    compared, timed = bench.compare_gradients(bench.TINY), bench.time_steps(bench.TINY)
    assert compared["gradient_cosine"] > 0.999999
    assert compared["gradient_max_relative_error"] < 1e-5
    assert timed["ratio_step"] == pytest.approx(timed["seconds_step_peft"] / timed["seconds_step_ours"], rel=0.05)


def test_only_answers_are_supervised_in_what_is_timed() -> None:
    bench: Any = bench_kernels.load("step")
    (batch,) = bench.make_batches(bench.Shape(), 1)
    is_supervised = batch["labels"] >= 0
    assert float(is_supervised.float().mean()) == pytest.approx(0.3, abs=0.02)
    assert bool((batch["labels"] == batch["input_ids"])[is_supervised].all())


def test_a_broken_promise_is_named_and_one_that_was_not_measured_is_broken() -> None:
    good = {"ratio_step": 1.2, "ratio_memory": 1.7, "ratio_head": 3.0, "ratio_gram": 20.0, "seconds_fixed": 0.1}
    assert [holds for _, holds in bench_kernels.judge(good, must_have_all=True)] == [True] * 5
    for name, worse in {"ratio_step": 1.19, "seconds_fixed": 0.11}.items():
        (broken,) = [line for line, holds in bench_kernels.judge(good | {name: worse}, must_have_all=True) if not holds]
        assert broken.startswith(f"BROKEN {name}")
    assert bench_kernels.judge({}, must_have_all=False) == []
    assert [holds for _, holds in bench_kernels.judge({}, must_have_all=True)] == [False] * 5


@pytest.mark.slow
def test_the_command_writes_all_figures_of_a_step(tmp_path: Path) -> None:
    assert bench_kernels.main(["--device", "cpu", "--only", "step", "--tiny", "--json", str(tmp_path / "f.json")]) == 0
    figures = json.loads((tmp_path / "f.json").read_text())
    assert {"ratio_step", "ratio_memory", "gradient_cosine", "step_shape"} <= figures.keys()


def test_a_whole_update_is_compared_before_it_is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    bench: Any = bench_kernels.load("update")
    found = bench.figures(tiny=True)
    assert found["ratio_update"] == pytest.approx(found["seconds_update_peft"] / found["seconds_update"], rel=0.05)
    assert found["update_max_relative_error"] < 1e-4
    update = bench.update

    def other_rows(base: Any, rows: Any, anchors: Any, kernels: str, path: Path) -> Any:
        return update(base, rows[2 if kernels == "off" else 0 :], anchors, kernels, path)

    monkeypatch.setattr(bench, "update", other_rows)
    with pytest.raises(RuntimeError, match="not timed"):
        bench.figures(tiny=True)
