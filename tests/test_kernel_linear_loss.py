"""linear_loss against float64 PyTorch that computes every logit: plain torch, and Triton, interpreted without a GPU."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator

import pytest
import torch
from cltrain_kernels import LinearLoss, Reference, linear_loss, linear_loss_reference
from cltrain_kernels.testing import guarded, nan_filled
from torch import Tensor

HAS_GPU = torch.cuda.is_available()
DEVICE = "cuda" if HAS_GPU else "cpu"
DTYPES = [torch.float32, torch.float16, *([torch.bfloat16] if HAS_GPU else [])]  # the interpreter's bf16 is wrong
SIZES = [(1, 1, 17), (17, 33, 65), (3, 5, 4097)]
KINDS = ["none", "forward hidden", "reverse hidden", "k3 hidden", "forward logits", "reverse logits", "k3 logprob"]

Case = dict[str, Tensor]


@pytest.fixture(scope="module", params=["torch", "triton"])
def which(request: pytest.FixtureRequest) -> Iterator[str]:
    """Plain torch, or Triton with outputs and buffers that start as NaN."""
    with pytest.MonkeyPatch.context() as patch, nan_filled():
        if request.param == "triton":
            pytest.importorskip("triton")
        patch.setenv("CLTRAIN_KERNELS", {"torch": "reference", "triton": "triton"}[request.param])
        yield request.param


def draw(
    num_rows: int, num_hidden: int, num_vocabulary: int, dtype: torch.dtype = torch.float32, seed: int = 0
) -> Case:
    rng = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=rng).to(DEVICE, dtype)

    hidden, head = normal(num_rows, num_hidden), normal(num_vocabulary, num_hidden) * 2 / num_hidden**0.5
    reference_hidden = hidden + 0.5 * normal(num_rows, num_hidden)
    ids = torch.randint(num_vocabulary, (num_rows,), generator=rng)
    logq = (reference_hidden.double() @ head.double().t()).log_softmax(-1)
    weights = torch.rand(num_rows, generator=rng) + 0.1
    weights[1::3] = 0.0
    return {
        "hidden": hidden,
        "head": head,
        "ids": ids,
        "weights": weights,
        "other_weights": (torch.rand(num_rows, generator=rng) + 0.1) * (torch.arange(num_rows) % 4 != 1),
        "reference_hidden": reference_hidden,
        "reference_logprob": logq.gather(1, ids.to(DEVICE)[:, None])[:, 0].float(),
    }


def reference_of(case: Case, kind: str, dtype: torch.dtype) -> Reference | None:
    """The same reference in the dtype of a run; log-probs and logits come from float64: data, not results."""
    if kind == "none":
        return None
    divergence, source = kind.split()
    given: Case = {"logprob_M": case["reference_logprob"]}
    if source == "hidden":
        given = {"hidden_MD": case["reference_hidden"].to(dtype)}
    elif source == "logits":
        given = {"logits_MV": (case["reference_hidden"].double() @ case["head"].double().t()).to(case["hidden"].dtype)}
    return Reference(divergence, case["other_weights"], **given)  # type: ignore[arg-type]


def run(function: Callable[..., LinearLoss], case: Case, kind: str, hidden: Tensor, **options: int) -> LinearLoss:
    dtype = hidden.dtype
    head = case["head"].to(dtype)
    return function(hidden, head, case["ids"], case["weights"], reference_of(case, kind, dtype), **options)


def figures_of(result: LinearLoss) -> dict[str, Tensor]:
    return {k: v for k, v in vars(result).items() if k.endswith("_M") and v is not None}


def gradient(function: Callable[..., LinearLoss], case: Case, kind: str, **options: int) -> Tensor:
    hidden = case["hidden"].detach().requires_grad_()
    return torch.autograd.grad(run(function, case, kind, hidden, **options).loss, hidden)[0]


def assert_as_accurate(op: Callable[[Case, str, Tensor], LinearLoss], case: Case, kind: str) -> None:
    """Gradient and every figure at most twice as far from float64 as eager in the same dtype. One number says little
    about accuracy, so the loss may be off by what its tokens may, weighted as it weighs them."""

    def specification(case: Case, kind: str, hidden: Tensor) -> LinearLoss:
        return run(linear_loss_reference, case, kind, hidden)

    ours, eager = op(case, kind, case["hidden"]), specification(case, kind, case["hidden"])
    truth = specification(case, kind, case["hidden"].double())
    limits = {}
    for name, true in figures_of(truth).items():
        error = (figures_of(eager)[name].double() - true).abs().max()
        limits[name] = float(2 * error + torch.finfo(torch.float32).eps * (4 + true.abs().max()))
        assert (figures_of(ours)[name].double() - true).abs().max() <= limits[name], name
    assert figures_of(ours).keys() == limits.keys()
    limit = limits["logprob_M"] * case["weights"].sum() + limits.get("divergence_M", 0.0) * case["other_weights"].sum()
    assert abs(float(ours.loss.double() - truth.loss)) <= float(limit) + 1e-6 * abs(float(truth.loss))
    hidden = case["hidden"]
    leaves = [hidden.detach().requires_grad_(), hidden.detach().requires_grad_(), hidden.double().requires_grad_()]
    functions = (op, specification, specification)
    mine, theirs, true = (
        torch.autograd.grad(function(case, kind, leaf).loss, leaf)[0].double()
        for function, leaf in zip(functions, leaves, strict=True)
    )
    ulp = torch.finfo(hidden.dtype).eps * true.abs().max()
    assert (mine - true).abs().max() <= 2 * (theirs - true).abs().max() + ulp


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sizes", SIZES)
def test_loss_gradient_and_figures_are_as_accurate_as_eager(
    which: str, sizes: tuple[int, int, int], kind: str, dtype: torch.dtype
) -> None:
    case = draw(*sizes, dtype)
    chunk = 4 * sizes[2] * 10  # two or more chunks where there are many rows
    assert_as_accurate(lambda *given: run(linear_loss, *given, max_chunk_bytes=chunk), case, kind)


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_is_written_outside_of_the_outputs(which: str, kind: str) -> None:
    """Figures, gradients and the chunks of logits, of which the last has fewer rows."""
    case = draw(17, 33, 65)
    with guarded():
        found = gradient(linear_loss, case, kind, max_chunk_bytes=4 * 65 * 10)
    torch.testing.assert_close(found, gradient(linear_loss_reference, case, kind), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_gradient_passes_gradcheck(kind: str) -> None:
    case = draw(7, 4, 9, torch.float64)
    case["ids"][2] = -100
    hidden = case["hidden"].requires_grad_()
    assert torch.autograd.gradcheck(lambda h: run(linear_loss, case, kind, h, max_chunk_bytes=200).loss, hidden)


@pytest.mark.parametrize("kind", ["none", "reverse hidden", "forward logits", "k3 logprob"])
@pytest.mark.parametrize("max_rows", [None, 9, 40])
def test_fixed_shapes_change_nothing_but_the_order_of_rows(which: str, kind: str, max_rows: int | None) -> None:
    case = draw(12, 8, 33)
    case["weights"][2:5] = case["other_weights"][2:5] = 0.0
    hidden = case["hidden"].requires_grad_()
    few = run(linear_loss, case, kind, hidden)
    many = run(linear_loss, case, kind, hidden, max_rows=max_rows) if max_rows else on_device(case, kind, hidden, None)
    assert int(few.num_supervised) == int(many.num_supervised)
    torch.testing.assert_close(many.loss, few.loss)
    torch.testing.assert_close(*(torch.autograd.grad(x.loss, hidden)[0] for x in (many, few)))
    for name, figure in figures_of(few).items():
        torch.testing.assert_close(figures_of(many)[name], figure)


def on_device(case: Case, kind: str, hidden: Tensor, max_rows: int | None) -> LinearLoss:
    """What runs when ids and weights lie on a GPU, wherever this test runs."""
    import os

    from cltrain_kernels.linear_loss_chunks import chunked, rows_on_device

    reference = reference_of(case, kind, hidden.dtype)
    rows = rows_on_device(
        hidden, len(case["head"]), case["ids"], case["weights"],
        torch.zeros_like(case["weights"]) if reference is None else case["other_weights"], max_rows,
    )  # fmt: skip
    return chunked(hidden, case["head"], rows, reference, 1 << 20, os.environ["CLTRAIN_KERNELS"] == "triton")


def test_nothing_is_read_back_from_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """With labels on the device no operator runs that would wait for it: what a CUDA graph cannot hold."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class NoSync(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            name = str(func)
            assert not any(word in name for word in ("local_scalar", "nonzero", "masked_select", "is_nonzero")), name
            return func(*args, **(kwargs or {}))

    monkeypatch.setenv("CLTRAIN_KERNELS", "reference")
    for kind in KINDS:
        case = draw(12, 8, 33)
        hidden = case["hidden"].requires_grad_()
        with NoSync():
            on_device(case, kind, hidden, 11).loss.backward()
        with pytest.raises(AssertionError), NoSync():
            run(linear_loss, case, kind, hidden)


