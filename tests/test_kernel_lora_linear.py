"""lora_linear and lora_mlp against float64 PyTorch, and several adapters in one batch against each alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from cltrain_kernels import Norm, Projection, lora_linear, lora_linear_reference, lora_mlp, lora_mlp_reference
from cltrain_kernels.adamw import AdamW, Corners, adamw_step
from cltrain_kernels.flat import FlatLoRA
from cltrain_kernels.lora_concat import concatenate, lora_concat
from cltrain_kernels.rms_norm import rms_norm_reference
from cltrain_kernels.swiglu import swiglu_reference
from cltrain_kernels.testing import assert_as_accurate_as_eager, nan_filled
from torch import Tensor

K, I = 6, 11  # noqa: E741
OUTS = (7, 3, 5)  # a group of three, as q, k and v


def random(*shape: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def projection(
    num_out: int, num_in: int, rank: int | None, seed: int, scale: float | Tensor = 1.5, has_bias: bool = False
) -> Projection:
    return Projection(
        random(num_out, num_in, seed=seed) / num_in**0.5,
        random(num_out, seed=seed + 1) if has_bias else None,
        None if rank is None else random(rank, num_in, seed=seed + 2) / num_in**0.5,
        None if rank is None else random(num_out, rank, seed=seed + 3),
        scale,
    )


def group(rank: int | None = 4, scale: float | Tensor = 1.5) -> list[Projection]:
    return [projection(n, K, rank, 10 * i, scale, has_bias=i == 0) for i, n in enumerate(OUTS)]


def mlp(rank: int | None = 4, scale: float | Tensor = 1.5) -> list[Projection]:
    shapes = ((I, K), (I, K), (K, I))
    return [projection(*shape, rank, 10 * i + 100, scale) for i, shape in enumerate(shapes)]


def norm() -> Norm:
    return Norm(1 + 0.3 * random(K, seed=7), 1e-6)


def of_factors(op: Callable[..., Any], projections: list[Projection], after: Norm | None) -> Callable[..., Tensor]:
    """`op` as a function of x and the factors alone, everything else cast to the dtype of x; one flat output."""
    takes_group = op in (lora_linear, lora_linear_reference)

    def call(x: Tensor, *factors: Tensor) -> Tensor:
        left = list(factors)
        given = []
        for p in projections:
            a, b = (left.pop(0), left.pop(0)) if p.a_RK is not None else (None, None)
            bias = None if p.bias_N is None else p.bias_N.to(x.dtype)
            scale = p.scale.to(x.dtype) if isinstance(p.scale, Tensor) else p.scale
            given.append(Projection(p.weight_NK.to(x.dtype), bias, a, b, scale))
        n = None if after is None else Norm(after.weight_K.to(x.dtype), after.eps)
        return torch.cat(op(x, given, n), dim=-1) if takes_group else op(x, *given, n)

    return call


def factors_of(projections: list[Projection], dtype: torch.dtype = torch.float64) -> list[Tensor]:
    return [f.to(dtype) for p in projections for f in (p.a_RK, p.b_NR) if f is not None]


OPS = [(lora_linear, lora_linear_reference, group), (lora_mlp, lora_mlp_reference, mlp)]


@pytest.mark.parametrize("has_norm", [False, True])
@pytest.mark.parametrize(("op", "reference", "make"), OPS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_op_is_as_accurate_as_eager(op: Any, reference: Any, make: Any, dtype: torch.dtype, has_norm: bool) -> None:
    projections, after = make(), norm() if has_norm else None
    for shape in ((1, K), (17, K), (2, 5, K), (0, K)):
        inputs = [random(*shape, seed=1, dtype=dtype), *factors_of(projections, dtype)]
        with nan_filled():
            ours, theirs = (of_factors(f, projections, after) for f in (op, reference))
            assert_as_accurate_as_eager(ours, theirs, *inputs)


@pytest.mark.parametrize(("op", "reference", "make"), OPS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])  # the interpreter's bfloat16 is wrong
def test_op_is_as_accurate_as_eager_with_kernels_inside(
    op: Any, reference: Any, make: Any, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The norm in front and the activation by Triton: in the interpreter here, for real on a GPU's machine."""
    pytest.importorskip("triton")
    monkeypatch.setenv("CLTRAIN_KERNELS", "triton")
    projections = make()
    inputs = [random(17, K, seed=1, dtype=dtype), *factors_of(projections, dtype)]
    with nan_filled():
        ours, theirs = (of_factors(f, projections, norm()) for f in (op, reference))
        assert_as_accurate_as_eager(ours, theirs, *inputs)


