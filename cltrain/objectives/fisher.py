"""Which directions of each adapted matrix the likelihood depends on: diagonal Kronecker factors of the Fisher.

With x the inputs of a linear layer and delta the gradients of one row's loss at its outputs, the gradient with respect
to its weight delta is G = sum_t delta_t x_t^T, and E[G_ij^2] is taken as d_S[i] d_C[j] (K-FAC, Martens and Grosse,
1503.05671; positions as independent, Eschenhagen et al., 2311.00636). N + K floats per module, and no dependence on how
the delta splits into A and B. The Fisher is the empirical one: the labels are the rows' own tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cltrain.errors import DataError
from cltrain.models.base import Base
from cltrain.models.forward import hidden_at, predicted
from cltrain.objectives.losses import token_weights, weighted_nll
from cltrain.records import TokenRow

NUM_ROWS = "num_rows"
ENDS = (".outputs", ".inputs")


@dataclass(frozen=True)
class Fisher:
    """Module -> (d_S_N, d_C_K) float32 on the CPU, and the number of rows behind them, older ones counting for less.

    d_S: mean over rows of sum_t delta_t^2; d_C: mean over rows of the mean over positions of x_t^2.
    """

    diagonals: dict[str, tuple[Tensor, Tensor]]
    num_rows: float


def measure_fisher(base: Base, model: Any, modules: Sequence[str], rows: Sequence[TokenRow], max_norm: float) -> Fisher:
    """The factors of `modules` of an attached model in eval mode, from the likelihood of `rows` alone, one at a time.

    A row's loss is its mean NLL per token. Its gradient with respect to all modules' deltas is scaled down to
    `max_norm` (Frobenius over all of them) before squaring, so that a mislabelled row cannot decide what matters.
    Positions after the last predicted token carry no gradient and do not count. No parameter's .grad is touched.
    Raises DataError when no row has a target or a gradient is not finite.
    """
    assert not model.training
    rows = [row for row in rows if predicted(row)]
    if not rows:
        raise DataError("no row has a token to predict: there is nothing to measure a Fisher on")
    sums: dict[str, tuple[Tensor, Tensor]] = {}
    for row in rows:
        of_row = _row_sums(base, model, modules, row)
        norm = sum(square for _, _, square in of_row.values()) ** 0.5
        if not norm < float("inf"):
            raise DataError(f"the gradient of record {row.record} has norm {norm}: its Fisher cannot be measured")
        share = min(1.0, max_norm / norm) if norm > 0 else 1.0
        for module in modules:
            s_N, c_K, _ = of_row[module]
            old = sums.get(module, (0.0, 0.0))
            sums[module] = (old[0] + share**2 * s_N, old[1] + c_K)
    means = {m: ((s_N / len(rows)).float().cpu(), (c_K / len(rows)).float().cpu()) for m, (s_N, c_K) in sums.items()}
    return Fisher(means, float(len(rows)))


def decayed(old: Fisher, new: Fisher, gamma: float) -> Fisher:
    """Means over both with the old rows counting gamma each, gamma in [0, 1]; of the same modules.

    Factors are averaged, not their products, and as means they cannot grow without end as summed Fishers do.
    """
    assert old.diagonals.keys() == new.diagonals.keys()
    num_rows = gamma * old.num_rows + new.num_rows
    share = new.num_rows / num_rows

    def mean(before: Tensor, after: Tensor) -> Tensor:
        return ((1 - share) * before.double() + share * after.double()).float()

    pairs = {m: (old.diagonals[m], pair) for m, pair in new.diagonals.items()}
    return Fisher({m: (mean(o[0], n[0]), mean(o[1], n[1])) for m, (o, n) in pairs.items()}, num_rows)


def relative_to_base(fisher: Fisher, base_norms: Mapping[str, float]) -> Fisher:
    """The Fisher times one constant for all modules that makes the EWC penalty comparable to L2-SP.

    The mean over modules of mean_ij(F_ij) ||W0||_F^2 becomes 1: a Fisher that holds every module equally, relative to
    its size, gives exactly `l2sp`, and no number of rows, clipping or loss unit changes what a coefficient means. One
    constant, not one per module, because how modules compare is what the Fisher knows. A zero Fisher stays zero.
    """
    sizes = [
        float(s_N.double().mean() * c_K.double().mean()) * base_norms[module] ** 2
        for module, (s_N, c_K) in fisher.diagonals.items()
    ]
    mean = sum(sizes) / len(sizes)
    if mean == 0:
        return fisher
    diagonals = {m: ((s_N.double() / mean).float(), c_K) for m, (s_N, c_K) in fisher.diagonals.items()}
    return Fisher(diagonals, fisher.num_rows)


def to_tensors(fisher: Fisher) -> dict[str, Tensor]:
    """Named tensors for a safetensors file."""
    tensors = {NUM_ROWS: torch.tensor([fisher.num_rows], dtype=torch.float64)}
    for module, pair in fisher.diagonals.items():
        tensors |= {module + end: d.contiguous() for end, d in zip(ENDS, pair, strict=True)}
    return tensors


def from_tensors(tensors: Mapping[str, Tensor]) -> Fisher:
    """The inverse of `to_tensors`. Raises DataError for other names, and for values that are negative or not finite."""
    modules = [name.removesuffix(ENDS[0]) for name in tensors if name.endswith(ENDS[0])]
    expected = {NUM_ROWS, *(module + end for module in modules for end in ENDS)}
    if expected != tensors.keys():
        raise DataError(f"tensors that are no Fisher factors: {sorted(expected ^ tensors.keys())[:3]}")
    for name, values in tensors.items():
        if not bool((torch.isfinite(values) & (values >= 0)).all()):
            raise DataError(f"{name} of a Fisher is negative or not finite")
    pairs = {m: (tensors[m + ENDS[0]].float(), tensors[m + ENDS[1]].float()) for m in modules}
    return Fisher(pairs, float(tensors[NUM_ROWS]))


def _row_sums(base: Base, model: Any, modules: Sequence[str], row: TokenRow) -> dict[str, tuple[Tensor, Tensor, float]]:
    """Module -> (sum_t delta_t^2, mean_t x_t^2, ||sum_t delta_t x_t^T||_F^2) at the positions before the row's last
    predicted token, taken while the backward has delta and x at hand and let go with them."""
    num_positions = predicted(row)[-1]
    found: dict[str, tuple[Tensor, Tensor, float]] = {}
    inputs: dict[str, Tensor] = {}

    def watch(module: str) -> Any:
        def forward_hook(_: Any, taken: tuple[Tensor, ...], output: Tensor) -> None:
            inputs[module] = taken[0].detach()
            output.register_hook(backward_hook)

        def backward_hook(gradient: Tensor) -> None:
            x_TK, delta_TN = inputs.pop(module)[0, :num_positions].float(), gradient[0, :num_positions].float()
            squares = delta_TN.double().square().sum(0), x_TK.double().square().mean(0)
            found[module] = (*squares, _square_of_product(x_TK, delta_TN))

        return forward_hook

    layers = [model.get_base_model().get_submodule(module) for module in modules]
    handles = [layer.register_forward_hook(watch(module)) for module, layer in zip(modules, layers, strict=True)]
    try:
        loss = weighted_nll(base, hidden_at(model, [row]), [row], token_weights([row], [1.0]))
    finally:
        for handle in handles:
            handle.remove()
    # Of the factors, whose gradients are small, and not by backward(): no parameter's .grad is touched.
    torch.autograd.grad(loss, [p for layer in layers for p in layer.parameters() if p.requires_grad])
    return found


def _square_of_product(x_TK: Tensor, delta_TN: Tensor) -> float:
    """||sum_t delta_t x_t^T||_F^2 from T x T Grams."""
    return max(float(((delta_TN @ delta_TN.T) * (x_TK @ x_TK.T)).sum()), 0.0)
