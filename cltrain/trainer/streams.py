"""The fresh rows' losses: one stream per objective; every row weighs the same, whatever its length.

What an objective compares with is the adapter as the update found it: the reference of DPO and KTO and the proximal
policy, computed once before the first step, and the incumbent that sees the hint.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from cltrain.config import ObjectivesConfig
from cltrain.models.base import Base
from cltrain.models.forward import hidden_at, predicted, target_nll
from cltrain.models.scoring import last_answer
from cltrain.objectives.losses import answer_weights, token_weights, weighted_divergence, weighted_nll
from cltrain.objectives.policy import clipped
from cltrain.objectives.preference import dpo, kto, mismatched_divergence, no_divergence
from cltrain.records import Objective, TokenRow
from cltrain.trainer.reference import Reference


class Streams:
    """Losses of rows by their objective. `model` must hold the weights that the update begins with when this is made;
    `frozen` holds the incumbent's for good."""

    def __init__(self, base: Base, model: Any, frozen: Any, rows: Sequence[TokenRow], config: ObjectivesConfig) -> None:
        self.base, self.model, self.rows, self.config = base, model, rows, config
        self._before: dict[int, Tensor] = {}  # log-probs of a row's own tokens before the first step
        self._partner_before: dict[int, Tensor] = {}
        for i, row in enumerate(rows):
            if row.objective in ("dpo", "kto", "policy"):
                self._before[i] = self._frozen(row)
            if row.objective == "dpo":
                self._partner_before[i] = self._frozen(_partner(row))
        hinted = [i for i, row in enumerate(rows) if row.objective == "hindsight"]
        self._hinted = Reference(base, frozen, [_partner(rows[i]) for i in hinted])
        self._places = {i: place for place, i in enumerate(hinted)}  # of a row in it
        self._swapped = self._with_answers_of_others()

    def loss(self, objective: Objective, indices: Sequence[int], weights: Sequence[float], z: Tensor) -> Tensor:
        """sum_i weights_i * loss_i of rows that share one objective; each row's loss is a mean over its own tokens, or
        one number for its whole answer, times the mean weight of its tokens, where the objective compares answers (dpo,
        kto). `z`: see `reference_point`."""
        rows = [self.rows[i] for i in indices]
        if objective == "sft":
            return weighted_nll(self.base, self._hidden(rows), rows, token_weights(rows, weights))
        if objective in ("dpo", "kto"):
            loss_B = self._dpo(rows, indices) if objective == "dpo" else self._kto(rows, indices, z)
            return (loss_B * answer_weights(rows, weights).to(self.base.device)).sum()
        if objective == "policy":
            return (self._policy(rows, indices) * token_weights(rows, weights).to(self.base.device)).sum()
        hinted_MD = self._hinted.hidden([self._places[i] for i in indices])
        return weighted_divergence(
            self.base, self._hidden(rows), hinted_MD, token_weights(rows, weights), self.config.hindsight_kind
        )

    def reference_point(self, indices: Sequence[int], size: int) -> Tensor:
        """KTO's z0 in nats, from all of a step's kto rows (`size` of them a forward): it is one number for the step, so
        that micro-batches change nothing. 0 with fewer than two of them."""
        swapped = [self._swapped[i] for i in indices if i in self._swapped]
        if len(swapped) < 2:
            return no_divergence(torch.zeros(1, device=self.base.device))
        with torch.no_grad():
            now = [self._answers([row for row, _ in swapped[i : i + size]]) for i in range(0, len(swapped), size)]
        return mismatched_divergence(torch.cat(now), torch.stack([before for _, before in swapped]))

    def _dpo(self, rows: Sequence[TokenRow], indices: Sequence[int]) -> Tensor:
        both = [*rows, *(_partner(row) for row in rows)]
        chosen, rejected = self._answers(both).split(len(rows))
        before, partner_before = (
            torch.stack([kept[i].sum() for i in indices]) for kept in (self._before, self._partner_before)
        )
        return dpo(chosen, rejected, before, partner_before, self.config.dpo_beta)

    def _kto(self, rows: Sequence[TokenRow], indices: Sequence[int], z: Tensor) -> Tensor:
        reference_B = torch.stack([self._before[i].sum() for i in indices])
        labels_B = torch.tensor([row.value for row in rows], device=self.base.device)
        return kto(
            self._answers(rows), reference_B, labels_B, z, beta=self.config.kto_beta, desirable=1.0, undesirable=1.0
        )

    def _policy(self, rows: Sequence[TokenRow], indices: Sequence[int]) -> Tensor:
        assert all(row.behaviour is not None for row in rows)
        behaviour_M = torch.tensor([x for row in rows for x in row.behaviour or ()], device=self.base.device)
        advantages_M = torch.tensor(
            [row.value for row in rows for _ in predicted(row)], device=self.base.device, dtype=torch.float32
        )
        config = self.config
        return clipped(
            self._token_log_probs(rows), torch.cat([self._before[i] for i in indices]), behaviour_M, advantages_M,
            kind=config.policy_kind, low=config.clip_low if config.policy_kind == "ppo" else 1.0,
            high=config.clip_high, truncate=config.truncate,
        )  # fmt: skip

    def _with_answers_of_others(self) -> dict[int, tuple[TokenRow, Tensor]]:
        """Every kto row's prompt before the answer of the next one: what KTO estimates its divergence on."""
        lone = (i for i, row in enumerate(self.rows) if row.objective == "kto")
        order = sorted(lone, key=lambda i: (self.rows[i].record, self.rows[i].ids))
        found = {}
        for i, j in zip(order, order[1:] + order[:1], strict=True):
            row = _with_answer(self.rows[i], self.rows[j])
            if i != j and len(row.ids) <= self.base.context:
                found[i] = (row, self._frozen(row).sum())
        return found

    def _frozen(self, row: TokenRow) -> Tensor:
        with torch.no_grad():
            return self._token_log_probs([row])

    def _answers(self, rows: Sequence[TokenRow]) -> Tensor:
        """Summed log-prob of each row's predicted tokens, (B,)."""
        parts = self._token_log_probs(rows).split([len(predicted(row)) for row in rows])
        return torch.stack([part.sum() for part in parts])

    def _token_log_probs(self, rows: Sequence[TokenRow]) -> Tensor:
        return -target_nll(self.base, self._hidden(rows), rows)

    def _hidden(self, rows: Sequence[TokenRow]) -> Tensor:
        return hidden_at(self.model, rows)


def _partner(row: TokenRow) -> TokenRow:
    assert row.partner is not None, f"{row.objective} row {row.record} has no partner"
    return row.partner


def _with_answer(row: TokenRow, other: TokenRow) -> TokenRow:
    """The prompt of `row` before the answer of `other`."""
    prompt, answer = last_answer(row)[0], last_answer(other)[1]
    return TokenRow(
        row.record, row.stratum, row.principal, prompt + answer, (0.0,) * len(prompt) + (1.0,) * len(answer)
    )
