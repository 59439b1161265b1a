"""kernels/bench/cpu_optim.py: it runs, it checks what it times, and its token ratios are those of its log."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

SCRIPT = Path(__file__).parent.parent / "kernels/bench/cpu_optim.py"


@pytest.fixture(scope="module")
def bench() -> ModuleType:
    spec = importlib.util.spec_from_file_location("bench_cpu_optim", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_tree_ratio_counts_every_common_beginning_once(bench: ModuleType) -> None:
    num_flat = num_tree = 0
    for episode in bench.agent_log(6):
        rows = sorted(row.ids for row in episode)  # neighbours share the longest beginnings
        num_flat += sum(map(len, rows))
        for before, row in zip([(), *rows[:-1]], rows, strict=True):
            num_equal = next((i for i, (a, b) in enumerate(zip(before, row, strict=False)) if a != b), len(before))
            num_tree += len(row) - num_equal
    assert bench.packing_figures(6)["ratio_tree"] == pytest.approx(num_flat / num_tree, rel=1e-12)


@pytest.mark.slow
def test_every_figure_is_there(bench: ModuleType) -> None:
    figures = bench.figures(tiny=True)
    promised = {"ratio_gram", "ratio_adam", "ratio_packing", "ratio_tree", "seconds_fixed", "seconds_fixed_peft"}
    assert promised <= figures.keys()
    assert all(value > 0 for value in figures.values())
    assert figures["seconds_fixed"] < figures["seconds_fixed_peft"]
