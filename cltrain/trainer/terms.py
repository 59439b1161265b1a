"""The terms of an update's loss; each adds its own gradient and says what it measured.

    L = (1 - s) fresh + s replay + beta KL(reference || theta; anchors, fresh rows) + lambda/2 distances of dW

A row that fills several slots of a step runs once, with their joint weight; splitting a step into micro-batches
changes nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from cltrain_kernels.flat import FlatLoRA

from cltrain.models.base import Base
from cltrain.models.forward import hidden_at, predicted
from cltrain.objectives.losses import token_weights, weighted_divergence, weighted_nll
from cltrain.objectives.penalties import DeltaPenalty
from cltrain.records import Objective
from cltrain.trainer.draws import Draws
from cltrain.trainer.reference import Reference
from cltrain.trainer.streams import Streams

Measured = dict[str, float]


@dataclass(frozen=True)
class Batching:
    batch_size: int
    micro_batch: int | None
    replay_share: float


class Fresh:
    """What the window teaches, each row by its own objective; what is measured is without the coefficients.

    Each objective is a stream with its own normaliser: the mean loss of its rows in the step (of each row over its own
    tokens), times the stream's share of the step's rows and its coefficient. The share keeps a row's weight the same
    whatever it is learned by, so a principal's quota of rows bounds its part of the loss too.
    """

    name = "fresh"

    def __init__(self, draws: Draws, streams: Streams, batching: Batching) -> None:
        self.draws, self.streams, self.batching = draws, streams, batching

    def add(self, step: int) -> Measured:
        weights = _weights(self.draws, step, self.batching, "fresh")
        by_objective: dict[Objective, list[int]] = {}
        for i in sorted(weights, key=lambda i: len(self.draws.fresh[i].ids)):
            by_objective.setdefault(self.draws.fresh[i].objective, []).append(i)
        measured: Measured = {}
        for objective, indices in by_objective.items():
            share = sum(weights[i] for i in indices)
            coefficient = float(getattr(self.streams.config, objective))
            size = self.batching.micro_batch or len(indices)
            z = self.streams.reference_point(indices if objective == "kto" else (), size)
            total = 0.0
            for part in _parts(indices, size):
                loss = self.streams.loss(objective, part, [weights[i] for i in part], z)
                (coefficient * loss).backward()  # type: ignore[no-untyped-call, unused-ignore]
                total += float(loss.detach())
            measured["nll_fresh" if objective == "sft" else f"loss_{objective}"] = total / share
        return measured


class Replay:
    """What was learned before, said again."""

    name = "replay"

    def __init__(self, base: Base, model: Any, draws: Draws, batching: Batching) -> None:
        self.base, self.model, self.draws, self.batching = base, model, draws, batching

    def add(self, step: int) -> Measured:
        weights = _weights(self.draws, step, self.batching, "replay")
        order = sorted(weights, key=lambda i: len(self.draws.replay[i].ids))
        total = 0.0
        for part in _parts(order, self.batching.micro_batch):
            rows = [self.draws.replay[i] for i in part]
            weights_M = token_weights(rows, [weights[i] for i in part])
            loss = weighted_nll(self.base, hidden_at(self.model, rows), rows, weights_M)
            loss.backward()  # type: ignore[no-untyped-call, unused-ignore]
            total += float(loss.detach())
        return {"nll_replay": total / sum(weights.values())} if weights else {}


class Distill:
    """beta * KL(incumbent || theta) over the tokens that the step's fresh rows teach: new questions should go on being
    answered as before. Needs no old record (Li and Hoiem, "Learning without forgetting", 2016)."""

    name = "distill"

    def __init__(
        self, base: Base, model: Any, draws: Draws, batching: Batching, incumbent: Reference, beta: float
    ) -> None:
        self.base, self.model, self.draws, self.batching = base, model, draws, batching
        self.incumbent, self.beta = incumbent, beta

    def add(self, step: int) -> Measured:
        weights = _weights(self.draws, step, self.batching, "fresh")
        total = 0.0
        for part in _parts(sorted(weights, key=lambda i: len(self.draws.fresh[i].ids)), self.batching.micro_batch):
            rows = [self.draws.fresh[i] for i in part]
            weights_M = token_weights(rows, [weights[i] for i in part])
            hidden_MD = hidden_at(self.model, rows)
            kl = weighted_divergence(self.base, hidden_MD, self.incumbent.hidden(part), weights_M)
            (self.beta * kl).backward()  # type: ignore[no-untyped-call, unused-ignore]
            total += float(kl.detach())
        return {self.name: total / sum(weights.values())}


class Divergence:
    """beta * mean token KL(reference || theta) over the step's anchors."""

    name = "kl"

    def __init__(
        self, base: Base, model: Any, draws: Draws, reference: Reference, beta: float, size: int, micro: int | None
    ) -> None:
        self.base, self.model, self.draws, self.reference = base, model, draws, reference
        self.beta, self.size, self.micro_batch = beta, size, micro

    def add(self, step: int) -> Measured:
        chosen = self.draws.anchors(step, self.size)
        num_tokens = sum(len(predicted(self.reference.rows[i])) for i in chosen)
        total = 0.0
        for part in _parts(chosen, self.micro_batch):
            hidden_MD = hidden_at(self.model, [self.reference.rows[i] for i in part])
            weights_M = torch.ones(len(hidden_MD))
            kl = weighted_divergence(self.base, hidden_MD, self.reference.hidden(part), weights_M) / num_tokens
            (self.beta * kl).backward()  # type: ignore[no-untyped-call, unused-ignore]
            total += float(kl.detach())
        return {self.name: total}


class Penalty:
    """coefficient * a distance of the live factors' delta from where the update began."""

    def __init__(self, name: str, coefficient: float, distance: DeltaPenalty, state: FlatLoRA) -> None:
        self.name, self.coefficient, self.distance, self.state = name, coefficient, distance, state

    def add(self, step: int) -> Measured:
        return {self.name: float(self.distance(self.state.values, self.state.gradients, self.coefficient))}


Term = Fresh | Replay | Distill | Divergence | Penalty


def _weights(draws: Draws, step: int, batching: Batching, pool: str) -> dict[int, float]:
    weights: dict[int, float] = {}
    for draw in draws.batch(step, batching.batch_size, batching.replay_share):
        if draw.pool == pool:
            weights[draw.index] = weights.get(draw.index, 0.0) + 1.0 / batching.batch_size
    return weights


def _parts(indices: Sequence[int], size: int | None) -> list[Sequence[int]]:
    return [indices[i : i + (size or len(indices))] for i in range(0, len(indices), size or max(1, len(indices)))]