@pytest.mark.parametrize(("op", "reference", "make"), OPS)
def test_a_scale_in_front_or_inside_of_b_is_the_same(op: Any, reference: Any, make: Any) -> None:
    """Y and dX alike; by the chain rule dA alike, and dB of s and B is s times that of s B."""
    found = []
    for scale, factor in ((1.5, 1.0), (1.0, 1.5)):
        projections = [replace(p, scale=scale, b_NR=factor * p.b_NR) for p in make()]
        inputs = [t.requires_grad_() for t in (random(5, K, seed=1), *factors_of(projections))]
        y = of_factors(op, projections, norm())(*inputs)
        (y * torch.linspace(-1, 1, y.numel()).view_as(y)).sum().backward()
        of_b = [t.grad * factor for t in inputs[2::2] if t.grad is not None]
        found.append([y.detach(), *(t.grad for t in (inputs[0], *inputs[1::2])), *of_b])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("op", "reference", "make"), OPS)
@pytest.mark.parametrize("scale", ["number", "rows", "empty rows"])
@pytest.mark.parametrize("has_norm", [False, True])
def test_gradients_pass_gradcheck(op: Any, reference: Any, make: Any, scale: str, has_norm: bool) -> None:
    of_rows = torch.tensor([[2.0, 2.0, 0.0, 0.0], [0.0, 0.0, 0.5, 0.5]]).double()[[0, 1, 1, 0, 1]]
    if scale == "empty rows":
        of_rows = of_rows * torch.tensor([1.0, 0, 0, 1, 0]).double()[:, None]  # the second adapter has no row at all
    projections = make(4, 1.5 if scale == "number" else of_rows)
    inputs = [t.requires_grad_() for t in (random(5, K, seed=1), *factors_of(projections))]
    assert torch.autograd.gradcheck(of_factors(op, projections, norm() if has_norm else None), inputs)


@pytest.mark.parametrize(("op", "reference", "make"), OPS)
def test_projections_without_an_adapter_pass_gradients_through(op: Any, reference: Any, make: Any) -> None:
    projections = make()
    projections[1] = replace(projections[1], a_RK=None, b_NR=None)
    inputs = [t.requires_grad_() for t in (random(5, K, seed=1), *factors_of(projections))]
    assert len(inputs) == 5
    assert torch.autograd.gradcheck(of_factors(op, projections, norm()), inputs)


@pytest.mark.parametrize(("op", "reference", "make"), OPS)
def test_an_input_without_gradient_trains_the_factors_alike(op: Any, reference: Any, make: Any) -> None:
    gradients = []
    for needs in (True, False):
        projections = make()
        x, *factors = (random(5, K, seed=1).requires_grad_(needs), *factors_of(projections))
        factors = [f.requires_grad_() for f in factors]
        of_factors(op, projections, norm())(x, *factors).square().sum().backward()
        gradients.append([f.grad for f in factors])
        assert (x.grad is not None) == needs
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


