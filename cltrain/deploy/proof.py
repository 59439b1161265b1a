"""Proof that the adapter which answers under a name is the one that was approved. Imports no torch.

The trainer's own log-probs for a few probes are compared with the server's; the incumbent's say what a server that
kept answering with the old weights would have given.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from cltrain.errors import ServerError

Probe = tuple[Sequence[int], Sequence[int]]  # prompt ids, completion ids


class Scorer(Protocol):
    def score_many(self, model: str, pairs: Sequence[Probe]) -> list[list[float]]: ...


class NotProvedError(ServerError):
    """The server answers with other weights than the approved ones."""


@dataclass(frozen=True, slots=True)
class Proof:
    """`proved`: only the approved adapter fits. `indistinguishable`: here the incumbent would fit as well."""

    verdict: Literal["proved", "indistinguishable"]
    max_error: float  # nats, the largest distance of a served log-prob from the expected one
    separation: float  # nats, the largest distance between expected and incumbent


def prove(
    client: Scorer,
    release: str,
    incumbent: str,
    probes: Sequence[Probe],
    expected_logprobs: Sequence[Sequence[float]],
    incumbent_logprobs: Sequence[Sequence[float]],
    noise: float,
) -> Proof:
    """Score the probes as `release` on the server and compare, token by token.

    `noise` in nats is how far the same weights may differ between trainer and server (1e-3 in float32). Raises
    NotProvedError when the served log-probs are not the expected ones, naming the incumbent when it is what answers.
    """
    served = client.score_many(release, probes)
    max_error = distance(served, expected_logprobs)
    separation = distance(expected_logprobs, incumbent_logprobs)
    if not max_error <= noise:
        from_incumbent = distance(served, incumbent_logprobs)
        who = f"it is {incumbent} that answers" if from_incumbent <= noise else "neither it nor the incumbent fits"
        raise NotProvedError(
            f"{release} is not proved: the server's log-probs are up to {max_error:.3g} nats from the trainer's "
            f"(allowed {noise:.3g}); {who} (distance {from_incumbent:.3g})"
        )
    return Proof("proved" if separation > 2 * noise else "indistinguishable", max_error, separation)


def distance(left: Sequence[Sequence[float]], right: Sequence[Sequence[float]]) -> float:
    """The largest difference; NaN anywhere is infinitely far."""
    pairs = [(a, b) for one, other in zip(left, right, strict=True) for a, b in zip(one, other, strict=True)]
    if not pairs:
        raise ServerError("a proof needs at least one scored token")
    return max((float("inf") if a != a or b != b else abs(a - b)) for a, b in pairs)
