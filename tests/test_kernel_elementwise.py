"""rms_norm, rope and swiglu against float64 PyTorch: the autograd functions in plain torch, and the Triton kernels in
the interpreter without a GPU, for real on one."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from cltrain_kernels import (
    rms_norm,
    rms_norm_reference,
    rope,
    rope_reference,
    swiglu,
    swiglu_reference,
)
from cltrain_kernels.testing import assert_as_accurate_as_eager, guarded, nan_filled
from torch import Tensor

HAS_GPU = torch.cuda.is_available()
DEVICE = "cuda" if HAS_GPU else "cpu"
DTYPES = [torch.float32, torch.float16, *([torch.bfloat16] if HAS_GPU else [])]  # the interpreter's bf16 is wrong
EPS = 1e-6

Op = Callable[..., Tensor]


@pytest.fixture(params=["reference", "triton"])
def which(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both implementations, by the switch that a user has."""
    if request.param == "triton":
        pytest.importorskip("triton")
    monkeypatch.setenv("CLTRAIN_KERNELS", request.param)
    return str(request.param)


def draw(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(DEVICE, dtype)


def tables(positions_BT: list[list[int]], size: int, scale: float = 1.0) -> tuple[Tensor, Tensor]:
    """cos and sin (B, T, size) in float64, as transformers makes them."""
    angles = torch.tensor(positions_BT, dtype=torch.float64)[..., None] * 100.0 ** -torch.linspace(0, 1, size // 2)
    both = torch.cat([angles, angles], -1).to(DEVICE)
    return both.cos() * scale, both.sin() * scale


def rotation(function: Op, cos: Tensor, sin: Tensor, dtype: torch.dtype) -> Op:
    """`function` of x alone, with tables that are exact in `dtype`."""
    cos, sin = cos.to(dtype), sin.to(dtype)
    return lambda x: function(x, cos.to(x.dtype), sin.to(x.dtype))


def normed(function: Op) -> Op:
    return lambda x, w: function(x, w, EPS)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1), (1, 17), (17, 33), (3, 2, 65), (2, 3, 4, 64), (0, 16), (3, 1030)])
def test_rms_norm_is_as_accurate_as_eager(which: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x, w = draw(*shape, dtype=dtype), draw(shape[-1], dtype=dtype, seed=1)
    with nan_filled():
        assert_as_accurate_as_eager(normed(rms_norm), normed(rms_norm_reference), x, w)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1), (1, 17), (17, 33), (3, 2, 65), (0, 16), (3, 1030)])
def test_swiglu_is_as_accurate_as_eager(which: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    gate, up = draw(*shape, dtype=dtype), draw(*shape, dtype=dtype, seed=1)
    with nan_filled():
        assert_as_accurate_as_eager(swiglu, swiglu_reference, gate * 3, up)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1, 1, 2), (2, 3, 17, 6), (2, 7, 5, 66), (1, 0, 2, 8), (1, 5, 2, 128)])
def test_rope_is_as_accurate_as_eager(which: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    positions = [list(range(row, row + shape[1])) for row in range(shape[0])]
    cos, sin = tables(positions, shape[3], scale=1.3)  # yarn's tables carry a factor
    ours, theirs = (rotation(f, cos, sin, dtype) for f in (rope, rope_reference))
    with nan_filled():
        assert_as_accurate_as_eager(ours, theirs, draw(*shape, dtype=dtype))


def test_rotation_keeps_lengths_and_depends_on_distance_alone(which: str) -> None:
    q, k = draw(1, 1, 1, 16), draw(1, 1, 1, 16, seed=1)

    def score(i: int, j: int) -> Tensor:
        at_i, at_j = (tuple(t.float() for t in tables([[place]], 16)) for place in (i, j))
        return (rope(q, *at_i) * rope(k, *at_j)).sum()

    torch.testing.assert_close(score(3, 1), score(11, 9))
    torch.testing.assert_close(rope(q, *(t.float() for t in tables([[5]], 16))).norm(), q.norm())
    assert abs(score(3, 1) - score(3, 2)) > 1e-3


def test_packed_sequences_are_rotated_as_if_alone(which: str) -> None:
    x = draw(1, 5, 2, 8)
    packed, alone = (tuple(t.float() for t in tables([p], 8)) for p in ([0, 1, 2, 0, 1], [0, 1]))
    assert torch.equal(rope(x, *packed)[:, 3:], rope(x[:, 3:], *alone))


def test_strided_views_give_the_same_answer_and_gradient(which: str) -> None:
    wide = draw(10, 70)
    for view in (wide[:, 1:34], wide[::2, :33], wide.t()[:33, :].t(), wide[:, ::2][:, :33]):
        w = draw(33, seed=1)
        assert_as_accurate_as_eager(normed(rms_norm), normed(rms_norm_reference), view, w)
        assert_as_accurate_as_eager(swiglu, swiglu_reference, view, draw(*view.shape, seed=2))
    heads = draw(2, 3, 4, 12)
    cos, sin = tables([[0, 1, 2], [5, 6, 7]], 8)
    wide_tables = [torch.cat([t, t], -1)[..., :8] for t in (cos, sin)]
    assert wide_tables[0].stride(1) == 16
    ours, theirs = (rotation(f, *wide_tables, torch.float32) for f in (rope, rope_reference))
    for view in (heads[..., 1:9], draw(2, 4, 3, 8).transpose(1, 2), draw(2, 8, 4, 3).permute(0, 3, 2, 1)):
        assert_as_accurate_as_eager(ours, theirs, view)


def test_expanded_upstream_gradients_are_read_with_their_strides(which: str) -> None:
    cos, sin = (t.float() for t in tables([[0, 1, 2]], 8))
    w = draw(8, seed=1)
    cases: list[tuple[Op, Op]] = [
        (lambda x: rms_norm(x, w, EPS), lambda x: rms_norm_reference(x, w, EPS)),
        (lambda x: rope(x, cos, sin), lambda x: rope_reference(x, cos, sin)),
        (lambda x: swiglu(x, x), lambda x: swiglu_reference(x, x)),
    ]
    for ours, theirs in cases:
        a, b = (draw(1, 3, 2, 8).requires_grad_() for _ in range(2))
        ours(a).sum().backward()  # one number with stride 0
        theirs(b).sum().backward()
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-5, atol=1e-6)


