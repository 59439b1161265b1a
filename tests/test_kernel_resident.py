"""The resident trainer on the shipped base: what PEFT and torch's Adam give, whole or not at all, and never a sync."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from cltrain_kernels.adamw import AdamW, adamw_step_reference
from cltrain_kernels.apply import apply
from cltrain_kernels.attention import packed_hidden
from cltrain_kernels.flat import FlatLoRA
from cltrain_kernels.grams import trust_region
from cltrain_kernels.packing import Bucket, Row, Segment, pack, segment
from cltrain_kernels.resident import Resident, copy_into, moved
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from cltrain.models.adapter import (
    AdapterFile,
    attach,
    new_factors,
    parameters_of,
    read_adapter,
    snapshot,
    write_adapter,
)
from cltrain.models.base import Base, load_base

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
BUCKETS = (Bucket(16, 16, 4), Bucket(64, 64, 4))
RATES = [(1e-3, 4e-3)] * 3


@pytest.fixture(scope="module")
def base() -> Base:
    return load_base(None)


@pytest.fixture(scope="module")
def start(base: Base) -> AdapterFile:
    adapter = new_factors(base, 4, 8.0, TARGETS, seed=0)
    rng = torch.Generator().manual_seed(1)
    return adapter.with_factors(
        {m: (a, 0.01 * torch.randn(b.shape, generator=rng)) for m, (a, b) in adapter.factors.items()}
    )


def resident(base: Base, start: AdapterFile, is_applied: bool = False) -> Resident:
    """Over PEFT's layers, or over the fused ones."""
    model = attach(base, start)
    if is_applied:
        assert apply(model).why_not is None
    live: Any = parameters_of(model, start)
    return Resident(model, live, BUCKETS, AdamW(max_norm=1.0))


def rows(step: int) -> list[Row]:
    """Three rows with a common beginning whose weights sum to one."""
    stem = tuple(range(20 + step, 32 + step))
    return [Row((*stem, 40 + i, 50, 60 + i), (0.0,) * 12 + (1 / 9,) * 3) for i in range(3)]


def batches(num: int = 3) -> list[list[Segment]]:
    """Of each step a tree of two rows, and a row."""
    return [[segment(rows(step)[:2]), segment(rows(step)[2:])] for step in range(num)]


def by_peft(base: Base, start: AdapterFile) -> tuple[Tensor, list[float]]:
    """The same update without anything of ours: PEFT's layers, rows one by one, clip_grad_norm_, torch.optim.AdamW."""
    model = attach(base, start)
    live = parameters_of(model, start)
    groups = [{"params": [pair[i] for pair in live.values()], "lr": RATES[0][i]} for i in (0, 1)]
    adam = torch.optim.AdamW(groups, weight_decay=0.0)
    losses = []
    for step in range(3):
        adam.zero_grad()
        total = 0.0
        for row in rows(step):
            logits_TV = model(torch.tensor([row.ids])).logits[0]
            nll_T = F.cross_entropy(logits_TV[:-1], torch.tensor(row.ids[1:]), reduction="none")
            loss = (nll_T * torch.tensor(row.weights[1:])).sum()
            loss.backward()
            total += float(loss.detach())
        torch.nn.utils.clip_grad_norm_([p for g in groups for p in g["params"]], 1.0)
        adam.step()
        losses.append(total)
    return flat(live), losses


def flat(factors: Any) -> Tensor:
    return torch.cat([p.detach().flatten() for module in sorted(factors) for p in factors[module]])


@pytest.mark.parametrize("is_applied", [False, True])
def test_update_equals_peft_and_torchs_optimiser(base: Base, start: AdapterFile, is_applied: bool) -> None:
    trainer = resident(base, start, is_applied)
    outcome = trainer.update(batches(), RATES)
    expected, losses = by_peft(base, start)
    assert outcome.losses == pytest.approx(losses, rel=1e-5)
    moves, expected_moves = flat(trainer.state.factors()) - flat(start.factors), expected - flat(start.factors)
    difference = float((moves - expected_moves).norm() / expected_moves.norm())
    assert difference < 1e-3  # in its first steps Adam divides small numbers by themselves, rounding and all
    assert outcome.losses[-1] < outcome.losses[0]