@pytest.mark.parametrize(("op", "reference", "make"), OPS)
def test_two_adapters_in_one_batch_are_each_trained_as_if_alone(op: Any, reference: Any, make: Any) -> None:
    x = random(6, K, seed=1)
    slots = torch.tensor([0, 1, -1, 1, 0, 1])
    alone = {0: make(2, 0.5), 1: [replace(p, a_RK=-2 * p.a_RK) for p in make(3, 4.0)]}
    columns = torch.tensor([0, 0, 1, 1, 1])
    scale = torch.where(slots[:, None] == columns, torch.tensor([0.5, 0.5, 4.0, 4.0, 4.0]), 0.0).double()
    both = [
        replace(a, a_RK=torch.cat([a.a_RK, b.a_RK]), b_NR=torch.cat([a.b_NR, b.b_NR], 1), scale=scale)
        for a, b in zip(alone[0], alone[1], strict=True)
    ]
    stacked = [f.requires_grad_() for f in factors_of(both)]
    y = of_factors(op, both, norm())(x, *stacked)
    y.square().sum().backward()
    for slot, rows in ((0, slice(0, 2)), (1, slice(2, 5))):
        factors = [f.requires_grad_() for f in factors_of(alone[slot])]
        mine = of_factors(op, alone[slot], norm())(x[slots == slot], *factors)
        mine.square().sum().backward()
        torch.testing.assert_close(y[slots == slot], mine)
        for i, (together, single) in enumerate(zip(stacked, factors, strict=True)):
            assert together.grad is not None
            part = together.grad[:, rows] if i % 2 else together.grad[rows]
            torch.testing.assert_close(part, single.grad)
    bare = of_factors(op, [replace(p, a_RK=None, b_NR=None) for p in both], norm())(x[slots == -1])
    torch.testing.assert_close(y[slots == -1], bare)


def test_wider_factors_get_their_gradients_in_their_own_dtype() -> None:
    (p, *_) = group()
    a, b = (f.float().requires_grad_() for f in (p.a_RK, p.b_NR) if f is not None)
    assert p.bias_N is not None
    half = Projection(p.weight_NK.bfloat16(), p.bias_N.bfloat16(), a, b, p.scale)
    (y,) = lora_linear(random(5, K, seed=1).bfloat16(), [half])
    y.float().square().sum().backward()
    assert y.dtype is torch.bfloat16
    assert a.grad is not None
    assert a.grad.dtype is torch.float32


@pytest.mark.parametrize("is_mlp", [False, True])
def test_a_backward_adds_the_rows_and_columns_of_the_fishers_that_are_asked_for(is_mlp: bool) -> None:
    """Against autograd, layer by layer: squares of a layer's inputs and of the gradients at its output."""
    plain, x = mlp() if is_mlp else group(), random(5, K, seed=1)
    sinks = [None if i == 1 else tuple(torch.ones(n) for n in p.weight_NK.shape) for i, p in enumerate(plain)]
    asked: list[Any] = [replace(p, fisher=sink) for p, sink in zip(plain, sinks, strict=True)]
    n = rms_norm_reference(x, norm().weight_K, norm().eps)
    first = [y.requires_grad_() for y in lora_linear_reference(n, plain[:2] if is_mlp else plain)]
    inputs, outputs = [n] * len(first), first
    if is_mlp:
        h = swiglu_reference(*first)
        outputs, inputs = [*first, lora_linear_reference(h, plain[2:])[0]], [*inputs, h.detach()]
        outputs[2].retain_grad()
    (outputs[2].square().sum() if is_mlp else torch.cat(outputs, -1).square().sum()).backward()
    for _ in range(2):
        leaf = x.clone().requires_grad_()
        y = lora_mlp(leaf, *asked, norm()) if is_mlp else torch.cat(lora_linear(leaf, asked, norm()), -1)
        y.square().sum().backward()
    for sink, given, output in zip(sinks, inputs, outputs, strict=True):
        if sink is not None:
            for sums, values in zip(sink, (output.grad, given), strict=True):
                torch.testing.assert_close(sums.double(), 1 + 2 * values.square().sum(0), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("op", "reference", "make"), OPS)
