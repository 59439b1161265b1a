"""CLTRAIN_KERNELS: obeyed for all ops or op by op, or refused, and said once."""

from __future__ import annotations

import logging
import subprocess
import sys

import pytest
import torch
from cltrain_kernels import dispatch, implementation_for

CPU, GPU = torch.device("cpu"), torch.device("cuda")


@pytest.fixture(autouse=True)
def _clean(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.delenv("CLTRAIN_KERNELS", raising=False)
    dispatch._chosen.cache_clear()


def test_dispatch_obeys_or_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    assert implementation_for("rope", CPU) == "reference"
    monkeypatch.setenv("CLTRAIN_KERNELS", "reference")
    assert implementation_for("rope", GPU) == "reference"
    monkeypatch.setenv("CLTRAIN_KERNELS", "triton")
    with pytest.raises(RuntimeError, match=r"triton is not installed|TRITON_INTERPRET"):
        implementation_for("rope", CPU)
    monkeypatch.setenv("CLTRAIN_KERNELS", "fast")
    with pytest.raises(ValueError, match="'fast'"):
        implementation_for("rope", CPU)


@pytest.mark.parametrize(
    "variable", ["linear_loss=reference,auto", "auto, linear_loss=reference", "linear_loss=reference"]
)
def test_one_op_can_be_chosen_alone(variable: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    monkeypatch.setenv("CLTRAIN_KERNELS", variable)
    assert implementation_for("linear_loss", GPU) == "reference"
    assert implementation_for("rope", GPU) == "triton"


@pytest.mark.parametrize(
    ("variable", "said"),
    [
        ("linearloss=reference", "no op 'linearloss'; there are adamw, grams, linear_loss"),
        ("linear_loss=fast", "got 'linear_loss=fast'"),
        ("auto,", "got 'auto,'"),
        ("", "got ''"),
    ],
)
def test_an_op_or_a_word_that_does_not_exist_is_named(
    variable: str, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CLTRAIN_KERNELS", variable)
    with pytest.raises(ValueError, match=said):
        implementation_for("rope", CPU)


def test_each_ops_choice_is_logged_once_with_its_reason(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, logger="cltrain_kernels"):
        for _ in range(3):
            implementation_for("rope", CPU)
            implementation_for("swiglu", CPU)
        monkeypatch.setenv("CLTRAIN_KERNELS", "auto,rope=reference")
        implementation_for("rope", GPU)
    assert [record.getMessage() for record in caplog.records] == [
        "rope on cpu runs by reference: the default for cpu",
        "swiglu on cpu runs by reference: the default for cpu",
        "rope on cuda runs by reference: CLTRAIN_KERNELS=auto,rope=reference",
    ]


def test_the_ops_that_can_be_chosen_are_those_with_a_kernel() -> None:
    from pathlib import Path
    from typing import get_args

    files = Path(dispatch.__file__).parent.glob("*_triton.py")
    assert set(get_args(dispatch.Op)) == {path.name.removesuffix("_triton.py") for path in files}


def test_importing_the_package_imports_no_triton() -> None:
    code = "import cltrain_kernels, sys; assert not any(m.split('.')[0] == 'triton' for m in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
