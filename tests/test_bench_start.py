"""Every benchmark starts as a user starts it."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

REPO = Path(__file__).parent.parent
NAMES = sorted(path.stem.removeprefix("bench_") for path in (REPO / "scripts").glob("bench_*.py"))


@pytest.mark.parametrize("name", NAMES)
def test_a_benchmark_says_what_it_takes(name: str) -> None:
    command = [str(REPO / "scripts" / "bench"), name, "--help"]
    done = subprocess.run(command, cwd="/", capture_output=True, text=True, timeout=120)
    assert (done.returncode, "usage: " in done.stdout) == (0, True), done.stderr