def test_two_runs_are_bitwise_equal_and_leave_saved_tensors_alone(op: Any, reference: Any, make: Any) -> None:
    projections = make()
    runs = []
    for _ in range(2):
        inputs = [t.requires_grad_() for t in (random(17, K, seed=1), *factors_of(projections))]
        copies = [t.detach().clone() for t in inputs]
        y = of_factors(op, projections, norm())(*inputs)
        upstream = torch.ones_like(y)
        y.backward(upstream)
        assert bool((upstream == 1).all())
        assert all(torch.equal(t, copy) for t, copy in zip(inputs, copies, strict=True))
        runs.append([y.detach(), *(t.grad for t in inputs)])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_views_with_larger_strides_give_the_same() -> None:
    (p, *_) = group()
    assert p.a_RK is not None
    assert p.b_NR is not None
    # as in a buffer [[W, B], [A, .]]
    padded = torch.full((OUTS[0] + 4, K + 4), torch.nan, dtype=torch.float64)
    padded[: OUTS[0], :K], padded[OUTS[0] :, :K], padded[: OUTS[0], K:] = p.weight_NK, p.a_RK, p.b_NR
    a, b = padded[OUTS[0] :, :K].requires_grad_(), padded[: OUTS[0], K:].requires_grad_()
    views = Projection(padded[: OUTS[0], :K].detach(), p.bias_N, a, b, p.scale)
    x = random(5, 2 * K, seed=1)[:, ::2]
    torch.testing.assert_close(lora_linear(x, [views]), lora_linear_reference(x, [p]))


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_a_4_bit_base_is_computed_as_bitsandbytes_dequantises_it(quant_type: str) -> None:
    bnb = pytest.importorskip("bitsandbytes")
    size = 64
    layers = [projection(size, size, 4, 10 * i, 2.0) for i in range(3)]
    four = []
    for p in layers:
        linear = bnb.nn.Linear4bit(size, size, bias=False, compute_dtype=torch.float32, quant_type=quant_type)
        linear.weight = bnb.nn.Params4bit(p.weight_NK.float(), requires_grad=False, quant_type=quant_type)
        four.append(linear.to("cpu"))
    x = random(5, size, seed=1, dtype=torch.float32)
    factors = factors_of(layers, torch.float32)
    given = [
        Projection(linear.weight, None, a, b, 2.0)
        for linear, a, b in zip(four, factors[::2], factors[1::2], strict=True)
    ]
    truth = bnb.functional.dequantize_4bit(four[0].weight.data, four[0].weight.quant_state)
    assert 0.01 < float((truth - layers[0].weight_NK).norm() / truth.norm()) < 0.2, "it is quantised"
    first = lora_linear(x, given)[0]
    torch.testing.assert_close(first, x @ truth.t() + 2.0 * x @ factors[0].t() @ factors[1].t())
    with_gradient = x.clone().requires_grad_()
    lora_mlp(with_gradient, *given).sum().backward()
    again = x.clone().requires_grad_()
    lora_mlp_reference(again, *given).sum().backward()
    torch.testing.assert_close(with_gradient.grad, again.grad)


def test_what_does_not_fit_is_named() -> None:
    x, (p, *_) = random(5, K, seed=1), group()
    assert p.a_RK is not None
    with pytest.raises(ValueError, match=r"weight \(7, 6\) .* x \(5, 5\)"):
        lora_linear(x[:, :5], [p])
    with pytest.raises(ValueError, match=r"factors \(4, 5\)"):
        lora_linear(x, [replace(p, a_RK=p.a_RK[:, :5])])
    with pytest.raises(ValueError, match="both factors"):
        lora_linear(x, [replace(p, b_NR=None)])
    with pytest.raises(ValueError, match="freeze it"):
        lora_linear(x, [replace(p, weight_NK=p.weight_NK.clone().requires_grad_())])
    with pytest.raises(ValueError, match=r"x is torch.float32, but the base is torch.float64"):
        lora_linear(x.float(), [p])
    with pytest.raises(ValueError, match="call rms_norm before"):
        lora_linear(x, [p], Norm(torch.ones(K).double().requires_grad_(), 1e-6))
    with pytest.raises(ValueError, match=r"norm of \(5,\)"):
        lora_linear(x, [p], Norm(torch.ones(5).double(), 1e-6))
    with pytest.raises(ValueError, match="a 7 x 6 weight"):
        lora_linear(x, [replace(p, fisher=(torch.zeros(6), torch.zeros(7)))])
    gate, up, _ = mlp()
    with pytest.raises(ValueError, match=r"weight \(11, 6\)"):
        lora_mlp(x, gate, up, up)


