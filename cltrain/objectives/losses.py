"""Likelihood of the agent's own tokens, and distance from what a teacher says at the same places, such as the base on
the anchors.

Both return gradients' sources, not averages of averages: the caller hands in the denominators, so that splitting a
batch into micro-batches changes nothing.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from cltrain_kernels import Reference, frozen_head, linear_loss
from torch import Tensor
from torch.nn import functional as F

from cltrain.models import forward
from cltrain.models.base import Base
from cltrain.models.forward import in_pieces, logits_of, predicted
from cltrain.objectives.distill import Kind, divergence
from cltrain.records import TokenRow


def token_weights(rows: Sequence[TokenRow], row_weights: Sequence[float]) -> Tensor:
    """weights_M over the predicted tokens: a row's weight times its token weights over its number of targets.

    Rows, not tokens, count equally: a long episode is worth no more than a short one, and a principal's share of an
    update is its share of the rows.
    """
    weights: list[float] = []
    for row, row_weight in zip(rows, row_weights, strict=True):
        targets = predicted(row)
        weights += [row_weight * row.weights[t] / len(targets) for t in targets]
    return torch.tensor(weights)


def answer_weights(rows: Sequence[TokenRow], row_weights: Sequence[float]) -> Tensor:
    """weights_B for a loss of whole answers: the same with the mean of a row's token weights, so that a row counts as
    much as it would by its tokens. Within an answer judged as a whole, weights only say which tokens are its own."""
    means = [sum(row.weights[t] for t in predicted(row)) / len(predicted(row)) for row in rows]
    return torch.tensor([weight * mean for weight, mean in zip(row_weights, means, strict=True)])


def weighted_nll(base: Base, hidden_MD: Tensor, rows: Sequence[TokenRow], weights_M: Tensor) -> Tensor:
    """sum_m weights_m * -log p(target_m), natural log."""
    targets_M = torch.tensor([row.ids[t] for row in rows for t in predicted(row)], dtype=torch.long)
    return _fused(base, hidden_MD, targets_M, weights_M, None)


def weighted_divergence(
    base: Base, hidden_MD: Tensor, teacher_MD: Tensor, weights_M: Tensor, kind: Kind = "forward"
) -> Tensor:
    """sum_m weights_m * divergence_m of `kind` (see `distill`) in nats over the full vocabulary, from the final hidden
    states of student and teacher. Only the student gets a gradient."""
    if kind != "jsd":
        nothing_M = torch.zeros_like(weights_M)
        return _fused(base, hidden_MD, nothing_M.long(), nothing_M, Reference(kind, weights_M, hidden_MD=teacher_MD))

    def function(logits_MV: Tensor, teacher: Tensor) -> Tensor:
        logp_MV = F.log_softmax(logits_of(base, teacher), dim=-1)
        return divergence(logp_MV, F.log_softmax(logits_MV, dim=-1), kind)

    return (in_pieces(base, function, hidden_MD, teacher_MD) * weights_M.to(hidden_MD.device)).sum()


def _fused(
    base: Base, hidden_MD: Tensor, targets_M: Tensor, weights_M: Tensor, reference: Reference | None
) -> Tensor:  # fmt: skip
    """`linear_loss` under the base's output layer; 0 where nothing has a weight."""
    if not (weights_M if reference is None or reference.weights_M is None else reference.weights_M).any():
        return hidden_MD.sum() * 0.0
    head_VD = frozen_head(base.model.get_output_embeddings())
    max_bytes = 4 * forward.MAX_LOGITS
    return linear_loss(hidden_MD, head_VD, targets_M, weights_M, reference, max_chunk_bytes=max_bytes).loss