def test_what_does_not_fit_is_an_error_or_not_a_number(which: str) -> None:
    case = draw(9, 8, 33)
    hidden = case["hidden"].requires_grad_()
    with pytest.raises(ValueError, match=r"6 supervised rows, but max_rows = 5"):
        run(linear_loss, case, "none", hidden, max_rows=5)
    result = on_device(case, "none", hidden, 5)
    assert result.loss.isnan()
    assert torch.autograd.grad(result.loss, hidden)[0].isnan().any()
    case["ids"][3] = 33
    with pytest.raises(ValueError, match=r"id 33 is beyond the head's vocabulary of 33"):
        run(linear_loss, case, "none", hidden)
    assert on_device(case, "none", hidden, None).loss.isnan()


def test_no_supervised_token_is_an_error_or_a_counted_zero(which: str) -> None:
    case = draw(5, 8, 33)
    hidden = case["hidden"].requires_grad_()
    for change in ({"weights": torch.zeros(5)}, {"ids": torch.full((5,), -100)}):
        with pytest.raises(ValueError, match="no supervised token"):
            run(linear_loss, case | change, "none", hidden)
        result = on_device(case | change, "none", hidden, 3)
        assert int(result.num_supervised) == 0
        assert float(result.loss.detach()) == 0.0
        assert not torch.autograd.grad(result.loss, hidden)[0].any()
    with pytest.raises(ValueError, match="no supervised token"):
        run(linear_loss, draw(0, 8, 33), "none", torch.zeros(0, 8, device=DEVICE))


