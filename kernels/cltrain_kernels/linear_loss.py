"""The loss head: logits of a frozen output layer, cross-entropy, divergence from a reference, entropy and log-probs, in
one pass over a chunk of rows at a time. The gradient of the hidden states is made in the forward, so no logits are
kept.

This file holds the public function and its specification; `linear_loss_chunks.py` holds the pass itself. M rows
(tokens), D hidden size, V vocabulary. The head gets no gradient on purpose: it is frozen, and an adapter on it is
refused.
"""

from __future__ import annotations

from typing import Any, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

from cltrain_kernels.dispatch import implementation_for
from cltrain_kernels.linear_loss_chunks import chunked, rows_on_device, rows_on_host
from cltrain_kernels.linear_loss_types import Divergence, LinearLoss, Reference


def linear_loss(
    hidden_MD: Tensor,
    head_VD: Tensor,
    ids_M: Tensor,
    weights_M: Tensor,
    reference: Reference | None = None,
    *,
    max_chunk_bytes: int = 256 << 20,
    max_rows: int | None = None,
) -> LinearLoss:
    """sum_m weights_m * -log p(ids_m) + sum_m reference.weights_m * divergence_m in nats, differentiable in
    `hidden_MD`.

    A row is supervised if its id is not negative and one of its weights is not 0; only such rows cost anything. Which
    they are is read on the CPU when `ids_M` and the weights lie there. When they lie on a GPU nothing is read back:
    `max_rows` says how many rows are computed (supervised ones first, the rest of them masked, all shapes fixed, so
    that a CUDA graph can hold it), and without it every row is. More supervised rows than `max_rows`, or an id beyond
    the vocabulary, raise ValueError on the CPU and make the loss NaN on a GPU.

    float16, bfloat16, float32 and float64 (which never runs Triton). At most `max_chunk_bytes` of logits exist at once,
    but always one row. Bitwise repeatable. Raises ValueError for a head that requires a gradient, for what does not
    fit, and for a batch without a supervised token where that can be seen without waiting for a GPU.
    """
    _check(hidden_MD, head_VD, ids_M, weights_M, reference)
    if not len(hidden_MD):
        raise ValueError("no supervised token: the batch has no rows")
    if max_rows is not None and max_rows < 1:
        raise ValueError(f"max_rows = {max_rows}: at least one row is needed; leave it out to size it by the batch")
    has_triton = (
        hidden_MD.dtype is not torch.float64 and implementation_for("linear_loss", hidden_MD.device) == "triton"
    )
    other_M = divergence_weights(reference, weights_M)
    is_on_host = ids_M.device.type == weights_M.device.type == other_M.device.type == "cpu"
    choose = rows_on_host if is_on_host else rows_on_device
    rows = choose(hidden_MD, len(head_VD), ids_M, weights_M, other_M, max_rows)
    return chunked(hidden_MD, head_VD, rows, reference, max_chunk_bytes, has_triton)


def linear_loss_reference(
    hidden_MD: Tensor, head_VD: Tensor, ids_M: Tensor, weights_M: Tensor, reference: Reference | None = None
) -> LinearLoss:
    """The specification of `linear_loss`, in PyTorch: every logit at once."""
    _check(hidden_MD, head_VD, ids_M, weights_M, reference)
    has_double = hidden_MD.dtype is torch.float64
    ids_M, weights_M = ids_M.to(hidden_MD.device), weights_M.to(hidden_MD.device)
    divergence_weights_M = divergence_weights(reference, weights_M).to(hidden_MD.device)
    is_supervised_M = (ids_M >= 0) & ((weights_M != 0) | (divergence_weights_M != 0))
    safe_M = ids_M.long().clamp(min=0)[:, None]

    def log_probs(logits_MV: Tensor) -> Tensor:
        return (logits_MV if has_double else logits_MV.float()).log_softmax(-1)

    def shown(values_M: Tensor) -> Tensor:
        return torch.where(is_supervised_M, values_M, 0.0)

    logp_MV = log_probs(F.linear(hidden_MD, head_VD))
    logprob_M = shown(logp_MV.gather(1, safe_M)[:, 0])
    loss = -(weights_M * logprob_M).sum()
    divergence_M = reference_logprob_M = None
    if reference is not None:
        if reference.logprob_M is not None:
            reference_logprob_M = shown(reference.logprob_M.to(logprob_M))
            logq_MV = None
        else:
            hidden = reference.hidden_MD
            logq_MV = log_probs(F.linear(hidden, head_VD) if hidden is not None else reference.logits_MV).detach()  # type: ignore[arg-type]
            reference_logprob_M = shown(logq_MV.gather(1, safe_M)[:, 0])
        if reference.divergence == "k3":
            ratio_M = reference_logprob_M - logprob_M
            divergence_M = torch.expm1(ratio_M) - ratio_M
        elif reference.divergence == "forward":
            divergence_M = shown(F.kl_div(logp_MV, logq_MV, reduction="none", log_target=True).sum(-1))  # type: ignore[arg-type]
        else:
            divergence_M = shown(F.kl_div(logq_MV, logp_MV, reduction="none", log_target=True).sum(-1))  # type: ignore[arg-type]
        loss = loss + (divergence_weights_M * divergence_M).sum()
        divergence_M = divergence_M.detach()
    entropy_M = shown(-(logp_MV.exp() * logp_MV).sum(-1)).detach()
    return LinearLoss(
        loss, is_supervised_M.sum(), logprob_M.detach(), entropy_M, divergence_M, reference_logprob_M
    )  # fmt: skip


