"""Every kernel compiles for GPUs that are not here, spills nothing, and needs no more than the committed table says."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

SCRIPT = Path(__file__).parent.parent / "kernels/bench/aot.py"
KEY = "some_op/sm_80/kernel(bf16)"
GOOD = {"registers": 100, "stack": 0, "local": 0, "shared": 1000, "tensor": {"HMMA": 8}}


@pytest.fixture(scope="module")
def aot() -> ModuleType:
    spec = importlib.util.spec_from_file_location("bench_aot", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run(cache: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"TRITON_CACHE_DIR": str(cache)}
    command = [sys.executable, str(SCRIPT), *arguments]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=280)


@pytest.mark.skipif(sys.platform != "linux", reason="triton compiles on Linux")
@pytest.mark.parametrize("architecture", [90, *(pytest.param(n, marks=pytest.mark.slow) for n in (80, 100))])
def test_kernels_need_no_more_than_the_table_says(aot: ModuleType, architecture: int, tmp_path: Path) -> None:
    pytest.importorskip("triton")
    done = run(tmp_path, "--architecture", str(architecture))
    assert done.returncode == 0, done.stdout + done.stderr
    for op in aot.ops():
        assert f"{op}/sm_{architecture}/" in done.stdout


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"registers": 256}, "256 registers of 255"),
        ({"stack": 8}, "spills"),
        ({"local": 1}, "spills"),
        ({"shared": 164 << 10}, "shared memory"),
    ],
)
def test_limits_of_the_architecture_are_kept(aot: ModuleType, change: dict[str, object], said: str) -> None:
    assert aot.broken_limits(KEY, GOOD) == []
    (problem,) = aot.broken_limits(KEY, GOOD | change)
    assert said in problem


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"registers": 101}, "registers 100 -> 101"),
        ({"shared": 1001}, "shared 1000 -> 1001"),
        ({"tensor": {"FMUL": 8}}, "HMMA is gone"),
    ],
)
def test_regressions_against_the_table_are_named(aot: ModuleType, change: dict[str, object], said: str) -> None:
    assert aot.regressions({KEY: GOOD | {"registers": 99}}, {KEY: GOOD}) == []
    (problem,) = aot.regressions({KEY: GOOD | change}, {KEY: GOOD})
    assert said in problem


def test_kernels_without_a_row_and_rows_without_a_kernel_are_named(aot: ModuleType) -> None:
    assert "not in the table" in aot.regressions({KEY: GOOD}, {})[0]
    assert "no longer compiled" in aot.regressions({}, {KEY: GOOD})[0]