@pytest.mark.parametrize("has_norm", [False, True])
def test_the_concatenated_form_gives_the_same_numbers_and_gradients(has_norm: bool) -> None:
    projections, after = group(), norm() if has_norm else None
    made = concatenate([replace(projections[0], scale=0.25), *projections[1:]])
    projections[0] = replace(projections[0], scale=0.25)
    made.buffer[made.num_out :, made.num_in :] = torch.nan  # never read
    assert all(torch.equal(w, p.weight_NK) for w, p in zip(made.weights(), projections, strict=True))
    results = []
    for is_concatenated in (True, False):
        x, *factors = (t.requires_grad_() for t in (random(2, 3, K, seed=1), *factors_of(projections)))
        if is_concatenated:
            y = torch.cat(lora_concat(x, made, factors, after), dim=-1)
        else:
            y = of_factors(lora_linear_reference, projections, after)(x, *factors)
        y.square().sum().backward()
        results.append([y.detach(), *(t.grad for t in (x, *factors))])
    assert len(results[0]) == 8
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


class GateAndUp(torch.nn.Module):
    """Two layers with one input, for PEFT to wrap."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = torch.nn.Linear(K, I, bias=False)
        self.up = torch.nn.Linear(K, 2 * I, bias=False)
        for i, layer in enumerate((self.gate, self.up)):
            layer.weight = torch.nn.Parameter(random(*layer.weight.shape, seed=i, dtype=torch.float32))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.gate(x), self.up(x)], -1)


def wrapped() -> tuple[Any, dict[str, tuple[Any, Any]]]:
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(GateAndUp(), LoraConfig(r=4, lora_alpha=6, target_modules=["gate", "up"]))  # scale 1.5
    layers = {name: getattr(model.base_model.model, name) for name in ("gate", "up")}
    live = {name: (m.lora_A["default"].weight, m.lora_B["default"].weight) for name, m in layers.items()}
    for i, p in enumerate(p for pair in live.values() for p in pair):
        p.data.copy_(random(*p.shape, seed=10 + i))
    return model, live


def concatenate_of(live: dict[str, tuple[Any, Any]], layers: list[Any]) -> Any:
    return concatenate(
        [Projection(m.base_layer.weight.detach(), None, *live[name], 1.5) for name, m in zip(live, layers, strict=True)]
    )


def test_the_concatenated_form_lives_on_the_corners_that_steps_leave_and_stays_pefts() -> None:
    theirs, their_live = wrapped()
    parameters = [p for pair in their_live.values() for p in pair]
    adam = torch.optim.AdamW(parameters, lr=0.05, weight_decay=0.0)
    model, live = wrapped()
    state = FlatLoRA(live)
    layers = [getattr(model.base_model.model, name) for name in live]
    made = concatenate_of(live, layers)
    corners = Corners(dict(zip(live, made.places(), strict=True)), 1.5)
    factors = [p for pair in live.values() for p in pair]
    for step in range(4):
        x = random(7, K, seed=20 + step, dtype=torch.float32)
        expected, ours = theirs(x), torch.cat(lora_concat(x, made, factors), -1)
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-4)
        for y in (expected, ours):
            y.square().mean().backward()
        for mine, other in zip(factors, parameters, strict=True):
            torch.testing.assert_close(mine.grad, other.grad, rtol=1e-4, atol=1e-4)
        adam.step()
        adam.zero_grad()
        adamw_step(state, torch.tensor([0.05, 0.05]), AdamW(), corners)
        state.zero_gradients()
    assert torch.equal(made.buffer, concatenate_of(live, layers).buffer)


def test_the_concatenated_form_follows_its_factors_only_when_refreshed_and_never_under_a_backward() -> None:
    (p, *_) = group()
    made, x = concatenate([p]), random(5, K, seed=1)
    factors = [f.clone().requires_grad_() for f in factors_of([p])]
    before = lora_concat(x, made, factors)[0]
    with torch.no_grad():
        factors[1] *= 2
    assert torch.equal(lora_concat(x, made, factors)[0], before)
    made.refresh(factors)
    torch.testing.assert_close(lora_concat(x, made, factors), lora_linear_reference(x, [replace(p, b_NR=factors[1])]))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        before.sum().backward()
    with pytest.raises(ValueError, match="6 inputs"):
        lora_concat(x[:, :5], made, factors)
    with pytest.raises(ValueError, match="1 factors for 1"):
        lora_concat(x, made, factors[:1])
    with pytest.raises(ValueError, match="one scale"):
        concatenate([replace(p, scale=torch.ones(5, 4))])
