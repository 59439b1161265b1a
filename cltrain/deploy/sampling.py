"""From logits to tokens: greedy, or temperature with top-k and top-p from the row's own seeded generator."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Sampling:
    """How one row is answered. Log-probs are those of the model, before temperature, as in vLLM."""

    max_tokens: int
    temperature: float = 0.0  # 0: greedy
    top_p: float = 1.0
    top_k: int = 0  # 0: all
    seed: int | None = None
    ignore_eos: bool = False
    num_top: int = 0  # alternatives reported with every token
    num_prompt_top: int | None = None  # None: the prompt is not scored; 0: only its own tokens


@dataclass(frozen=True, slots=True)
class Token:
    """One token that was chosen or scored. `rank` is 1 for the likeliest."""

    id: int
    logprob: float
    rank: int | None = None
    top: tuple[tuple[int, float], ...] = ()


def choose(logits_BV: Tensor, rows: Sequence[tuple[Sampling, random.Random]]) -> list[Token]:
    """One token per row. A row whose logits are NaN gets a NaN log-prob: the caller ends it."""
    logprobs_BV = torch.log_softmax(logits_BV.float(), dim=-1)
    ids_B = logprobs_BV.argmax(dim=-1)
    for index, (sampling, generator) in enumerate(rows):
        if sampling.temperature > 0:
            ids_B[index] = _draw(logprobs_BV[index], sampling, generator.random())
    chosen_B = logprobs_BV.gather(1, ids_B[:, None])[:, 0]
    ids, chosen = ids_B.tolist(), chosen_B.tolist()
    return [
        Token(ids[index], chosen[index], top=_top(logprobs_BV[index], sampling.num_top))
        for index, (sampling, _) in enumerate(rows)
    ]


def score(logits_TV: Tensor, ids: Sequence[int], num_top: int) -> list[Token]:
    """What the model thought of given tokens: logits_TV[t] is its prediction of ids[t]."""
    logprobs_TV = torch.log_softmax(logits_TV.float(), dim=-1)
    index_T1 = torch.tensor(ids, device=logits_TV.device)[:, None]
    chosen_T1 = logprobs_TV.gather(1, index_T1)
    ranks = (logprobs_TV > chosen_T1).sum(dim=-1).add_(1).tolist()
    chosen = chosen_T1[:, 0].tolist()
    return [Token(ids[t], chosen[t], ranks[t], _top(logprobs_TV[t], num_top)) for t in range(len(ids))]


def _top(logprobs_V: Tensor, count: int) -> tuple[tuple[int, float], ...]:
    if not count:
        return ()
    values, ids = logprobs_V.topk(min(count, logprobs_V.shape[0]))
    return tuple(zip(ids.tolist(), values.tolist(), strict=True))


def _draw(logprobs_V: Tensor, sampling: Sampling, uniform: float) -> int:
    """Inverse transform over tokens sorted by probability: one uniform number per token, so a seed repeats exactly."""
    if not torch.isfinite(logprobs_V).any():
        return 0
    probs_V, order_V = torch.softmax(logprobs_V.double() / sampling.temperature, dim=-1).sort(
        descending=True, stable=True
    )
    if sampling.top_k:
        probs_V[sampling.top_k :] = 0
    before_V = probs_V.cumsum(0) - probs_V
    probs_V[before_V >= sampling.top_p * probs_V.sum()] = 0
    sums_V = probs_V.cumsum(0)
    place = int(torch.searchsorted(sums_V, uniform * sums_V[-1], right=True))
    return int(order_V[min(place, int((probs_V > 0).sum()) - 1)])
