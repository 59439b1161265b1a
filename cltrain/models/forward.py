"""Running rows through a model: padded on the right, logits only where a token is predicted that counts.

With causal attention no real token sees right padding, so no mask is needed and padding changes nothing. B rows, T
tokens, D hidden, M predicted positions, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from cltrain.models.base import Base
from cltrain.records import TokenRow

MAX_LOGITS = 1 << 26  # floats of logits held at once (256 MiB)


def predicted(row: TokenRow) -> list[int]:
    """Indices t >= 1 of the tokens whose prediction counts (weight > 0). The first token is never predicted."""
    return [t for t, weight in enumerate(row.weights) if t > 0 and weight > 0]


def hidden_at(base: Base, model: Any, rows: Sequence[TokenRow]) -> Tensor:
    """Final hidden states h_MD from which the predicted tokens of all rows, in order, are predicted."""
    device = base.device
    longest = max(len(row.ids) for row in rows)
    ids_BT = torch.zeros((len(rows), longest), dtype=torch.long)
    places: list[int] = []
    for i, row in enumerate(rows):
        ids_BT[i, : len(row.ids)] = torch.tensor(row.ids)
        places += [i * longest + t - 1 for t in predicted(row)]
    hidden_BTD = _backbone(model)(input_ids=ids_BT.to(device), use_cache=False).last_hidden_state
    return hidden_BTD.reshape(-1, hidden_BTD.shape[-1])[torch.tensor(places, device=device)]


def logits_of(base: Base, hidden_MD: Tensor) -> Tensor:
    """logits_MV in float32 by the base's output embedding."""
    return F.linear(hidden_MD, base.model.get_output_embeddings().weight).float()


def next_log_probs(base: Base, model: Any, rows: Sequence[TokenRow]) -> Tensor:
    """logp_MV over the whole vocabulary at every predicted position of the rows; no gradients."""
    with torch.no_grad():
        return F.log_softmax(logits_of(base, hidden_at(base, model, rows)), dim=-1)


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


def _backbone(model: Any) -> Any:
    """The decoder under a *ForCausalLM or a PeftModel around one."""
    return (model.get_base_model() if hasattr(model, "peft_config") else model).model
