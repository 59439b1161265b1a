"""The training loop: gradients of the terms, clipping, Adam, checkpoints. The base is never written to."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from cltrain.config import TrainerConfig
from cltrain.errors import DataError
from cltrain.models.adapter import Factors, snapshot
from cltrain.trainer import checkpoint as checkpoints
from cltrain.trainer.recipe import Recipe, guarded_step
from cltrain.trainer.terms import Measured, Term, norm_of

OnStep = Callable[[int, dict[str, float]], None]


class UpdateDiscarded(DataError):
    """This update cannot become a candidate; the incumbent stays. The message is the reason."""


def train(
    recipe: Recipe,
    live: Factors,
    trainer: TrainerConfig,
    num_steps: int,
    max_grad_norm: float,
    fingerprint: str,
    work_dir: Path,
    on_step: OnStep,
) -> tuple[Factors, list[Measured]]:
    """Take `num_steps` steps with the live factors; returns a copy of them and what each step measured.

    Continues from `work_dir`'s checkpoint if it was made from the same inputs. Raises UpdateDiscarded at the first loss
    or gradient that is not finite, or a gradient norm above `max_grad_norm` before clipping.
    """
    parameters = [factor for pair in live.values() for factor in pair]
    adam = torch.optim.Adam(parameters, lr=trainer.lr)  # no decay: shrinking A and B apart has no meaning for B A
    resumed = checkpoints.load(work_dir, fingerprint)
    history = _restore(adam, parameters, resumed) if resumed else []
    for step in range(len(history), num_steps):
        guarding = _gradient_of(recipe.guard, parameters, step)[1] if recipe.guard else None
        measured = _set_gradients(recipe, parameters, step)
        for name, value in measured.items():
            if not math.isfinite(value):
                raise UpdateDiscarded(f"{name} is {value} at step {step}: the update is discarded, the incumbent stays")
        if measured["grad_norm"] > max_grad_norm:
            raise UpdateDiscarded(
                f"the gradient norm is {measured['grad_norm']:.3g} at step {step}, above health.max_grad_norm"
            )
        torch.nn.utils.clip_grad_norm_(parameters, trainer.max_grad_norm)
        adam.param_groups[0]["lr"] = trainer.lr * lr_share(step, trainer, num_steps)
        guarded_step(adam, parameters, guarding)
        for project in recipe.projections:
            project()
        history.append(measured)
        if (step + 1) % trainer.checkpoint_every == 0 or step + 1 == num_steps:
            checkpoints.save(work_dir, fingerprint, _capture(adam, parameters, history))
        on_step(step, dict(measured))
    return snapshot(live), history


def lr_share(step: int, trainer: TrainerConfig, num_steps: int) -> float:
    """The part of trainer.lr that step 0, 1, ... uses: up over the warm-up, then linearly down to `final_lr_share`."""
    warmup, last = trainer.warmup_steps, num_steps - 1
    if step < warmup:
        return (step + 1) / (warmup + 1)
    left = (last - step) / (last - warmup) if last > warmup else 0.0
    return trainer.final_lr_share + (1 - trainer.final_lr_share) * left


def _set_gradients(recipe: Recipe, parameters: Sequence[Tensor], step: int) -> Measured:
    """Leave the sum of the terms' gradients in .grad; what each term measured, with the norms of its gradient and of
    the sum. Each is taken alone: the norm of a small one would drown in a difference of sums."""
    measured: Measured = {}
    total = [torch.zeros_like(parameter) for parameter in parameters]
    for term in recipe.terms:
        found, gradient = _gradient_of(term, parameters, step)
        if found:
            measured |= {**found, f"grad_norm_{term.name}": norm_of(gradient)}
        total = [one + other for one, other in zip(total, gradient, strict=True)]
    for parameter, gradient_of_all in zip(parameters, total, strict=True):
        parameter.grad = gradient_of_all
    return {**measured, "grad_norm": norm_of(total)}


def _gradient_of(term: Term, parameters: Sequence[Tensor], step: int) -> tuple[Measured, list[Tensor]]:
    for parameter in parameters:
        parameter.grad = None
    found = term.add(step)
    return found, [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]


def _capture(adam: torch.optim.Adam, parameters: Sequence[Tensor], history: list[Measured]) -> checkpoints.Checkpoint:
    tensors: dict[str, Tensor] = {}
    for i, parameter in enumerate(parameters):
        state = adam.state[parameter]
        tensors[f"value/{i}"] = parameter.detach().cpu().contiguous()
        tensors[f"mean/{i}"] = state["exp_avg"].cpu().contiguous()
        tensors[f"square/{i}"] = state["exp_avg_sq"].cpu().contiguous()
    return checkpoints.Checkpoint(len(history), tensors, history)


def _restore(
    adam: torch.optim.Adam, parameters: Sequence[Tensor], saved: checkpoints.Checkpoint
) -> list[dict[str, float]]:
    for i, parameter in enumerate(parameters):
        with torch.no_grad():
            parameter.copy_(saved.tensors[f"value/{i}"])
        adam.state[parameter] = {
            "step": torch.tensor(float(saved.step)),
            "exp_avg": saved.tensors[f"mean/{i}"].to(parameter.device),
            "exp_avg_sq": saved.tensors[f"square/{i}"].to(parameter.device),
        }
    return list(saved.history)
