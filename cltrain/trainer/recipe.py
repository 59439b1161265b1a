"""A method made concrete for one update: its terms, what guards its steps, what it does after each of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import chain
from typing import Any

from cltrain_kernels.flat import FlatLoRA
from cltrain_kernels.grams import keep_within

from cltrain.config import TrainerConfig
from cltrain.models.adapter import AdapterFile
from cltrain.models.base import Base
from cltrain.objectives.fisher import relative_to_base
from cltrain.objectives.penalties import ewc, l2sp
from cltrain.objectives.projections import keep_out, top_subspaces
from cltrain.records import Read, TokenRow
from cltrain.trainer.draws import Draws
from cltrain.trainer.memory import Memory
from cltrain.trainer.methods import Method
from cltrain.trainer.reference import Reference
from cltrain.trainer.streams import Streams
from cltrain.trainer.terms import Batching, Distill, Divergence, Fresh, Penalty, Replay, Term


@dataclass(frozen=True)
class Recipe:
    """What one update's steps are made of."""

    terms: tuple[Term, ...]
    guard: Replay | None  # agem: steps that would raise this loss lose the part that does
    projections: tuple[Callable[[], object], ...]  # after every step
    draws: Draws
    fresh: Batching
    old: Batching

    def drawn(self, step: int) -> tuple[list[TokenRow], list[TokenRow]]:
        """The fresh and the replayed rows of a step, one for each slot and in order."""
        fresh, old = (
            self.draws.batch(step, batching.batch_size, batching.replay_share) for batching in (self.fresh, self.old)
        )
        return (
            [self.draws.fresh[draw.index] for draw in fresh if draw.pool == "fresh"],
            [self.draws.replay[draw.index] for draw in old if draw.pool == "replay"],
        )

    def reads(self, num_steps: int) -> list[Read]:
        """Which record filled which slot of which step, in order."""
        return [
            Read(step, slot, row.record)
            for step in range(num_steps)
            for slot, row in enumerate(chain(*self.drawn(step)))
        ]


def make_recipe(
    base: Base,
    model: Any,
    frozen: Any,
    state: FlatLoRA,
    start: AdapterFile,
    incumbent: AdapterFile | None,
    draws: Draws,
    of_base: Reference,
    method: Method,
    trainer: TrainerConfig,
    memory: Memory,
    norms: Mapping[str, float],
    radii: Mapping[str, float] | None,
    least: float,
) -> Recipe:
    """Assemble a method's terms over `model`, which must still hold the weights that the update begins with (of which
    the projections take away what they forbid) in `state`; `frozen` holds the incumbent's for good; `norms` are
    the base matrices'. For `radii` and `least` see `within_ball`."""
    remember, layout, device = method.remember, state.layout, state.values.device
    projections: list[Callable[[], object]] = []
    if "oplora" in remember:
        subspaces = top_subspaces(base, list(start.factors), trainer.oplora_rank)
        projections.append(lambda: keep_out(state.factors(), subspaces))
    if radii is not None and not method.is_merged:  # on a merged model, the live delta is not the whole
        radii_M = layout.table(radii).to(device)
        projections.append(lambda: keep_within(layout, state.values, radii_M, start.scale, least))
    for project in projections:
        project()
    rehearses = "replay" in remember and bool(draws.replay)
    guards = "agem" in remember and bool(draws.replay)
    share = trainer.replay_share if rehearses else 0.0
    batching = Batching(trainer.batch_size, trainer.micro_batch, share)
    old = (
        batching if rehearses or not guards else Batching(trainer.batch_size, trainer.micro_batch, trainer.replay_share)
    )
    terms: list[Term] = [Fresh(draws, Streams(base, model, frozen, draws.fresh, trainer.objectives), batching)]
    if rehearses:
        terms.append(Replay(base, model, draws, batching))
    if "distill" in remember and trainer.distill_beta > 0:
        told = Reference(base, frozen, draws.fresh)
        terms.append(Distill(base, model, draws, batching, told, trainer.distill_beta))
    if "kl" in remember and trainer.kl_beta > 0:
        reference = of_base if trainer.kl_to == "base" else Reference(base, frozen, of_base.rows)
        terms.append(Divergence(base, model, draws, reference, trainer.kl_beta, trainer.kl_batch, trainer.micro_batch))
    before = None if method.is_merged else incumbent  # on a merged model, the live delta itself is the distance
    if "l2sp" in remember and trainer.l2sp_lambda > 0:
        terms.append(Penalty("l2sp", trainer.l2sp_lambda, l2sp(layout, start.scale, before, norms, device), state))
    if "ewc" in remember and memory.fisher is not None and trainer.ewc_lambda > 0:
        fisher = relative_to_base(memory.fisher, norms)
        terms.append(Penalty("ewc", trainer.ewc_lambda, ewc(layout, start.scale, before, fisher, device), state))
    guard = Replay(base, model, draws, old) if guards else None
    return Recipe(tuple(terms), guard, tuple(projections), draws, batching, old)