def run_all(x: Tensor, w: Tensor, up: Tensor, heads: Tensor, cos: Tensor, sin: Tensor) -> list[Tensor]:
    """Outputs and gradients of the three ops."""
    leaves = [t.clone().requires_grad_() for t in (x, w, up, heads)]
    outputs = [rms_norm(leaves[0], leaves[1], EPS), swiglu(leaves[0], leaves[2]), rope(leaves[3], cos, sin)]
    torch.autograd.backward([o.square().sum() for o in outputs])
    return [*(o.detach() for o in outputs), *(leaf.grad for leaf in leaves if leaf.grad is not None)]


def inputs() -> tuple[Tensor, ...]:
    cos, sin = (t.float() for t in tables([[0, 1, 2]], 6))
    return draw(5, 33), draw(33, seed=1), draw(5, 33, seed=2), draw(2, 3, 5, 6, seed=3), cos, sin


def test_two_runs_are_bitwise_equal_and_leave_the_callers_tensors_alone(which: str) -> None:
    tensors = inputs()
    copies = [t.clone() for t in tensors]
    first, second = run_all(*tensors), run_all(*tensors)
    assert len(first) == 7
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(tensors, copies, strict=True))


def test_nothing_is_written_outside_of_the_outputs(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    monkeypatch.setenv("CLTRAIN_KERNELS", "triton")
    with guarded():
        results = run_all(*inputs())
    assert not any(bool(result.isnan().any()) for result in results)


@pytest.mark.parametrize("frozen", [True, False])
def test_a_frozen_norm_gets_no_gradient_and_a_trained_one_the_right_one(which: str, frozen: bool) -> None:
    x, w = draw(7, 17).requires_grad_(), draw(17, seed=1).requires_grad_(not frozen)
    rms_norm(x, w, EPS).square().sum().backward()
    assert x.grad is not None
    assert (w.grad is None) == frozen


def test_gradients_pass_gradcheck() -> None:
    x, w, up = (t.double().cpu().requires_grad_() for t in (draw(5, 7), draw(7, seed=1), draw(5, 7, seed=2)))
    cos, sin = (t.cpu() for t in tables([[0, 1, 5]], 6))
    heads = draw(2, 3, 2, 6, dtype=torch.float64).cpu().requires_grad_()
    assert torch.autograd.gradcheck(lambda x, w: rms_norm(x, w, EPS), (x, w))
    assert torch.autograd.gradcheck(swiglu, (x, up))
    assert torch.autograd.gradcheck(lambda x: rope(x, cos, sin), heads)


def test_wrong_shapes_and_dtypes_are_named() -> None:
    x, cos = draw(2, 3, 4, 6), draw(1, 3, 6)
    with pytest.raises(ValueError, match=r"\(2, 3, 4, 6\) and \(5,\)"):
        rms_norm(x, draw(5), EPS)
    with pytest.raises(ValueError, match="float16"):
        rms_norm(x, draw(6, dtype=torch.float16), EPS)
    with pytest.raises(ValueError, match=r"even D; got \(2, 3, 4, 5\)"):
        rope(x[..., :5], cos[..., :5], cos[..., :5])
    with pytest.raises(ValueError, match=r"got \(1, 2, 6\)"):
        rope(x, cos[:, :2], cos[:, :2])
    with pytest.raises(ValueError, match="alike"):
        swiglu(x, x[:1])
    with pytest.raises(ValueError, match="int64"):
        swiglu(x.long(), x.long())


def test_rows_that_do_not_fit_in_registers_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    monkeypatch.setenv("CLTRAIN_KERNELS", "triton")
    x = draw(1, 16384)
    torch.testing.assert_close(rms_norm(x, x[0], EPS), rms_norm_reference(x, x[0], EPS), rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="at most 16384 features; got 16385"):
        rms_norm(draw(1, 16385), draw(16385), EPS)


@pytest.mark.skipif(not HAS_GPU, reason="needs 7 GiB of a GPU")
def test_offsets_beyond_two_to_the_31_are_reached() -> None:
    rows = (1 << 31) // 4096 + 8
    gate = torch.zeros(rows, 4096, dtype=torch.float16, device=DEVICE)
    gate[-1] = 1.0
    apart = torch.zeros(3 * (1 << 30) + 1, dtype=torch.float16, device=DEVICE).as_strided(
        (1, 1, 1, 4), (0, 0, 0, 1 << 30)
    )
    apart[..., 2] = 1.0
    cos, sin = (t.half() for t in tables([[1]], 4))
    torch.testing.assert_close(rope(apart, cos, sin), rope_reference(apart, cos, sin))
    assert float(swiglu(gate, gate)[-1, -1]) == pytest.approx(0.7311, abs=1e-3)
    assert float(rms_norm(gate, gate[-1], EPS)[-1, -1]) == pytest.approx(1.0, abs=1e-3)
