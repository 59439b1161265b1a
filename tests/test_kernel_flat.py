"""FlatLoRA and the optimiser step: float64, torch.optim, PEFT's own files, the interpreter."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from cltrain_kernels.adamw import AdamW, Corners, adamw_step, adamw_step_reference
from cltrain_kernels.flat import FlatLoRA, Layout
from cltrain_kernels.testing import guarded, nan_filled
from torch import Tensor
from torch.nn import Parameter

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SHAPES = {"q": (17, 33), "k": (1, 65), "v": (1, 65), "up": (65, 33), "o": (17, 33)}  # N, K
RANK = 5
Live = dict[str, tuple[Parameter, Parameter]]


def live(seed: int = 0, dtype: torch.dtype = torch.float32, shapes: dict[str, tuple[int, int]] = SHAPES) -> Live:
    rng = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Parameter:
        return Parameter(torch.randn(shape, generator=rng, dtype=torch.float64).to(DEVICE, dtype))

    return {m: (draw(RANK, num_in), draw(num_out, RANK)) for m, (num_out, num_in) in shapes.items()}


def set_gradients(factors: Live, seed: int, size: float = 1.0) -> None:
    rng = torch.Generator().manual_seed(seed)
    for pair in factors.values():
        for p in pair:
            gradient = size * torch.randn(p.shape, generator=rng, dtype=torch.float64)
            if p.grad is None:
                p.grad = gradient.to(p)
            else:
                p.grad.copy_(gradient)


def flat_of(factors: Live) -> Tensor:
    return torch.cat([p.detach().double().flatten() for pair in factors.values() for p in pair])


@pytest.fixture(params=["cpu", "reference", "triton"])
def step(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    if request.param == "reference":
        yield adamw_step_reference
    elif request.param == "cpu":
        monkeypatch.setenv("CLTRAIN_KERNELS", "reference")
        yield adamw_step
    else:
        pytest.importorskip("triton")
        from cltrain_kernels.adamw_triton import adamw_step_triton  # interpreted on a CPU: see conftest.py

        with nan_filled():
            yield adamw_step_triton


def test_factors_of_one_shape_lie_side_by_side_and_nothing_overlaps() -> None:
    layout = Layout.of(SHAPES, RANK)
    assert layout.modules == ("q", "o", "k", "v", "up")
    marks = torch.zeros(layout.size)
    for a_RK, b_NR in layout.factors(marks).values():
        a_RK += 1
        b_NR += 1
        assert a_RK.storage_offset() % 64 == b_NR.storage_offset() % 64 == 0
        assert a_RK.storage_offset() < layout.boundary <= b_NR.storage_offset()
    assert marks.max() == 1
    assert marks.sum() == sum(RANK * (n + k) for n, k in SHAPES.values())
    assert [tuple(a.shape) for a, _ in layout.stacks(marks)] == [(2, RANK, 33), (2, RANK, 65), (1, RANK, 33)]


def test_parameters_become_views_and_come_back() -> None:
    factors = live()
    before = flat_of(factors)
    state = FlatLoRA(factors)
    assert torch.equal(flat_of(factors), before)
    state.values += 1
    assert not torch.equal(flat_of(factors), before)
    (factors["q"][0].sum() * 2).backward()
    (factors["q"][0].sum() * 3).backward()
    state.check()
    assert state.layout.factors(state.gradients)["q"][0].unique().tolist() == [5.0]
    state.zero_gradients()
    assert not factors["q"][0].grad.any()  # type: ignore[union-attr]
    state.release()
    kept = flat_of(factors)
    state.values.zero_()
    assert torch.equal(flat_of(factors), kept)
    assert all(p.grad is None and p.untyped_storage().nbytes() == p.nbytes for pair in factors.values() for p in pair)


def test_whoever_leaves_the_buffer_is_found() -> None:
    factors = live()
    state = FlatLoRA(factors)
    factors["k"][1].grad = None
    with pytest.raises(RuntimeError, match="zero_gradients"):
        state.check()
    factors["k"][1].data = factors["k"][1].data.clone()
    with pytest.raises(RuntimeError, match="make a new FlatLoRA"):
        state.check()


def test_what_does_not_fit_one_buffer_is_refused_and_left_alone() -> None:
    mixed = live()
    mixed["k"] = live(dtype=torch.float64)["k"]
    with pytest.raises(ValueError, match="one rank, dtype and device"):
        FlatLoRA(mixed)
    assert all(p.grad is None for pair in mixed.values() for p in pair)
    shared = live()
    shared["o"] = (shared["q"][0], shared["o"][1])
    with pytest.raises(ValueError, match="share"):
        FlatLoRA(shared)
    with pytest.raises(ValueError, match="no A"):
        FlatLoRA({"q": (Parameter(torch.zeros(3, 4)), Parameter(torch.zeros(5, 2)))})
    with pytest.raises(ValueError, match="at least one row"):
        Layout.of({}, 4)
    with pytest.raises(ValueError, match="at least one row"):
        Layout.of({"q": (0, 4)}, 4)
    state = FlatLoRA(live())
    kept = state.values.clone()
    with pytest.raises(ValueError, match="does not fit"):
        state.load({**live(1), "up": (torch.zeros(RANK, 33), torch.zeros(66, RANK))})
    with pytest.raises(ValueError, match="gate"):
        state.load({**live(1), "gate": live()["q"]})
    assert torch.equal(state.values, kept)
    with pytest.raises(ValueError, match="whole flat buffer"):
        state.layout.stacks(state.values[1:])


def test_peft_saves_and_loads_through_the_views(tmp_path: Path) -> None:
    from peft import LoraConfig, PeftModel, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    def model() -> Any:
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=11, hidden_size=8, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2
        )
        return LlamaForCausalLM(config)

    peft_model = get_peft_model(model(), LoraConfig(r=2, target_modules=["q_proj", "down_proj"]))
    layers = {n: m for n, m in peft_model.named_modules() if hasattr(m, "lora_A") and hasattr(m, "base_layer")}
    factors = {n: (m.lora_A["default"].weight, m.lora_B["default"].weight) for n, m in layers.items()}
    state = FlatLoRA(factors)
    state.values.copy_(torch.randn(state.layout.size))
    peft_model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(model(), tmp_path)
    ids = torch.arange(7)[None]
    assert torch.equal(again(ids).logits, peft_model(ids).logits)
    expected = state.values.clone()
    state.values.zero_()
    peft_model.load_adapter(str(tmp_path), "default")
    state.check()
    for module, pair in state.layout.factors(expected).items():
        assert all(torch.equal(one, other) for one, other in zip(state.factors()[module], pair, strict=True))


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_step_is_as_accurate_as_torchs_own_and_repeats_to_the_bit(step: Any, decay: float) -> None:
    settings = AdamW(betas=(0.8, 0.99), eps=1e-6, weight_decay=decay, max_norm=3.0)
    rates = (1e-2, 0.16)

    def torchs(dtype: torch.dtype) -> tuple[Tensor, list[float]]:
        factors, norms = live(dtype=dtype), []
        groups = [{"params": [pair[i] for pair in factors.values()], "lr": rates[i]} for i in (0, 1)]
        adam = torch.optim.AdamW(groups, betas=settings.betas, eps=settings.eps, weight_decay=decay)
        for i in range(4):
            set_gradients(factors, i, 0.01 if i == 2 else 1.0)  # clipped and not
            norms.append(float(torch.nn.utils.clip_grad_norm_([p for g in groups for p in g["params"]], 3.0)))
            adam.step()
        return flat_of(factors), norms

    def ours() -> tuple[Tensor, list[float], FlatLoRA]:
        factors, norms = live(), []
        state = FlatLoRA(factors)
        for i in range(4):
            set_gradients(factors, i, 0.01 if i == 2 else 1.0)
            norms.append(float(step(state, torch.tensor(rates, device=DEVICE), settings, None)))
        return flat_of(factors), norms, state

    true, true_norms = torchs(torch.float64)
    value, norms, state = ours()
    limit = 2 * float((torchs(torch.float32)[0] - true).abs().max()) + torch.finfo(torch.float32).eps * float(
        true.abs().max()
    )
    assert float((value - true).abs().max()) <= limit
    assert norms == pytest.approx(true_norms, rel=1e-6)
    assert state.num_steps == 4
    assert torch.equal(ours()[0], value)
    used = torch.zeros(state.layout.size, device=DEVICE)
    for pair in state.layout.factors(used).values():
        for place in pair:
            place += 1
    for buffer in (state.values, state.means, state.squares):
        assert not buffer[used == 0].any(), "the gaps between factors were written"


def test_nothing_is_written_behind_the_state(step: Any) -> None:
    """Before it nothing can lie: a flat buffer begins its storage. Between the factors the test above looks."""
    factors = live()
    with guarded(in_front=0):
        state = FlatLoRA(factors)
        assert state.values.untyped_storage().nbytes() > state.values.nbytes
        set_gradients(factors, 0)
        norm = step(state, torch.tensor([0.01, 0.02], device=DEVICE), AdamW(max_norm=1.0), None)
    assert bool(norm.isfinite() & state.values.isfinite().all())


def test_without_decay_and_clipping_it_is_adam_in_float64() -> None:
    factors, theirs = live(dtype=torch.float64), live(dtype=torch.float64)
    state = FlatLoRA(factors)
    adam = torch.optim.Adam([p for pair in theirs.values() for p in pair], lr=1e-3)
    for i in range(5):
        set_gradients(factors, i)
        set_gradients(theirs, i)
        adamw_step_reference(state, torch.full((2,), 1e-3, dtype=torch.float64, device=DEVICE), AdamW())
        adam.step()
    torch.testing.assert_close(flat_of(factors), flat_of(theirs), rtol=0, atol=1e-13)


def test_a_rate_of_zero_keeps_its_factor(step: Any) -> None:
    factors = live()
    state = FlatLoRA(factors)
    before = {m: (a.detach().clone(), b.detach().clone()) for m, (a, b) in factors.items()}
    set_gradients(factors, 0)
    step(state, torch.tensor([0.0, 0.1], device=DEVICE), AdamW(), None)
    assert all(torch.equal(factors[m][0], a) and not torch.equal(factors[m][1], b) for m, (a, b) in before.items())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_corners_hold_the_factors_and_nothing_beside_them_is_written(step: Any, dtype: torch.dtype) -> None:
    if dtype is torch.bfloat16 and DEVICE == "cpu" and step.__module__.endswith("triton"):
        pytest.skip("the interpreter rounds to bfloat16 towards zero")
    factors = live()
    state = FlatLoRA(factors)
    buffers = {  # [[W, sB], [A, .]] with a guard row and column
        m: torch.full((n + RANK + 1, k + RANK + 1), 7.0, dtype=dtype, device=DEVICE) for m, (n, k) in SHAPES.items()
    }
    places = {
        m: (p[n : n + RANK, :k], p[:n, k : k + RANK])
        for (m, p), (n, k) in zip(buffers.items(), SHAPES.values(), strict=True)
    }
    set_gradients(factors, 0)
    step(state, torch.tensor([0.01, 0.02], device=DEVICE), AdamW(), Corners(places, 0.5))
    for module, (n, k) in SHAPES.items():
        a_RK, b_NR = factors[module]
        expected = torch.full_like(buffers[module], 7.0)
        expected[n : n + RANK, :k] = a_RK.detach().to(dtype)
        expected[:n, k : k + RANK] = (0.5 * b_NR.detach()).to(dtype)
        assert torch.equal(buffers[module], expected), module


def test_a_gradient_that_is_not_finite_shows_in_the_norm(step: Any) -> None:
    factors = live()
    state = FlatLoRA(factors)
    set_gradients(factors, 0)
    state.gradients[3] = torch.nan
    assert step(state, torch.tensor([0.1, 0.1], device=DEVICE), AdamW(max_norm=1.0), None).isnan()
    assert state.values.isnan().any()


def test_bad_settings_are_named() -> None:
    with pytest.raises(ValueError, match="betas"):
        AdamW(betas=(1.0, 0.9))
    with pytest.raises(ValueError, match="max_norm"):
        AdamW(max_norm=0.0)
    state = FlatLoRA(live())
    with pytest.raises(ValueError, match="two rates"):
        adamw_step(state, torch.zeros(3, device=DEVICE), AdamW())
    with pytest.raises(ValueError, match="q: corners of None"):
        adamw_step(state, torch.zeros(2, device=DEVICE), AdamW(), Corners({}, 1.0))