@pytest.mark.parametrize("is_tree", [False, True])
@pytest.mark.parametrize("is_applied", [False, True])
def test_hidden_states_of_the_sources_alone_are_those_among_all(
    base: Base, start: AdapterFile, is_applied: bool, is_tree: bool
) -> None:
    """Whole hidden states and gradients; a branching token is the source of several, and padding of none."""
    trainer = resident(base, start, is_applied)
    packed = pack([segment(rows(0)[:2]) if is_tree else segment(rows(0)[:1]), segment(rows(0)[2:])], BUCKETS[1])
    attention: Any = "mask" if is_tree else "chains"
    found = []
    for is_alone in (True, False):
        trainer.state.zero_gradients()
        if is_alone:
            hidden_MD = packed_hidden(trainer._backbone, packed, attention, packed.sources_M)
        else:
            hidden_MD = packed_hidden(trainer._backbone, packed, attention)[packed.sources_M]
        upstream = torch.randn(hidden_MD.shape, generator=torch.Generator().manual_seed(0))
        hidden_MD.backward(upstream * (packed.weights_M != 0)[:, None])
        found.append((hidden_MD.detach(), trainer.state.gradients.clone()))
    torch.testing.assert_close(found[0][0], found[1][0], rtol=1e-5, atol=1e-5)
    assert float((found[0][1] - found[1][1]).norm() / found[1][1].norm()) < 1e-5


def test_the_last_layer_works_for_the_sources_alone(base: Base, start: AdapterFile) -> None:
    """The fused last MLP sees as many rows as there are targets in the bucket, not its tokens."""
    trainer = resident(base, start, is_applied=True)
    packed = pack(batches(1)[0], Bucket(64, 24, 4))
    seen: list[int] = []

    class Rows(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if "aten.silu." in str(function):
                seen.append(args[0].shape[0])
            return function(*args, **(kwargs or {}))

    with Rows():
        trainer._add_gradients(packed)
    forward = [64] * (len(trainer._backbone.layers) - 1) + [24]
    assert seen == forward + forward[::-1]  # the backward makes the activations again


def test_swapped_in_adapter_trains_as_in_a_new_process_byte_for_byte(
    base: Base, start: AdapterFile, tmp_path: Path
) -> None:
    other = new_factors(base, 4, 8.0, TARGETS, seed=7)
    trainer = resident(base, other)
    trainer.update(batches(2), RATES[:2])
    address = trainer.state.values.data_ptr()

    def write(factors: Any) -> None:
        write_adapter(tmp_path / "resident", start.with_factors(dict(factors)))

    trainer.update(batches(), RATES, start=start.factors, write=write)
    assert trainer.state.values.data_ptr() == address
    fresh = resident(base, start)
    fresh.update(batches(), RATES)
    write_adapter(tmp_path / "fresh", start.with_factors(snapshot(fresh.state.factors())))
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "resident" / name).read_bytes() == (tmp_path / "fresh" / name).read_bytes()
    assert torch.equal(flat(read_adapter(tmp_path / "fresh").factors), flat(fresh.state.factors()))


class Third:
    """A hook on the last norm: at its third call memory runs out, somebody interrupts, or the numbers overflow."""

    def __init__(self, error: BaseException | None) -> None:
        self.error, self.num_calls = error, 0

    def __call__(self, norm: Any, inputs: Any, hidden_BTD: Tensor) -> Tensor:
        self.num_calls += 1
        if self.num_calls < 3:
            return hidden_BTD
        if self.error is not None:
            raise self.error
        return hidden_BTD * math.nan


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), "out of memory in an update with buckets up to Bucket"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), "out of memory"),
        (KeyboardInterrupt(), None),
        (None, "not finite"),
    ],
)
def test_an_update_that_fails_midway_changes_nothing(
    base: Base, start: AdapterFile, error: BaseException | None, said: str | None
) -> None:
    trainer, straight = resident(base, start), resident(base, start)
    for one in (trainer, straight):
        one.update(batches(1), RATES[:1])
    before = [buffer.clone() for buffer in trainer._kept()]
    third = Third(error)
    hook = trainer._backbone.norm.register_forward_hook(third)
    with pytest.raises(KeyboardInterrupt if isinstance(error, KeyboardInterrupt) else RuntimeError, match=said):
        trainer.update(batches(), RATES)
    hook.remove()
    assert third.num_calls >= 3
    assert all(torch.equal(one, other) for one, other in zip(trainer._kept(), before, strict=True))
    for one in (trainer, straight):
        one.update(batches(), RATES)
    assert torch.equal(trainer.state.values, straight.state.values)


def test_a_result_that_cannot_be_written_is_no_update(base: Base, start: AdapterFile) -> None:
    trainer = resident(base, start)
    before = trainer.state.values.clone()

    def write(_: Any) -> None:
        raise OSError("No space left on device")

    with pytest.raises(OSError, match="No space"):
        trainer.update(batches(), RATES, write=write)
    assert torch.equal(trainer.state.values, before)
    assert trainer.state.num_steps == 0


