"""What a fixed model says on the anchors, as log-probs over the whole vocabulary, kept while they fit in memory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from cltrain.models.base import Base
from cltrain.models.forward import MAX_LOGITS, batches_of, next_log_probs, predicted
from cltrain.records import TokenRow


class Reference:
    """Log-probs of one model that does not change, computed once per update (256 MiB at most), else at each use."""

    def __init__(self, base: Base, model: Any, anchors: Sequence[TokenRow]) -> None:
        self.base, self.model, self.anchors = base, model, anchors
        self.num_tokens = sum(len(predicted(row)) for row in anchors)
        self.groups = batches_of(base, anchors)
        self._kept: dict[int, Tensor] | None = None
        if self.num_tokens * base.model.config.vocab_size <= MAX_LOGITS:
            self._kept = {}
            for group in self.groups:
                rows = [anchors[i] for i in group]
                parts = next_log_probs(base, model, rows).split([len(predicted(row)) for row in rows])
                self._kept.update(zip(group, parts, strict=True))

    def log_probs(self, indices: Sequence[int]) -> Tensor:
        """logp_MV at the predicted tokens of these anchors, in order."""
        if self._kept is None:
            return next_log_probs(self.base, self.model, [self.anchors[i] for i in indices])
        return torch.cat([self._kept[i] for i in indices])
