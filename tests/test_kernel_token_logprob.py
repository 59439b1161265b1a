"""token_logprob against float64 PyTorch: in the Triton interpreter without a GPU, for real on one."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from cltrain_kernels import token_logprob, token_logprob_reference
from cltrain_kernels.testing import assert_as_accurate_as_eager, guarded, nan_filled
from torch import Tensor

HAS_GPU = torch.cuda.is_available()
DEVICE = "cuda" if HAS_GPU else "cpu"
DTYPES = [torch.float32, torch.float16, *([torch.bfloat16] if HAS_GPU else [])]  # the interpreter's bf16 is wrong
SIZES = [(1, 1), (1, 17), (17, 33), (33, 65), (65, 1), (3, 4097)]

Op = Callable[[Tensor, Tensor], Tensor]


@pytest.fixture(scope="module")
def kernel() -> Iterator[Op]:
    pytest.importorskip("triton")
    from cltrain_kernels.token_logprob_triton import token_logprob_triton  # interpreted on a CPU: see conftest.py

    with nan_filled():
        yield token_logprob_triton


def eager(logits_MV: Tensor, ids_M: Tensor) -> Tensor:
    return logits_MV.log_softmax(-1).gather(1, ids_M[:, None].long())[:, 0]


def draw(num_rows: int, num_vocabulary: int, dtype: torch.dtype, seed: int = 0) -> tuple[Tensor, Tensor]:
    rng = torch.Generator().manual_seed(seed)
    logits = torch.randn(num_rows, num_vocabulary, generator=rng) * 4
    ids = torch.randint(num_vocabulary, (num_rows,), generator=rng)
    return logits.to(DEVICE, dtype), ids.to(DEVICE)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("num_rows", "num_vocabulary"), SIZES)
def test_kernel_is_as_accurate_as_eager(kernel: Op, num_rows: int, num_vocabulary: int, dtype: torch.dtype) -> None:
    assert_as_accurate_as_eager(kernel, eager, *draw(num_rows, num_vocabulary, dtype))


@pytest.mark.parametrize(("num_rows", "num_vocabulary"), SIZES)
def test_nothing_is_written_outside_of_the_outputs(kernel: Op, num_rows: int, num_vocabulary: int) -> None:
    with guarded():
        assert_as_accurate_as_eager(kernel, eager, *draw(num_rows, num_vocabulary, torch.float32))


@pytest.mark.parametrize("dtype", DTYPES)
def test_reference_is_as_accurate_as_eager(dtype: torch.dtype) -> None:
    assert_as_accurate_as_eager(token_logprob_reference, eager, *draw(33, 65, dtype))


def test_strided_views_give_the_same_answer_and_gradient(kernel: Op) -> None:
    logits, ids = draw(17, 66, torch.float32)
    wide_ids = ids.repeat_interleave(2)[::2]
    assert wide_ids.stride(0) == 2
    for view in (logits[:, 1:], logits[::2], logits.t().contiguous().t(), logits[:, ::2]):
        rows = view.shape[0]
        assert_as_accurate_as_eager(kernel, eager, view, wide_ids[:rows].clamp(max=view.shape[1] - 1))


def test_expanded_upstream_gradient_is_read_with_its_stride(kernel: Op) -> None:
    logits, ids = draw(17, 33, torch.float32)
    ours, theirs = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    kernel(ours, ids).sum().backward()  # the upstream gradient is one number with stride 0
    eager(theirs, ids).sum().backward()
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("which", ["kernel", "reference"])
def test_ignored_rows_have_no_value_and_no_gradient(kernel: Op, which: str) -> None:
    op = kernel if which == "kernel" else token_logprob_reference
    logits, ids = draw(5, 33, torch.float32)
    ids[1], ids[3] = -100, -1
    logits.requires_grad_()
    value = op(logits, ids)
    value.sum().backward()
    assert value[[1, 3]].tolist() == [0.0, 0.0]
    assert logits.grad is not None
    assert not logits.grad[[1, 3]].any()
    assert logits.grad[[0, 2, 4]].any(1).all()


@pytest.mark.parametrize("which", ["kernel", "reference"])
def test_id_beyond_the_vocabulary_is_nan_and_not_a_neighbours_number(kernel: Op, which: str) -> None:
    op = kernel if which == "kernel" else token_logprob_reference
    logits, ids = draw(3, 17, torch.float32)
    ids[1] = 17
    assert op(logits, ids).isnan().tolist() == [False, True, False]


@pytest.mark.parametrize("which", ["kernel", "reference"])
def test_zero_rows_pass_through(kernel: Op, which: str) -> None:
    op = kernel if which == "kernel" else token_logprob_reference
    logits = torch.zeros(0, 33, device=DEVICE, requires_grad=True)
    value = op(logits, torch.zeros(0, dtype=torch.int64, device=DEVICE))
    value.sum().backward()
    assert value.shape == (0,)
    assert logits.grad is not None
    assert logits.grad.shape == (0, 33)


def test_forbidden_vocabulary_and_huge_logits_stay_finite(kernel: Op) -> None:
    logits, ids = draw(4, 8200, torch.float32)
    logits[:, :4100] = -torch.inf  # the whole first block
    logits[2] += 3e4
    ids = ids % 4100 + 4100
    ours, truth = logits.clone().requires_grad_(), logits.double().requires_grad_()
    value, expected = kernel(ours, ids), eager(truth, ids)
    value.sum().backward()
    expected.sum().backward()
    torch.testing.assert_close(value.double(), expected, rtol=1e-5, atol=1e-3)
    assert ours.grad is not None
    assert truth.grad is not None
    torch.testing.assert_close(ours.grad.double(), truth.grad, rtol=1e-3, atol=1e-5)


def test_sums_are_rescaled_when_a_later_block_raises_the_maximum(kernel: Op) -> None:
    logits, ids = draw(3, 9000, torch.float32)
    logits += torch.linspace(0, 20, 9000, device=DEVICE)  # three blocks, each above the one before
    assert_as_accurate_as_eager(kernel, eager, logits.flip(0), ids)
    assert_as_accurate_as_eager(kernel, eager, logits / 20, ids)


def test_callers_logits_are_never_written(kernel: Op) -> None:
    logits, ids = draw(17, 33, torch.float32)
    before = logits.clone()
    logits.requires_grad_()
    kernel(logits, ids).sum().backward()
    assert torch.equal(logits.detach(), before)


def test_two_runs_are_bitwise_equal(kernel: Op) -> None:
    runs = []
    for _ in range(2):
        logits, ids = draw(17, 4097, torch.float32)
        logits.requires_grad_()
        value = kernel(logits, ids)
        value.sum().backward()
        assert logits.grad is not None
        runs.append((value.detach(), logits.grad))
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_reference_gradient_passes_gradcheck() -> None:
    logits, ids = draw(5, 7, torch.float64)
    ids[2] = -1
    assert torch.autograd.gradcheck(lambda x: token_logprob_reference(x, ids), logits.requires_grad_())


def test_wrong_shapes_and_dtypes_are_named() -> None:
    logits, ids = draw(3, 5, torch.float32)
    with pytest.raises(ValueError, match=r"\(3, 5\) and \(2,\)"):
        token_logprob(logits, ids[:2])
    with pytest.raises(ValueError, match="int32 or int64"):
        token_logprob(logits, ids.float())