def test_bad_batches_are_named_and_change_nothing(base: Base, start: AdapterFile) -> None:
    trainer = resident(base, start)
    before = trainer.state.values.clone()
    with pytest.raises(ValueError, match="segment 0 has 65 tokens"):
        trainer.update([[segment([Row((1,) * 65, (1.0,) * 65)])]], RATES[:1])
    with pytest.raises(ValueError, match="no supervised token"):
        trainer.update([[segment([Row((1, 2), (0.0, 0.0))])]], RATES[:1])
    with pytest.raises(ValueError, match="a pair of rates per step; got 1, 3"):
        trainer.update(batches(1), RATES)
    with pytest.raises(ValueError, match="got 0, 0"):
        trainer.update([], [])
    with pytest.raises(ValueError, match="lm_head"):
        trainer.update(
            batches(1), RATES[:1], start={**start.factors, "lm_head": start.factors[next(iter(start.factors))]}
        )
    assert torch.equal(trainer.state.values, before)


def test_a_model_that_cannot_be_trained_so_is_refused(base: Base, start: AdapterFile) -> None:
    model = attach(base, start)
    live: Any = parameters_of(model, start)
    with pytest.raises(ValueError, match="bucket"):
        Resident(model, live, [], AdamW())
    with pytest.raises(ValueError, match=r"down_proj\.lora_A"):
        Resident(model, {m: pair for m, pair in live.items() if "down_proj" not in m}, BUCKETS, AdamW())
    model.train()
    with pytest.raises(ValueError, match="training mode"):
        Resident(model, live, BUCKETS, AdamW())


def test_bounds_and_penalties_act_on_every_step(base: Base, start: AdapterFile) -> None:
    trainer = resident(base, start)
    layout = trainer.state.layout
    before = trainer.state.values.clone()
    radii = torch.full((len(layout.modules),), 1e-3, dtype=torch.float64)
    seen: list[float] = []

    def project(state: FlatLoRA) -> None:
        trust_region(layout, state.values, before, radii, start.scale, together=True)
        pairs = zip(layout.stacks(state.values), layout.stacks(before), strict=True)
        dense = [(b.double() @ a.double() - b0.double() @ a0.double()).norm(dim=(1, 2)) for (a, b), (a0, b0) in pairs]
        seen.append(start.scale * float(torch.cat(dense).max()))

    free = resident(base, start).update(batches(), RATES)
    bounded = trainer.update(batches(), RATES, project=project)
    assert seen == pytest.approx([1e-3] * 3, rel=1e-3)
    assert bounded.losses[0] == free.losses[0]
    assert bounded.losses[2] > free.losses[2]
    pulled = resident(base, start)
    pulled.update(batches(1), RATES[:1], penalize=lambda state: state.gradients.fill_(0.0))
    assert torch.equal(flat(pulled.state.factors()), flat(start.factors))


class NeverWaits(TorchDispatchMode):
    """Fails at every operation whose result the host must wait for."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(function)
        waits = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "equal.default", "is_nonzero", "eigh")
        assert not any(f"aten.{wait}" in name or name.startswith(f"aten.{wait}") for wait in waits), f"{name} waits"
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("is_applied", [False, True])
def test_what_a_graph_captures_never_waits_for_the_device(base: Base, start: AdapterFile, is_applied: bool) -> None:
    """The path of a GPU, with the dense mask and the reference optimiser in the place of what only runs there. That the
    loss head never waits where labels lie on a device is its own tests' claim."""
    trainer = resident(base, start, is_applied)
    packed = pack(batches(1)[0], BUCKETS[1])
    assert packed.is_tree
    with NeverWaits():
        packed_hidden(trainer._backbone, packed, "mask", packed.sources_M).square().sum().backward()
        adamw_step_reference(trainer.state, trainer._rates_2, trainer.settings)
        trust_region(
            trainer.state.layout, trainer.state.values, trainer.state.values.clone(),
            torch.ones(len(trainer.state.layout.modules), dtype=torch.float64), 2.0, together=True,
        )  # fmt: skip
        with pytest.raises(AssertionError, match="waits"):
            float(trainer._loss)


def test_a_captured_bucket_reads_the_next_batch_from_the_same_memory() -> None:
    one, other = (pack(batches(2)[i], BUCKETS[1]) for i in (0, 1))
    inputs = moved(one, torch.device("cpu"))
    addresses = [inputs.ids_T.data_ptr(), inputs.weights_M.data_ptr()]
    copy_into(inputs, other)
    assert [inputs.ids_T.data_ptr(), inputs.weights_M.data_ptr()] == addresses
    assert torch.equal(inputs.ids_T, other.ids_T)
    assert not torch.equal(one.ids_T, other.ids_T)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
def test_replayed_graphs_give_what_the_first_run_gave(start: AdapterFile) -> None:
    base = load_base(None, device="cuda")
    runs = []
    for _ in range(2):
        trainer = resident(base, start)
        trainer.prepare()
        trainer.update(batches(), RATES, start=start.factors)
        trainer.update(batches(), RATES, start=start.factors)
        runs.append(flat(trainer.state.factors()).cpu())
    assert torch.equal(*runs)
    assert float((runs[0] - by_peft(load_base(None), start)[0]).abs().max()) < 1e-3
