"""The methods by name: which ways of remembering each combines, and whether it keeps to the bounds.

`bounded_replay` is the one to use; the others are its parts, alone, and the baselines that it is compared with.
"""

from __future__ import annotations

from dataclasses import dataclass

from cltrain.config import MethodName, Remember, TrainerConfig


@dataclass(frozen=True, slots=True)
class Method:
    """What distinguishes one way of updating from another."""

    remember: frozenset[Remember] = frozenset()
    is_bounded: bool = False  # shrunk until every bound holds; otherwise measured, and refused by the loop
    is_joint: bool = False  # fresh and old rows are one pool, drawn uniformly: an upper bound on clean data
    is_merged: bool = False  # each update trains a new adapter on the merged model; the sum is re-compressed by SVD


METHODS: dict[MethodName, Method] = {
    "bounded_replay": Method(frozenset({"replay", "kl"}), is_bounded=True),
    "naive": Method(),
    "replay": Method(frozenset({"replay"})),
    "kl": Method(frozenset({"kl"})),
    "ewc": Method(frozenset({"ewc"})),
    "l2sp": Method(frozenset({"l2sp"})),
    "oplora": Method(frozenset({"oplora"})),
    "agem": Method(frozenset({"agem"})),
    "ema": Method(frozenset({"ema"})),
    "distill": Method(frozenset({"distill"})),
    "joint": Method(is_joint=True),
    "merge_reset": Method(is_merged=True),
}


def method_of(trainer: TrainerConfig) -> Method:
    """The method that `trainer.method` names, with `trainer.remember` in the place of its own where that is given."""
    named = METHODS[trainer.method]
    if trainer.remember is None:
        return named
    return Method(frozenset(trainer.remember), named.is_bounded, named.is_joint, named.is_merged)