@pytest.mark.parametrize("kind", ["forward hidden", "reverse hidden", "k3 logprob"])
def test_a_divergence_without_weight_is_cross_entropy(which: str, kind: str) -> None:
    case = draw(17, 8, 65)
    case["other_weights"] = torch.zeros(17)
    torch.testing.assert_close(gradient(linear_loss, case, kind), gradient(linear_loss, case, "none"))
    measured = run(linear_loss, case, kind, case["hidden"])
    expected = run(linear_loss_reference, case, kind, case["hidden"]).divergence_M
    torch.testing.assert_close(measured.divergence_M, expected, rtol=1e-4, atol=1e-6)  # it is still measured


@pytest.mark.parametrize("kind", ["forward hidden", "reverse hidden", "k3 hidden"])
def test_doubling_a_coefficient_doubles_its_gradient(which: str, kind: str) -> None:
    case = draw(17, 8, 65)
    alone = {"weights": torch.zeros(17)}
    once = gradient(linear_loss, case | alone, kind)
    twice = gradient(linear_loss, case | alone | {"other_weights": 2 * case["other_weights"]}, kind)
    torch.testing.assert_close(twice, 2 * once)
    both = gradient(linear_loss, case, kind)
    torch.testing.assert_close(both, once + gradient(linear_loss, case, "none"), rtol=1e-4, atol=1e-6)


def test_small_weights_do_not_vanish_in_float16(which: str) -> None:
    case = draw(9, 8, 33, torch.float16)
    small = case | {"weights": case["weights"] * 1e-9}
    hidden = case["hidden"].requires_grad_()
    grads = [
        torch.autograd.grad(run(linear_loss, some, "none", hidden).loss * scale, hidden)[0].float()
        for some, scale in ((case, 1.0), (small, 1e9))
    ]
    torch.testing.assert_close(grads[1], grads[0], rtol=2e-3, atol=1e-4)


