"""The training loop: gradients of the terms, clipping, Adam, checkpoints, all on flat buffers of the factors. The base
is never written to. S elements of a buffer."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import torch
from cltrain_kernels.adamw import AdamW, adamw_step
from cltrain_kernels.flat import FlatLoRA
from torch import Tensor

from cltrain.config import TrainerConfig
from cltrain.errors import DataError
from cltrain.objectives.projections import agem
from cltrain.trainer import checkpoint as checkpoints
from cltrain.trainer.recipe import Recipe
from cltrain.trainer.terms import Fresh, Measured, Replay

TEACHING = (Fresh.name, Replay.name)
NO_GRADIENT = 1e-8  # Adam's eps: less than that moves nothing by itself
OnStep = Callable[[int, dict[str, float]], None]


class UpdateDiscarded(DataError):
    """This update cannot become a candidate; the incumbent stays. The message is the reason."""


def train(
    recipe: Recipe,
    state: FlatLoRA,
    trainer: TrainerConfig,
    num_steps: int,
    max_grad_norm: float,
    fingerprint: str,
    work_dir: Path,
    on_step: OnStep,
) -> list[Measured]:
    """Take `num_steps` steps with the live factors in `state`; returns what each step measured.

    Continues from `work_dir`'s checkpoint if it was made from the same inputs. Raises UpdateDiscarded at the first loss
    or gradient that is not finite, or a gradient norm above `max_grad_norm` before clipping.
    """
    adam = AdamW(max_norm=trainer.max_grad_norm)  # no decay: shrinking A and B apart has no meaning for B A
    resumed = checkpoints.load(work_dir, fingerprint)
    history = _restore(state, resumed) if resumed else []
    for step, measured in enumerate(history):
        _require_sound(measured, step, max_grad_norm)
    for step in range(len(history), num_steps):
        guarding_S = _gradient_of_guard(recipe, state, step)
        measured = _set_gradients(recipe, state, step)
        _require_sound(measured, step, max_grad_norm)
        if _teaches(measured):
            rates_2 = state.values.new_full((2,), trainer.lr * lr_share(step, trainer, num_steps))
            before_S = state.values.clone() if guarding_S is not None else None
            adamw_step(state, rates_2, adam)
            if before_S is not None and guarding_S is not None:
                state.values.copy_(before_S + agem(state.values - before_S, guarding_S))
        for project in recipe.projections:
            project()
        history.append(measured)
        if (step + 1) % trainer.checkpoint_every == 0 or step + 1 == num_steps:
            tensors = {name: buffer.cpu() for name, buffer in _buffers(state).items()}
            checkpoints.save(work_dir, fingerprint, checkpoints.Checkpoint(len(history), tensors, history))
        on_step(step, dict(measured))
    return history


def _require_sound(measured: Measured, step: int, max_grad_norm: float) -> None:
    for name, value in measured.items():
        if not math.isfinite(value):
            raise UpdateDiscarded(f"{name} is {value} at step {step}: the update is discarded, the incumbent stays")
    if measured["grad_norm"] > max_grad_norm:
        raise UpdateDiscarded(
            f"the gradient norm is {measured['grad_norm']:.3g} at step {step}, above health.max_grad_norm"
        )


def _teaches(measured: Measured) -> bool:
    """Whether the step's rows have a gradient at all. Where they have none (answers all as good as the baseline), what
    is left is the rounding of terms that hold back, and Adam would make whole steps of it."""
    return max(measured.get(f"grad_norm_{term}", 0.0) for term in TEACHING) > NO_GRADIENT


def lr_share(step: int, trainer: TrainerConfig, num_steps: int) -> float:
    """The part of trainer.lr that step 0, 1, ... uses: up over the warm-up, then linearly down to `final_lr_share`."""
    warmup, last = trainer.warmup_steps, num_steps - 1
    if step < warmup:
        return (step + 1) / (warmup + 1)
    left = (last - step) / (last - warmup) if last > warmup else 0.0
    return trainer.final_lr_share + (1 - trainer.final_lr_share) * left


def _set_gradients(recipe: Recipe, state: FlatLoRA, step: int) -> Measured:
    """Leave the sum of the terms' gradients in `state`; what each term measured, with the norms of its gradient and of
    the sum. Each is taken alone: the norm of a small one would drown in a difference of sums."""
    measured: Measured = {}
    total_S = torch.zeros_like(state.gradients)
    for term in recipe.terms:
        state.zero_gradients()
        if found := term.add(step):
            measured |= {**found, f"grad_norm_{term.name}": _norm_of(state.gradients)}
        total_S += state.gradients
    state.check()
    state.gradients.copy_(total_S)
    return {**measured, "grad_norm": _norm_of(total_S)}


def _gradient_of_guard(recipe: Recipe, state: FlatLoRA, step: int) -> Tensor | None:
    if recipe.guard is None:
        return None
    state.zero_gradients()
    recipe.guard.add(step)
    return state.gradients.clone()


def _norm_of(gradient_S: Tensor) -> float:
    return float(torch.linalg.vector_norm(gradient_S))


def _buffers(state: FlatLoRA) -> dict[str, Tensor]:
    """All that the next step depends on, but for the count, which is the checkpoint's own."""
    return {"values": state.values, "means": state.means, "squares": state.squares}


def _restore(state: FlatLoRA, saved: checkpoints.Checkpoint) -> list[Measured]:
    for name, buffer in _buffers(state).items():
        buffer.copy_(saved.tensors[name])
    state.num_steps.fill_(saved.step)
    return list(saved.history)