def frozen_head(module: Any) -> Tensor:
    """The weight (V, D) of an output layer that `linear_loss` computes exactly. ValueError for one that it would get
    wrong: with an adapter, a bias, a gradient, or quantised."""
    if hasattr(module, "base_layer") or hasattr(module, "lora_A"):
        raise ValueError(
            "an adapter sits on the output layer, which the fused loss head would silently leave out: "
            "take lm_head out of the adapter's targets, or compute the logits through the module"
        )
    if getattr(module, "bias", None) is not None:
        raise ValueError("the output layer has a bias, which the fused loss head does not add: use the module's logits")
    weight: Tensor = module.weight
    if weight.ndim != 2 or not weight.is_floating_point():
        raise ValueError(f"the output layer's weight is {weight.dtype} of shape {tuple(weight.shape)}: dequantise it")
    if weight.requires_grad:
        raise ValueError(HEAD_LEARNS)
    return weight.detach()


HEAD_LEARNS = "the head requires a gradient, which linear_loss never makes: head.requires_grad_(False), or use F.linear"


def divergence_weights(reference: Reference | None, weights_M: Tensor) -> Tensor:
    """The weights of the divergence, or zeros where it is only measured or there is none."""
    if reference is None or reference.weights_M is None:
        return torch.zeros_like(weights_M)
    return reference.weights_M


def _check(
    hidden_MD: Tensor, head_VD: Tensor, ids_M: Tensor, weights_M: Tensor, reference: Reference | None
) -> None:  # fmt: skip
    if hidden_MD.ndim != 2 or head_VD.ndim != 2 or hidden_MD.shape[1] != head_VD.shape[1] or not head_VD.numel():
        raise ValueError(
            f"expected hidden states (M, D) and a head (V, D); got {tuple(hidden_MD.shape)} and {tuple(head_VD.shape)}"
        )
    if not hidden_MD.is_floating_point() or hidden_MD.dtype != head_VD.dtype or hidden_MD.device != head_VD.device:
        raise ValueError(
            f"hidden states are {hidden_MD.dtype} on {hidden_MD.device}, the head {head_VD.dtype} on {head_VD.device}: "
            "convert one of them (autocast does not reach this function)"
        )
    if head_VD.requires_grad:
        raise ValueError(HEAD_LEARNS)
    num_rows, num_hidden = hidden_MD.shape
    if ids_M.dtype not in (torch.int32, torch.int64) or not weights_M.is_floating_point():
        raise ValueError(f"expected int32 or int64 ids and float weights; got {ids_M.dtype} and {weights_M.dtype}")
    rows = {"ids_M": ids_M, "weights_M": weights_M}
    if reference is not None:
        given = {
            "reference.hidden_MD": (reference.hidden_MD, (num_rows, num_hidden)),
            "reference.logits_MV": (reference.logits_MV, (num_rows, head_VD.shape[0])),
            "reference.logprob_M": (reference.logprob_M, (num_rows,)),
        }
        found = [name for name, (tensor, _) in given.items() if tensor is not None]
        if len(found) != 1:
            raise ValueError(f"give exactly one of {', '.join(given)}; got {found or 'none'}")
        tensor, shape = given[found[0]]
        assert tensor is not None
        if tuple(tensor.shape) != shape or tensor.device != hidden_MD.device:
            raise ValueError(
                f"{found[0]} is {tuple(tensor.shape)} on {tensor.device}, not {shape} on {hidden_MD.device}"
            )
        if reference.hidden_MD is not None and reference.hidden_MD.dtype != head_VD.dtype:
            raise ValueError(f"reference.hidden_MD is {reference.hidden_MD.dtype}, the head is {head_VD.dtype}")
        if reference.logprob_M is not None and reference.divergence != "k3":
            raise ValueError(
                f"{reference.divergence} needs reference.hidden_MD or logits_MV; log-probs are enough for k3"
            )
        if reference.divergence not in get_args(Divergence):
            raise ValueError(f"divergence takes forward, reverse or k3; got {reference.divergence!r}")
        if reference.weights_M is not None:
            rows["reference.weights_M"] = reference.weights_M
    for name, tensor in rows.items():
        if tuple(tensor.shape) != (num_rows,):
            raise ValueError(f"{name} is {tuple(tensor.shape)}; the hidden states have {num_rows} rows")
        if tensor.device != hidden_MD.device and tensor.device.type != "cpu":
            raise ValueError(f"{name} is on {tensor.device}; expected the CPU or {hidden_MD.device}")
