"""The two terms of `bounded_replay`: likelihood of the agent's own tokens, and KL to the base on the anchors.

Both return gradients' sources, not averages of averages: the caller hands in the denominators, so that splitting a
batch into micro-batches changes nothing.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from cltrain.models.base import Base
from cltrain.models.forward import MAX_LOGITS, logits_of, predicted, token_kl
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


def weighted_nll(base: Base, hidden_MD: Tensor, rows: Sequence[TokenRow], weights_M: Tensor) -> Tensor:
    """sum_m weights_m * -log p(target_m), natural log; logits are made in pieces when M x V is large."""
    targets_M = torch.tensor([row.ids[t] for row in rows for t in predicted(row)], device=hidden_MD.device)
    weights_M = weights_M.to(hidden_MD.device)

    def piece(hidden: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
        return (F.cross_entropy(logits_of(base, hidden), targets, reduction="none") * weights).sum()

    return _in_pieces(base, piece, hidden_MD, targets_M, weights_M)


def forward_kl(base: Base, hidden_MD: Tensor, logp_MV: Tensor, weights_M: Tensor | None = None) -> Tensor:
    """sum_m weights_m * KL(p_m || q_m) in nats over the full vocabulary, q from hidden states, p given as log-probs."""
    weights_M = torch.ones(len(hidden_MD)) if weights_M is None else weights_M
    weights_M = weights_M.to(hidden_MD.device)

    def piece(hidden: Tensor, logp: Tensor, weights: Tensor) -> Tensor:
        return (token_kl(logp, F.log_softmax(logits_of(base, hidden), dim=-1)) * weights).sum()

    return _in_pieces(base, piece, hidden_MD, logp_MV, weights_M)


def _in_pieces(base: Base, function, hidden_MD: Tensor, *others: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
    size = max(1, MAX_LOGITS // int(base.model.config.vocab_size))
    if hidden_MD.shape[0] <= size:
        return function(hidden_MD, *others)
    total = hidden_MD.new_zeros((), dtype=torch.float32)
    for i in range(0, hidden_MD.shape[0], size):
        parts = [tensor[i : i + size] for tensor in (hidden_MD, *others)]
        total = total + checkpoint(function, *parts, use_reentrant=False)
    return total
