"""What a fixed model says on given rows: final hidden states, kept while they fit in memory, and logits from them.

Hidden states take D floats a token where log-probs take V, so a large vocabulary costs no more to remember.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from cltrain.models.base import Base
from cltrain.models.forward import batches_of, hidden_at, logits_of, predicted
from cltrain.records import TokenRow

MAX_KEPT = 1 << 26  # floats (256 MiB)


class Reference:
    """Log-probs of one model that does not change, at the predicted tokens of rows, over the whole vocabulary."""

    def __init__(self, base: Base, model: Any, rows: Sequence[TokenRow]) -> None:
        self.base, self.model, self.rows = base, model, rows
        self.num_tokens = sum(len(predicted(row)) for row in rows)
        self.groups = batches_of(base, rows)
        self._kept: dict[int, Tensor] | None = None  # hidden_MD of each row
        if self.num_tokens * base.model.config.hidden_size <= MAX_KEPT:
            self._kept = {}
            for group in self.groups:
                chosen = [rows[i] for i in group]
                parts = self._hidden(chosen).split([len(predicted(row)) for row in chosen])
                self._kept.update(zip(group, parts, strict=True))

    def hidden(self, indices: Sequence[int]) -> Tensor:
        """hidden_MD from which the predicted tokens of these rows, in order, are predicted."""
        if self._kept is None:
            return self._hidden([self.rows[i] for i in indices])
        return torch.cat([self._kept[i] for i in indices])

    def log_probs(self, indices: Sequence[int]) -> Tensor:
        """logp_MV at the predicted tokens of these rows, in order."""
        with torch.no_grad():
            return F.log_softmax(logits_of(self.base, self.hidden(indices)), dim=-1)

    def _hidden(self, rows: Sequence[TokenRow]) -> Tensor:
        with torch.no_grad():
            return hidden_at(self.model, rows)