def test_views_are_read_by_their_strides_and_nothing_of_the_callers_is_written(which: str) -> None:
    case = draw(17, 8, 33)
    logits = case["reference_hidden"] @ case["head"].t()
    wide = {
        "hidden": torch.randn(17, 20, device=DEVICE),
        "head": torch.randn(33, 11, device=DEVICE),
        "logits": torch.randn(33, 17, device=DEVICE),
    }
    wide["hidden"][:, 2:18:2], wide["head"][:, :8], wide["logits"][:] = case["hidden"], case["head"], logits.t()
    before = {name: tensor.clone() for name, tensor in wide.items()}
    results = []
    for hidden, head, given in (
        (case["hidden"], case["head"], logits),
        (wide["hidden"][:, 2:18:2], wide["head"][:, :8], wide["logits"].t()),
    ):
        leaf = hidden.detach().requires_grad_()
        reference = Reference("reverse", case["other_weights"], logits_MV=given)
        loss = linear_loss(leaf, head, case["ids"], case["weights"], reference, max_chunk_bytes=33 * 4 * 8).loss
        results.append((loss.detach(), torch.autograd.grad(loss, leaf)[0]))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other)
    assert all(torch.equal(before[name], tensor) for name, tensor in wide.items())


@pytest.mark.parametrize("kind", ["none", "reverse hidden"])
def test_two_runs_are_bitwise_equal(which: str, kind: str) -> None:
    one, other = (gradient(linear_loss, draw(17, 8, 4097), kind) for _ in range(2))
    assert torch.equal(one, other)


def test_large_logits_rising_block_by_block_stay_exact(which: str) -> None:
    """Every block raises the maximum, so that every running sum is rescaled; logits near 3000 would overflow exp."""
    case = draw(3, 2, 9000)
    case["head"][:, 0] = torch.linspace(0, 1, 9000, device=DEVICE)
    case["head"][:, 1] = torch.linspace(0, 20, 9000, device=DEVICE).sin()
    case["hidden"] = torch.tensor([[3000.0, 1.0], [-3000.0, 1.0], [30.0, 2.0]], device=DEVICE)
    case["reference_hidden"] = torch.tensor([[2999.0, 2.0], [-3001.0, 0.5], [0.0, 1.0]], device=DEVICE)
    case["weights"], case["other_weights"] = torch.ones(3), torch.ones(3)
    for kind in ("none", "forward hidden", "reverse logits"):
        assert_as_accurate(lambda *given: run(linear_loss, *given), case, kind)


def test_a_reference_that_forbids_a_token_has_a_finite_forward_divergence(which: str) -> None:
    case = draw(3, 8, 4200)
    logits = (case["reference_hidden"] @ case["head"].t()).double()
    logits[:, :4100] = -torch.inf  # the first block and a bit
    results = {}
    for divergence in ("forward", "reverse"):
        reference = Reference(divergence, torch.ones(3), logits_MV=logits.float())  # type: ignore[arg-type]
        results[divergence] = linear_loss(case["hidden"], case["head"], case["ids"], torch.ones(3), reference)
    truth = (case["hidden"].double() @ case["head"].double().t()).log_softmax(-1)[:, 4100:]
    kept = logits.log_softmax(-1)[:, 4100:]
    expected = (kept.exp() * (kept - truth)).sum(-1)
    assert results["forward"].divergence_M is not None
    assert results["reverse"].divergence_M is not None
    torch.testing.assert_close(results["forward"].divergence_M.double(), expected, rtol=1e-5, atol=1e-6)
    assert (results["reverse"].divergence_M > 1e20).all(), "infinite, or beyond any real one"


def test_k3_of_a_nearly_equal_reference_keeps_its_digits(which: str) -> None:
    """r - 1 - log r for r = e^x is x^2/2 + x^3/6 + ...; subtracting the terms in float32 would leave nothing."""
    case = draw(9, 8, 33)
    plain = run(linear_loss, case, "none", case["hidden"])
    shift = torch.tensor([1e-2, -1e-2, 3e-2, 0.1, -0.1, 0.2, 0.3, -0.3, 1.0])
    case |= {"weights": torch.ones(9), "other_weights": torch.ones(9)}
    plain = run(linear_loss, case, "none", case["hidden"])
    case["reference_logprob"] = plain.logprob_M + shift.to(DEVICE)
    measured = run(linear_loss, case, "k3 logprob", case["hidden"]).divergence_M
    assert measured is not None
    exact = (case["reference_logprob"].double() - plain.logprob_M.double()).cpu()
    torch.testing.assert_close(measured.double().cpu(), exact.expm1() - exact, rtol=2e-4, atol=0)


