"""linear_loss: the loss head of 0.5B and 8B models, forward and backward to the hidden states, alone and with a
reference.

Peers get the supervised rows only where they take rows; Hugging Face's way computes every row, as it does in training.
Weights of the head are drawn so that logits have a spread of a few nats: with random-initialised logits the gradient
filter of cut-cross-entropy would skip nearly everything, so `cce_exact` is what is compared.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from case import Case, Contender, installed
from cltrain_kernels import Reference, linear_loss, linear_loss_reference
from torch import Tensor
from torch.nn import functional as F

SIZES = {"0.5B": (896, 151_936), "8B": (4096, 128_256)}
DTYPE = torch.bfloat16


@dataclass(frozen=True)
class Batch:
    hidden_MD: Tensor
    reference_MD: Tensor
    head_VD: Tensor
    ids_M: Tensor  # on the host, -100 where not supervised
    weights_M: Tensor


def cases(quick: bool) -> list[Case]:
    sizes = (
        [("0.5B", 1024, 0.3)]
        if quick
        else [(m, t, p) for m in SIZES for t, p in ((8192, 1.0), (8192, 0.3), (1024, 0.3))]
    )
    return [
        Case(
            "linear_loss",
            {
                "model": m,
                "D": SIZES[m][0],
                "V": SIZES[m][1],
                "M": t,
                "supervised": p,
                "reference": kind,
                "dtype": str(DTYPE),
            },
            functools.partial(problem, m, kind),
            functools.partial(contenders, m, t, p, kind),
            functools.partial(truth, m, t, p, kind),
        )
        for m, t, p in sizes
        for kind in ("none", "reverse")
    ]


def draw(model: str, num_tokens: int, supervised: float) -> Batch:
    num_hidden, num_vocabulary = SIZES[model]
    rng = torch.Generator("cuda").manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=rng, device="cuda", dtype=DTYPE)

    hidden = normal(num_tokens, num_hidden)
    ids = torch.randint(num_vocabulary, (num_tokens,), generator=torch.Generator().manual_seed(0))
    ids[torch.rand(num_tokens, generator=torch.Generator().manual_seed(1)) >= supervised] = -100
    is_supervised = (ids >= 0).float()
    head = normal(num_vocabulary, num_hidden) * 3 / num_hidden**0.5
    return Batch(hidden, hidden + 0.1 * normal(num_tokens, num_hidden), head, ids, is_supervised / is_supervised.sum())


def reference_of(batch: Batch, kind: str) -> Reference | None:
    return None if kind == "none" else Reference("reverse", 0.1 * batch.weights_M, hidden_MD=batch.reference_MD)


def gradient_of(function: Callable[..., Any], batch: Batch, kind: str, **options: Any) -> Tensor:
    leaf = batch.hidden_MD.detach().requires_grad_()
    loss = function(leaf, batch.head_VD, batch.ids_M, batch.weights_M, reference_of(batch, kind), **options).loss
    return torch.autograd.grad(loss, leaf)[0]


def problem(model: str, kind: str) -> str | None:
    """Our gradient and loss on few rows are at most twice as far from float64 as eager's in bfloat16; with labels on
    the device nothing waits for it; two runs are equal."""
    batch = draw(model, 65, 0.5)
    true = float64_gradient(batch, kind)
    ours, eager = gradient_of(linear_loss, batch, kind), gradient_of(linear_loss_reference, batch, kind)
    error, limit = ((x.double() - true).abs().max() for x in (ours, eager))
    limit = 2 * limit + torch.finfo(DTYPE).eps * true.abs().max()
    if not error <= limit:
        return f"gradient: error {float(error):.3g} exceeds {float(limit):.3g}"
    if not torch.equal(ours, gradient_of(linear_loss, batch, kind)):
        return "two runs differ"
    on_device = Batch(batch.hidden_MD, batch.reference_MD, batch.head_VD, batch.ids_M.cuda(), batch.weights_M.cuda())
    torch.cuda.set_sync_debug_mode("error")
    try:
        fixed = gradient_of(linear_loss, on_device, kind, max_rows=48)
    except RuntimeError as error:
        return f"with labels on the device: {error}"
    finally:
        torch.cuda.set_sync_debug_mode("default")
    difference = float((fixed.double() - true).abs().max())
    return None if difference <= limit else f"fixed shape: gradient error {difference:.3g} exceeds {float(limit):.3g}"


def float64_gradient(batch: Batch, kind: str) -> Tensor:
    """By autograd over whole logits, some rows at a time."""
    found = torch.zeros_like(batch.hidden_MD, dtype=torch.float64)
    head = batch.head_VD.double()
    supervised = (batch.ids_M >= 0).nonzero()[:, 0]
    for rows in supervised.split(512):
        leaf = batch.hidden_MD[rows.cuda()].double().requires_grad_()
        part = Batch(leaf, batch.reference_MD[rows.cuda()].double(), head, batch.ids_M[rows], batch.weights_M[rows])
        loss = linear_loss_reference(leaf, head, part.ids_M, part.weights_M.double(), reference_of(part, kind)).loss
        found[rows.cuda()] = torch.autograd.grad(loss, leaf)[0]
    return found


def truth(model: str, num_tokens: int, supervised: float, kind: str) -> Tensor:
    return float64_gradient(draw(model, num_tokens, supervised), kind)


def contenders(
    model: str, num_tokens: int, supervised: float, kind: str
) -> tuple[list[Contender], dict[str, str]]:  # fmt: skip
    batch = draw(model, num_tokens, supervised)
    on_device = Batch(batch.hidden_MD, batch.reference_MD, batch.head_VD, batch.ids_M.cuda(), batch.weights_M.cuda())
    max_rows = int((batch.ids_M >= 0).sum())
    leaf = batch.hidden_MD.detach().requires_grad_()
    labels, rows = on_device.ids_M, (on_device.ids_M >= 0).nonzero()[:, 0]

    def hugging_face(hidden: Tensor, head: Tensor, targets: Tensor, reference: Tensor) -> Tensor:
        logp = F.linear(hidden, head).float().log_softmax(-1)
        loss = F.nll_loss(logp, targets, ignore_index=-100)
        if kind == "none":
            return loss
        with torch.no_grad():
            logq = F.linear(reference, head).float().log_softmax(-1)
        kl = (logp.exp() * (logp - logq)).sum(-1)
        return loss + 0.1 * kl[targets >= 0].mean()

    compiled = torch.compile(hugging_face)
    found = [
        Contender("ours", lambda: gradient_of(linear_loss, batch, kind)),
        Contender("ours_fixed_shape", lambda: gradient_of(linear_loss, on_device, kind, max_rows=max_rows)),
    ]
    found += [
        Contender(name, lambda f=f: torch.autograd.grad(f(leaf, batch.head_VD, labels, batch.reference_MD), leaf)[0])
        for name, f in {"eager": hugging_face, "compiled": compiled}.items()
    ]
    absent = {}
    for package, name, make in (
        ("liger_kernel", "liger", liger),
        ("trl", "trl", trl),
        ("cut_cross_entropy", "cce_exact", cut_cross_entropy),
    ):
        reason = installed(package)
        if reason:
            absent[name] = reason
        elif kind != "none" and name != "trl":
            absent[name] = "not comparable: no divergence in its head"
        else:
            found.append(Contender(name, functools.partial(peer_gradient, make, batch, leaf, labels, rows, kind)))
    return found, absent


def peer_gradient(
    make: Callable[..., Tensor], batch: Batch, leaf: Tensor, labels: Tensor, rows: Tensor, kind: str
) -> Tensor:
    return torch.autograd.grad(make(batch, leaf, labels, rows, kind), leaf)[0]


def liger(batch: Batch, leaf: Tensor, labels: Tensor, rows: Tensor, kind: str) -> Tensor:
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    return LigerFusedLinearCrossEntropyLoss()(batch.head_VD, leaf, labels)


def cut_cross_entropy(batch: Batch, leaf: Tensor, labels: Tensor, rows: Tensor, kind: str) -> Tensor:
    from cut_cross_entropy import linear_cross_entropy

    return linear_cross_entropy(leaf, batch.head_VD, labels, impl="cce", filter_eps=None)


def trl(batch: Batch, leaf: Tensor, labels: Tensor, rows: Tensor, kind: str) -> Tensor:
    """Its chunked head on the supervised rows, and its chunked divergence beside it."""
    from trl.kernels import ChunkedLogProbFunction

    logprob = ChunkedLogProbFunction.apply(leaf[rows], batch.head_VD, None, labels[rows], 1.0, 32768)[0]
    if kind == "none":
        return -logprob.mean()
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

    divergence = ChunkedDivergenceFunction.apply(
        leaf[rows], batch.head_VD, None, batch.reference_MD[rows], batch.head_VD, None, 1.0
    )[0]
    return -logprob.mean() + 0.1 * divergence.mean()
