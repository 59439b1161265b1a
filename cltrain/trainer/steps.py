"""The training loop: gradients of the two terms, clipping, Adam, checkpoints. The base is never written to.

    L = (1 - s) NLL(fresh) + s NLL(replay) + beta KL(base || theta; anchors),   s = trainer.replay_share

`naive` is NLL(fresh) alone.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cltrain.config import TrainerConfig
from cltrain.errors import DataError
from cltrain.models.adapter import AdapterFile, Factors, attach, parameters_of, snapshot
from cltrain.models.base import Base
from cltrain.models.forward import hidden_at, predicted
from cltrain.objectives.losses import forward_kl, token_weights, weighted_nll
from cltrain.records import Read, TokenRow
from cltrain.trainer import checkpoint as checkpoints
from cltrain.trainer.draws import Draw, Draws
from cltrain.trainer.reference import Reference

OnStep = Callable[[int, dict[str, float]], None]


class UpdateDiscarded(DataError):
    """This update cannot become a candidate; the incumbent stays. The message is the reason."""


def train(
    base: Base,
    start: AdapterFile,
    fresh: Sequence[TokenRow],
    replay: Sequence[TokenRow],
    anchors: Sequence[TokenRow],
    reference: Reference | None,
    trainer: TrainerConfig,
    seed: int,
    work_dir: Path,
    on_step: OnStep,
) -> tuple[AdapterFile, list[dict[str, float]], list[Read]]:
    """Train from `start`; returns the trained adapter, what each step measured, and which record filled each slot.

    `reference` None leaves the KL term out. Continues from `work_dir`'s checkpoint if it was made from the same inputs.
    Raises UpdateDiscarded at the first loss or gradient that is not finite.
    """
    is_bounded = reference is not None
    model = attach(base, start)
    live = parameters_of(model, start)
    parameters = [factor for pair in live.values() for factor in pair]
    adam = torch.optim.Adam(parameters, lr=trainer.lr)  # no decay: shrinking A and B apart has no meaning for B A
    draws = Draws(seed, fresh, replay if is_bounded else (), len(anchors))
    fingerprint = _fingerprint(base, start, fresh, replay, anchors, trainer, seed)
    resumed = checkpoints.load(work_dir, fingerprint)
    history = _restore(adam, parameters, resumed) if resumed else []
    for step in range(len(history), trainer.num_steps):
        batch = draws.batch(step, trainer.batch_size, trainer.replay_share)
        adam.zero_grad(set_to_none=True)
        measured = add_likelihood(base, model, draws, batch, trainer.micro_batch)
        measured["grad_norm_nll"] = norm_of(parameters)
        if reference is not None and trainer.kl_beta > 0:
            before = [parameter.grad.clone() for parameter in parameters if parameter.grad is not None]
            chosen = draws.anchors(step, trainer.kl_batch)
            measured["kl"] = add_divergence(base, model, reference, chosen, trainer.kl_beta, trainer.micro_batch)
            measured["grad_norm_kl"] = norm_of(parameters, before)
        measured["grad_norm"] = norm_of(parameters)
        for name, value in measured.items():
            if not math.isfinite(value):
                raise UpdateDiscarded(f"{name} is {value} at step {step}: the update is discarded, the incumbent stays")
        torch.nn.utils.clip_grad_norm_(parameters, trainer.max_grad_norm)
        adam.param_groups[0]["lr"] = trainer.lr * lr_share(step, trainer)
        adam.step()
        history.append(measured)
        if (step + 1) % trainer.checkpoint_every == 0 or step + 1 == trainer.num_steps:
            checkpoints.save(work_dir, fingerprint, _capture(adam, parameters, history))
        on_step(step, dict(measured))
    reads = [
        draws.read_of(step, draw)
        for step in range(trainer.num_steps)
        for draw in draws.batch(step, trainer.batch_size, trainer.replay_share)
    ]
    return start.with_factors(snapshot(live)), history, reads


def lr_share(step: int, trainer: TrainerConfig) -> float:
    """The part of trainer.lr that step 0, 1, ... uses: up over the warm-up, then linearly down to `final_lr_share`."""
    warmup, last = trainer.warmup_steps, trainer.num_steps - 1
    if step < warmup:
        return (step + 1) / (warmup + 1)
    left = (last - step) / (last - warmup) if last > warmup else 0.0
    return trainer.final_lr_share + (1 - trainer.final_lr_share) * left


def add_likelihood(
    base: Base, model: Any, draws: Draws, batch: Sequence[Draw], micro_batch: int | None
) -> dict[str, float]:
    """Backward of the likelihood term; returns the mean per-row NLL (nats per token) of each pool.

    Each pool weighs its share of the slots and a row that fills several slots runs once, with their joint weight.
    """
    weights: dict[tuple[str, int], float] = {}
    for draw in batch:
        key = (draw.pool, draw.index)
        weights[key] = weights.get(key, 0.0) + 1.0 / len(batch)
    sums = dict.fromkeys(dict.fromkeys(draw.pool for draw in batch), 0.0)
    shares = {pool: sum(w for (p, _), w in weights.items() if p == pool) for pool in sums}
    pools = {"fresh": draws.fresh, "replay": draws.replay}
    for pool in sums:
        chosen = [(pools[pool][i], weight) for (p, i), weight in weights.items() if p == pool]
        chosen.sort(key=lambda pair: len(pair[0].ids))
        size = micro_batch or len(chosen)
        for i in range(0, len(chosen), size):
            rows, row_weights = zip(*chosen[i : i + size], strict=True)
            loss = weighted_nll(base, hidden_at(base, model, rows), rows, token_weights(rows, row_weights))
            loss.backward()
            sums[pool] += float(loss.detach())
    return {f"nll_{pool}": value / shares[pool] for pool, value in sums.items()}


def add_divergence(
    base: Base, model: Any, reference: Reference, chosen: Sequence[int], beta: float, micro_batch: int | None
) -> float:
    """Backward of beta * mean KL(base || model) per token over the chosen anchors; returns the mean KL in nats."""
    num_tokens = sum(len(predicted(reference.anchors[i])) for i in chosen)
    size = micro_batch or len(chosen)
    total = 0.0
    for i in range(0, len(chosen), size):
        part = chosen[i : i + size]
        hidden_MD = hidden_at(base, model, [reference.anchors[j] for j in part])
        kl = forward_kl(base, hidden_MD, reference.log_probs(part)) / num_tokens
        (beta * kl).backward()  # type: ignore[no-untyped-call, unused-ignore]
        total += float(kl.detach())
    return total


def norm_of(parameters: Sequence[Tensor], less: Sequence[Tensor] | None = None) -> float:
    """Euclidean norm over all gradients, minus those in `less` when given."""
    grads = [parameter.grad for parameter in parameters if parameter.grad is not None]
    if less is not None:
        grads = [grad - earlier for grad, earlier in zip(grads, less, strict=True)]
    return float(torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(grad) for grad in grads])))


def _capture(
    adam: torch.optim.Adam, parameters: Sequence[Tensor], history: list[dict[str, float]]
) -> checkpoints.Checkpoint:
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


def _fingerprint(
    base: Base,
    start: AdapterFile,
    fresh: Sequence[TokenRow],
    replay: Sequence[TokenRow],
    anchors: Sequence[TokenRow],
    trainer: TrainerConfig,
    seed: int,
) -> str:
    """sha256 of all that the trained bytes depend on."""
    whole = hashlib.sha256()
    settings = trainer.model_dump(mode="json", exclude={"checkpoint_every", "anchors", "num_anchors", "anchor_tokens"})
    numbers = [start.rank, start.alpha, start.targets, settings, seed, torch.__version__, torch.get_num_threads()]
    whole.update(json.dumps([base.digest, base.device, numbers], sort_keys=True).encode())
    for rows in (fresh, replay, anchors):
        for row in rows:
            whole.update(repr((row.record, row.stratum, row.ids, row.weights)).encode())
        whole.update(b"\0")
    whole.update(_bytes_of(start.factors))
    return whole.hexdigest()


def _bytes_of(factors: Factors) -> bytes:
    return b"".join(
        module.encode() + a_RK.numpy().tobytes() + b_NR.numpy().tobytes()
        for module, (a_RK, b_NR) in snapshot(factors).items()
    )
