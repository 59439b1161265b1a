"""Running rows through a model: hidden states only where a token is predicted that counts, and never more logits at
once than memory is set aside for.

B rows, T tokens, D hidden, M predicted positions, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from cltrain_kernels.attention import rows_hidden
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from cltrain.errors import DataError
from cltrain.models.base import Base
from cltrain.records import TokenRow

MAX_LOGITS = 1 << 26  # floats of logits held at once (256 MiB)


def predicted(row: TokenRow) -> list[int]:
    """Indices t >= 1 of the tokens whose prediction counts (weight > 0). The first token is never predicted."""
    return [t for t, weight in enumerate(row.weights) if t > 0 and weight > 0]


def check_row(base: Base, row: TokenRow) -> None:
    """Raise DataError where the base cannot take a row or its partner, or where its objective lacks what it needs."""
    vocabulary = base.model.config.vocab_size
    for one in (row, row.partner) if row.partner else (row,):
        if len(one.ids) != len(one.weights):
            raise DataError(f"record {row.record} has {len(one.ids)} ids but {len(one.weights)} weights")
        if len(one.ids) > base.context:
            raise DataError(
                f"record {row.record} has {len(one.ids)} tokens; the base takes {base.context} (base.context)"
            )
        if any(not 0 <= token < vocabulary for token in one.ids):
            raise DataError(
                f"record {row.record} has token ids outside the base's vocabulary of {vocabulary}: another tokenizer's"
            )
    num_targets = len(predicted(row))
    num_partner = len(predicted(row.partner)) if row.partner else 0
    if row.objective in ("dpo", "hindsight") and num_targets and not num_partner:
        raise DataError(f"record {row.record} is learned by {row.objective}, but has no partner with an answer")
    if row.objective == "hindsight" and num_partner != num_targets:
        raise DataError(f"record {row.record} and its hinted self do not have the same number of targets")
    if row.objective == "policy" and (row.behaviour is None or len(row.behaviour) != num_targets):
        raise DataError(f"record {row.record} is learned by policy, but lacks a log-prob for each of its targets")


def hidden_at(model: Any, rows: Sequence[TokenRow]) -> Tensor:
    """Final hidden states h_MD from which the predicted tokens of all rows, in order, are predicted."""
    sources = [[t - 1 for t in predicted(row)] for row in rows]
    return rows_hidden(model, [row.ids for row in rows], sources)


def logits_of(base: Base, hidden_MD: Tensor) -> Tensor:
    """logits_MV in float32 by the base's output embedding."""
    return F.linear(hidden_MD, base.model.get_output_embeddings().weight).float()


def in_pieces(base: Base, function: Callable[..., Tensor], hidden_MD: Tensor, *others_M: Tensor) -> Tensor:
    """function(logits_MV, *others_M) -> values_M, with at most MAX_LOGITS floats of logits at once.

    Several pieces make their logits again for the gradient and keep none of them.
    """

    def piece(hidden: Tensor, *others: Tensor) -> Tensor:
        return function(logits_of(base, hidden), *others)

    size = max(1, MAX_LOGITS // int(base.model.config.vocab_size))
    if len(hidden_MD) <= size:
        return piece(hidden_MD, *others_M)
    parts = zip(*(tensor.split(size) for tensor in (hidden_MD, *others_M)), strict=True)
    return torch.cat([checkpoint(piece, *part, use_reentrant=False) for part in parts])


def target_nll(base: Base, hidden_MD: Tensor, rows: Sequence[TokenRow]) -> Tensor:
    """nll_M in nats of the rows' predicted tokens, in order, from `hidden_at` of the same rows."""
    targets_M = torch.tensor([row.ids[t] for row in rows for t in predicted(row)], device=hidden_MD.device)
    return in_pieces(
        base, lambda logits_MV, ids_M: F.cross_entropy(logits_MV, ids_M, reduction="none"), hidden_MD, targets_M
    )


def next_log_probs(base: Base, model: Any, rows: Sequence[TokenRow]) -> Tensor:
    """logp_MV over the whole vocabulary at every predicted position of the rows; no gradients."""
    with torch.no_grad():
        return F.log_softmax(logits_of(base, hidden_at(model, rows)), dim=-1)


def token_kl(logp_MV: Tensor, logq_MV: Tensor) -> Tensor:
    """Forward KL(p || q) per position, kl_M in nats, over the whole vocabulary."""
    return F.kl_div(logq_MV, logp_MV, reduction="none", log_target=True).sum(-1)


def batches_of(base: Base, rows: Sequence[TokenRow], num_rows: int = 16) -> list[list[int]]:
    """Row indices in groups of similar length, few enough that a group's logits stay under MAX_LOGITS floats."""
    vocabulary = base.model.config.vocab_size
    groups: list[list[int]] = []
    size = 0
    for i in sorted(range(len(rows)), key=lambda i: (len(rows[i].ids), i)):
        cost = len(rows[i].ids) * vocabulary
        if not groups or len(groups[-1]) == num_rows or size + cost > MAX_LOGITS:
            groups.append([])
            size = 0
        groups[-1].append(i)
        size += cost
    return groups
