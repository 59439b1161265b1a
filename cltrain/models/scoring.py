"""Log-probs of given tokens under the base, with or without an adapter: what proofs and filters compare."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from cltrain.models.adapter import AdapterFile, attach
from cltrain.models.base import Base
from cltrain.models.forward import batches_of, hidden_at, predicted, target_nll
from cltrain.records import TokenRow


def token_log_probs(base: Base, adapter: AdapterFile | None, rows: Sequence[TokenRow]) -> list[list[float]]:
    """Per row the log-prob (nats) of every token that carries weight, in order; None for the bare base."""
    model = base.model if adapter is None else attach(base, adapter)
    found: list[list[float]] = [[] for _ in rows]
    for batch in batches_of(base, rows):
        chosen = [rows[i] for i in batch]
        with torch.no_grad():
            values = (-target_nll(base, hidden_at(model, chosen), chosen)).tolist()
        for i in batch:
            count = len(predicted(rows[i]))
            found[i], values = values[:count], values[count:]
    return found


def last_answer(row: TokenRow) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The row's last unbroken run of weighted tokens, and everything before it: (prompt ids, completion ids)."""
    end = max(predicted(row)) + 1
    start = end
    while start > 1 and row.weights[start - 1] > 0:
        start -= 1
    return row.ids[:start], row.ids[start:end]
