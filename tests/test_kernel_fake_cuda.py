"""What only CUDA runs, rehearsed on a GPU that the CPU plays (pretend_cuda.py): tensors on the right device, no wait in
a step, graphs that read what the next batch brings, and the numbers of a CPU's run."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args

import pytest
import torch
from cltrain_kernels import Adapters, Reference, hidden_at, linear_loss, rms_norm, rope, swiglu, token_logprob
from cltrain_kernels.adamw import AdamW, Corners, adamw_step
from cltrain_kernels.attention import rows_hidden
from cltrain_kernels.flat import FlatLoRA
from cltrain_kernels.grams import column_square_sums, delta_norms, delta_penalty, keep_within, trust_region
from cltrain_kernels.linear_loss_types import Divergence
from cltrain_kernels.packing import Bucket, Row, Segment, segment
from cltrain_kernels.resident import Resident
from peft import LoraConfig
from torch import Tensor
from torch.nn import Parameter

from tests import kernel_parts
from tests.pretend_cuda import Device, Waits, pretended

BUCKETS = (Bucket(16, 16, 4), Bucket(64, 64, 4))
RATES = [(1e-3, 4e-3)] * 2
BENCH = Path(__file__).parent.parent / "kernels/bench"


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[Device]:
    with pretended(monkeypatch) as device:
        yield device


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def close(one: Tensor, other: Tensor, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(one.detach().cpu(), other.detach().cpu(), rtol=tolerance, atol=tolerance)


def test_the_yardstick_sees_what_a_gpu_would_not_forgive(gpu: Device) -> None:
    x = normal(3, 4).cuda()
    assert x.device.type == (x * 2)[0].device.type == torch.zeros(2, device=x.device).device.type == "cuda"
    assert x.cpu().device.type == x.new_zeros(1).cpu().device.type == "cpu"
    with pytest.raises(RuntimeError, match=r"add.* on the CPU"):
        x + normal(3, 4)
    gpu.may_wait = False
    waiting: list[Callable[[], object]] = [
        x.sum().item, x.tolist, x.cpu, lambda: float(x[0, 0]), lambda: bool((x > 0).any()), lambda: x[x > 0],
        lambda: x.copy_(torch.zeros(3, 4)), lambda: x[torch.tensor([0])], lambda: torch.tensor([1.0], device=x.device),
    ]  # fmt: skip
    for wait in waiting:
        with pytest.raises(Waits):
            wait()


def test_a_rehearsed_graph_changes_nothing_when_captured_and_reads_new_inputs_when_replayed(gpu: Device) -> None:
    given, total, graph = torch.ones(2, device="cuda"), torch.zeros(2, device="cuda"), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        total += given * 2
        with pytest.raises(Waits, match="captured"):
            total.sum().item()
    assert total.tolist() == [0, 0]
    graph.replay()
    given.fill_(5)
    graph.replay()
    assert total.tolist() == [12, 12]


def make_resident(family: str, dtype: torch.dtype, device: str, is_applied: bool) -> Resident:
    options: dict[str, Any] = {"use_sliding_window": False, "layer_types": None} if family == "qwen2" else {}
    model = kernel_parts.make(family, base=kernel_parts.make_base(family, **options).to(dtype)).eval().to(device)
    if is_applied:
        kernel_parts.applied(model)
    layers = {n: m for n, m in model.named_modules() if hasattr(m, "lora_A") and hasattr(m, "base_layer")}
    live = {n: (m.lora_A["default"].weight, m.lora_B["default"].weight) for n, m in layers.items()}
    return Resident(model, live, BUCKETS, AdamW(max_norm=1.0))


def batches(is_tree: bool) -> list[list[Segment]]:
    """Two steps of three rows with a common beginning; those of the second do not fit one bucket."""
    found = []
    for step in range(2):
        stem, size = tuple(range(20 + step, 32 + step)), 20 if step == 1 else 1
        rows = [Row((*stem, 40 + i, 50, *(60,) * size), (0.0,) * 12 + (1 / 9,) * (2 + size)) for i in range(3)]
        found.append([segment(rows[:2]), segment(rows[2:])] if is_tree else [segment([row]) for row in rows])
    return found


@pytest.mark.parametrize(("is_applied", "is_tree"), [(True, False), (False, True)])
@pytest.mark.parametrize(("family", "dtype"), [("qwen2", torch.float32), ("qwen3", torch.bfloat16)])
def test_updates_by_graphs_are_those_of_the_cpu_and_no_step_waits(
    monkeypatch: pytest.MonkeyPatch, family: str, dtype: torch.dtype, is_applied: bool, is_tree: bool
) -> None:
    """In bfloat16 rows attend by varlen; trees, and float32, by the mask. Nor does a bound on each step wait."""
    expected = make_resident(family, dtype, "cpu", is_applied)
    outcomes = [expected.update(batches(is_tree), RATES) for _ in range(2)]
    with pretended(monkeypatch) as gpu:
        trainer = make_resident(family, dtype, "cuda", is_applied)
        trainer.prepare()
        assert trainer.state.num_steps.item() == 0
        radii = torch.full((len(trainer.state.layout.modules),), torch.inf, device="cuda", dtype=torch.float64)
        start = trainer.state.values.clone()
        trust_region(trainer.state.layout, start.clone(), start, radii, 2.0, together=True)  # makes its tables
        num_bounded = 0

        def project(state: FlatLoRA) -> None:
            nonlocal num_bounded
            trust_region(state.layout, state.values, start, radii, 2.0, together=True)
            num_bounded += 1
            gpu.may_wait = num_bounded % 2 == 0

        hooks: dict[str, Any] = {"penalize": lambda _: setattr(gpu, "may_wait", False), "project": project}
        found = [trainer.update(batches(is_tree), RATES, **hooks) for _ in range(2)]
        assert num_bounded == 4
        assert len(gpu.graphs) == (4 if is_tree else 3)  # rows in two buckets, the optimiser, and trees in one bucket
        close(trainer.state.values, expected.state.values, 1e-4 if dtype is torch.float32 else 5e-2)
    for one, other in zip(found, outcomes, strict=True):
        assert one.losses == pytest.approx(other.losses, rel=1e-5 if dtype is torch.float32 else 2e-2)
        assert one.norms == pytest.approx(other.norms, rel=1e-4 if dtype is torch.float32 else 0.2)


@pytest.mark.parametrize("is_tree", [False, True])
@pytest.mark.parametrize(("family", "dtype"), [("llama", torch.float32), ("qwen3", torch.bfloat16)])
def test_rows_that_the_trainer_packs_give_the_gradients_of_the_cpu_by_deterministic_kernels(
    monkeypatch: pytest.MonkeyPatch, family: str, dtype: torch.dtype, is_tree: bool
) -> None:
    stem = tuple(range(20, 20 + (18 if is_tree else 2)))
    rows = [(*stem, 40 + i, 50, *(60,) * i) for i in range(3)]
    wanted = [[len(stem) - 1, len(stem)] for _ in rows]
    asked: list[bool] = []
    backward = torch.autograd.grad

    def watched(*args: Any, **kwargs: Any) -> Any:
        asked.append(torch.are_deterministic_algorithms_enabled())
        return backward(*args, **kwargs)

    def gradient(device: str) -> Tensor:
        model = make_resident(family, dtype, device, is_applied=True)
        hidden_MD = rows_hidden(SimpleNamespace(model=model._backbone), rows, wanted)
        (hidden_MD.float() ** 2).sum().backward()
        return model.state.gradients

    expected = gradient("cpu")
    assert not asked
    with pretended(monkeypatch):
        monkeypatch.setattr(torch.autograd, "grad", watched)
        found = gradient("cuda")
        assert asked
        assert all(asked)
        assert not torch.are_deterministic_algorithms_enabled()
        difference = (found.cpu() - expected).double().norm() / expected.double().norm()
        assert float(difference) < (1e-5 if dtype is torch.float32 else 3e-2)


@pytest.mark.parametrize("max_rows", [None, 9])
@pytest.mark.parametrize(
    "reference",
    [
        None,
        ("k3", "logprob_M"),
        *((kind, name) for kind in get_args(Divergence) for name in ("hidden_MD", "logits_MV")),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_loss_head_with_labels_on_the_device_is_that_of_the_host(
    gpu: Device, dtype: torch.dtype, reference: tuple[Any, str] | None, max_rows: int | None
) -> None:
    num_rows, num_hidden, num_vocabulary = 17, 8, 33
    shapes = {"hidden_MD": (num_rows, num_hidden), "logits_MV": (num_rows, num_vocabulary), "logprob_M": (num_rows,)}
    ids = torch.arange(num_rows) * 5 % num_vocabulary
    ids[::2] = -100
    found = []
    for labels in ("cpu", "cuda"):
        hidden_MD = normal(*shapes["hidden_MD"], dtype=dtype).cuda().requires_grad_()
        head_VD, weights = normal(num_vocabulary, num_hidden, seed=1, dtype=dtype).cuda(), torch.full((num_rows,), 0.1)
        given, weights = ids.to(labels), weights.to(labels)
        other: Any = None
        if reference is not None:
            theirs = -normal(*shapes[reference[1]], seed=2, dtype=dtype).abs().cuda()
            other = Reference(reference[0], weights / 2, **{reference[1]: theirs})
        gpu.may_wait = labels == "cpu"
        result = linear_loss(hidden_MD, head_VD, given, weights, other, max_rows=max_rows, max_chunk_bytes=999)
        result.loss.backward()
        gpu.may_wait = True
        assert all(x.is_cuda for x in (result.loss, result.num_supervised, result.logprob_M, hidden_MD.grad))
        found.append((result.loss, result.entropy_M, hidden_MD.grad))
    for one, another in zip(*found, strict=True):
        close(one, another, 1e-5 if dtype is torch.float32 else 2e-2)


def test_the_optimiser_bounds_and_penalties_wait_for_nothing_and_are_those_of_the_cpu(gpu: Device) -> None:
    found = []
    for place in ("cpu", "cuda"):
        shapes = {"q": (8, 12), "k": (8, 12), "down": (10, 6)}
        live = {
            m: (Parameter(normal(4, k, seed=i).to(place)), Parameter(normal(n, 4, seed=i + 9).to(place)))
            for i, (m, (k, n)) in enumerate(shapes.items())
        }
        state = FlatLoRA(live)
        state.gradients.copy_(normal(state.layout.size, seed=5))
        corners = Corners({m: (a.detach().bfloat16(), b.detach().bfloat16()) for m, (a, b) in live.items()}, 2.0)
        fisher = {m: (normal(n).abs().to(place), normal(k).abs().to(place)) for m, (k, n) in shapes.items()}
        rates, start = torch.tensor([1e-2, 4e-2]).to(place), state.values.clone()
        radii_M = torch.full((3,), 0.05, dtype=torch.float64).to(place)
        layout = state.layout
        if place == "cuda":
            trust_region(layout, start.clone(), start, radii_M, 2.0, together=False)  # makes its tables
            gpu.may_wait = False
        value = delta_penalty(layout, state.values, None, 2.0, radii_M, None, state.gradients)
        norm = adamw_step(state, rates, AdamW(max_norm=1.0, weight_decay=0.1), corners)
        value += delta_penalty(layout, state.values, layout.stacks(start), 2.0, radii_M, fisher, state.gradients)
        fractions_M = trust_region(layout, state.values, start, radii_M, 2.0, together=False)
        kept_M = keep_within(layout, state.values, 30 * radii_M, 2.0, 1e-3)
        sums_K = column_square_sums(state.values.reshape(1, -1))
        norms_M = delta_norms(layout, state.values, 2.0)
        gpu.may_wait = True
        found.append((value, norm, fractions_M, kept_M, norms_M, sums_K, state.values, corners.places["k"][1]))
    for one, other in zip(*found, strict=True):
        close(one, other)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_small_ops_and_several_adapters_in_one_batch_wait_for_nothing(gpu: Device, dtype: torch.dtype) -> None:
    model = kernel_parts.make("llama", base=kernel_parts.make_base("llama").to(dtype))
    model.add_adapter("other", LoraConfig(r=2, lora_alpha=8, target_modules=kernel_parts.TARGETS))
    kernel_parts.fill(model, seed=3, adapter="other")
    kernel_parts.applied(model)
    ids_BT, places_M, slot_BT = kernel_parts.batch(), torch.tensor([0, 3, 3, 12]), torch.tensor([[0] * 11, [1] * 11])
    expected = hidden_at(model, ids_BT, places_M, Adapters(("default", "other"), slot_BT))
    model.to("cuda")
    ids_BT, places_M, slot_BT = ids_BT.cuda(), places_M.cuda(), slot_BT.cuda()
    x = normal(2, 5, 4, 8, dtype=dtype).cuda().requires_grad_()
    weight_D, table = torch.ones(8, dtype=dtype).cuda(), normal(1, 5, 8, dtype=dtype).cuda()
    gpu.may_wait = False
    hidden_MD = hidden_at(model, ids_BT, places_M, Adapters(("default", "other"), slot_BT))
    hidden_MD.sum().backward()
    y = swiglu(rope(rms_norm(x, weight_D, 1e-6), table, table), x)
    token_logprob(y.reshape(-1, 8), torch.zeros(40, dtype=torch.int64, device="cuda")).sum().backward()
    gpu.may_wait = True
    close(hidden_MD, expected, 1e-5 if dtype is torch.float32 else 5e-2)


@pytest.fixture
def bench() -> Iterator[Callable[[str], Any]]:
    before = set(sys.modules)
    sys.path[:0] = [str(BENCH), str(BENCH / "cases")]
    yield importlib.import_module  # of the benchmarks' modules, by name
    del sys.path[:2]
    for name in set(sys.modules) - before:
        if str(BENCH) in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]


def test_the_benchmarks_of_a_gpu_reach_their_end_with_every_contender(gpu: Device, bench: Any) -> None:
    bench("adamw").LINEARS["tiny"] = (1, [(16, 16), (8, 16), (48, 16), (16, 48)])
    bench("linear_loss").SIZES["tiny"] = (16, 91)
    bench("lora_linear").SIZES["tiny"] = (32, 48)
    for name, kind, size in (
        ("adamw", (), ()), ("lora_linear", (), (65,)), ("linear_loss", ("none",), (65, 0.3, "none")),
        ("linear_loss", ("reverse",), (65, 0.3, "reverse")),
    ):  # fmt: skip
        module = bench(name)
        assert module.problem("tiny", *kind) is None, (name, kind)
        truth = module.truth("tiny", *size) if hasattr(module, "truth") else None
        for contender in module.contenders("tiny", *size)[0]:
            gradient = contender.run()
            assert truth is None or bench("case").cosine(gradient, truth) > 0.99, (name, contender.name)


def test_a_whole_step_on_a_gpu_is_pefts(gpu: Device, bench: Any) -> None:
    steps = bench("steps")
    steps.SHAPES["0.5B"] = steps.SHAPES["tiny"]
    row = steps.check(steps.Job("0.5B", 64, "cuda"))
    assert "problem" not in row, row
    assert row["cosine"] > 0.999