def test_without_a_gradient_nothing_of_it_is_made(which: str) -> None:
    case = draw(9, 8, 33)
    leaf = case["hidden"].requires_grad_()
    with torch.no_grad():
        result = run(linear_loss, case, "forward hidden", leaf)
    assert not result.loss.requires_grad
    torch.testing.assert_close(result.loss, run(linear_loss, case, "forward hidden", leaf).loss.detach())


def test_bad_input_is_named() -> None:
    case = draw(3, 4, 5)
    hidden, head, ids, weights = (case[name] for name in ("hidden", "head", "ids", "weights"))
    ones = torch.ones(3)
    for arguments, said in (
        ((hidden, head[:, :3], ids, weights), r"\(3, 4\) and \(5, 3\)"),
        ((hidden.half(), head, ids, weights), "hidden states are torch.float16"),
        ((hidden, head.clone().requires_grad_(), ids, weights), "the head requires a gradient"),
        ((hidden, head, ids.float(), weights), "int32 or int64 ids"),
        ((hidden, head, ids[:2], weights), r"ids_M is \(2,\); the hidden states have 3 rows"),
        ((hidden, head, ids, weights, Reference("forward", ones)), "exactly one of"),
        ((hidden, head, ids, weights, Reference("forward", ones, logprob_M=ones)), "log-probs are enough for k3"),
        ((hidden, head, ids, weights, Reference("kl", ones, hidden_MD=hidden)), "forward, reverse or k3; got 'kl'"),  # type: ignore[arg-type]
        ((hidden, head, ids, weights, Reference("k3", ones, hidden_MD=hidden[:2])), r"\(2, 4\) on .*, not \(3, 4\)"),
        ((hidden, head, ids, weights, Reference("k3", ones[:2], hidden_MD=hidden)), r"reference.weights_M is \(2,\)"),
    ):
        for function in (linear_loss, linear_loss_reference):
            with pytest.raises(ValueError, match=said):
                function(*arguments)
    with pytest.raises(ValueError, match="max_rows = 0"):
        linear_loss(hidden, head, ids, weights, max_rows=0)


def test_heads_that_would_be_computed_wrongly_are_refused() -> None:
    from cltrain_kernels import frozen_head
    from peft import LoraConfig, get_peft_model
    from torch import nn

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lm_head = nn.Linear(4, 5, bias=False)

    plain = Model()
    with pytest.raises(ValueError, match="requires a gradient"):
        frozen_head(plain.lm_head)
    plain.requires_grad_(False)
    assert frozen_head(plain.lm_head).data_ptr() == plain.lm_head.weight.data_ptr()
    with pytest.raises(ValueError, match="has a bias"):
        frozen_head(nn.Linear(4, 5).requires_grad_(False))
    adapted = get_peft_model(plain, LoraConfig(target_modules=["lm_head"]))
    with pytest.raises(ValueError, match="an adapter sits on the output layer"):
        frozen_head(adapted.base_model.model.lm_head)


def test_only_the_loss_is_differentiable() -> None:
    case = draw(3, 4, 5)
    result = run(linear_loss, case, "forward hidden", case["hidden"].requires_grad_())
    assert result.loss.requires_grad
    assert not any(figure.requires_grad for figure in figures_of(result).values())
    assert {field.name for field in dataclasses.fields(result)} >= figures_of(result).keys()


def test_what_padded_rows_hold_reaches_no_gradient(which: str) -> None:
    case = draw(9, 8, 33)
    case["ids"][4] = -100
    hidden = case["hidden"].clone()
    hidden[4] = torch.nan
    case["reference_hidden"][4] = torch.nan
    leaf = hidden.requires_grad_()
    for kind in ("none", "forward hidden", "reverse hidden", "k3 hidden"):
        for max_rows in (None, 9):
            result = on_device(case, kind, leaf, max_rows)
            assert result.loss.isfinite()
            gradient = torch.autograd.grad(result.loss, leaf)[0]
            assert gradient.isfinite().all()
            assert not gradient[4].any()
