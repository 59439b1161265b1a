"""Penalties on how far the live factors' delta is from a reference delta, with their gradients.

Both are weighted squares of D = dW - dW_ref over the whole N x K matrix, computed from small Grams of all modules at
once. They are summed in float64 because a Gram sum of a small difference cancels. Which weight they get is the caller's
business.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from cltrain_kernels.flat import Layout, Stacks
from cltrain_kernels.grams import delta_penalty
from torch import Tensor

from cltrain.errors import DataError
from cltrain.models.adapter import AdapterFile
from cltrain.objectives.fisher import Fisher


@dataclass(frozen=True, eq=False)
class DeltaPenalty:
    """1/2 sum over modules of c_M sum_ij d_S[i] d_C[j] (dW - dW_ref)_ij^2 with dW = scale * B A of flat factors."""

    layout: Layout
    scale: float
    reference: Stacks | None  # of its factors, under `scale`
    coefficients_M: Tensor
    diagonals: Mapping[str, tuple[Tensor, Tensor]] | None = None  # of a Fisher: (d_S_N, d_C_K) by module

    def __call__(self, values_S: Tensor, gradients_S: Tensor | None = None, weight: float = 1.0) -> Tensor:
        """The penalty as a float64 scalar; `weight` times its gradient is added to `gradients_S`."""
        coefficients_M = weight * self.coefficients_M
        weighted = delta_penalty(
            self.layout, values_S, self.reference, self.scale, coefficients_M, self.diagonals, gradients_S
        )
        return weighted / weight


def l2sp(
    layout: Layout,
    scale: float,
    reference: AdapterFile | None,
    base_norms: Mapping[str, float],
    device: torch.device | None = None,
) -> DeltaPenalty:
    """1/2 sum over modules of ||dW - dW_ref||_F^2 / ||W0||_F^2, without unit.

    No reference, or a module that it lacks, means a zero delta; modules that only the reference has are constant and
    left out. Raises DataError for a W0 of zero. L2-SP: Li et al., 1802.01483.
    """
    zero = [module for module in layout.modules if not base_norms[module] > 0]
    if zero:
        raise DataError(f"{zero[0]} of the base is all zeros: no distance can be measured relative to it")
    coefficients_M = (layout.table(base_norms) ** -2).to(device)
    return DeltaPenalty(layout, scale, _stacks_of(layout, scale, reference, device), coefficients_M)


def ewc(
    layout: Layout, scale: float, reference: AdapterFile | None, fisher: Fisher, device: torch.device | None = None
) -> DeltaPenalty:
    """1/2 sum over modules of sum_ij d_S[i] d_C[j] (dW - dW_ref)_ij^2.

    Elastic weight consolidation (Kirkpatrick et al., 1612.00796) on the delta, as EWC-LoRA (2602.17559) does, with a
    diagonal Kronecker Fisher. In nats with the Fisher as measured; with `relative_to_base` in the units of `l2sp`.
    """
    ones_M = torch.ones(len(layout.modules), dtype=torch.float64, device=device)
    diagonals = {m: (s_N.to(device), c_K.to(device)) for m, (s_N, c_K) in fisher.diagonals.items()}
    return DeltaPenalty(layout, scale, _stacks_of(layout, scale, reference, device), ones_M, diagonals)


def _stacks_of(
    layout: Layout, scale: float, reference: AdapterFile | None, device: torch.device | None
) -> Stacks | None:
    """The reference's factors in float64, module by module as the layout has them, B under the layout's scale."""
    if reference is None:
        return None
    stacks = []
    for group in layout.groups:
        nothing = torch.zeros(reference.rank, group.num_in), torch.zeros(group.num_out, reference.rank)
        pairs = [reference.factors.get(module, nothing) for module in group.modules]
        a_LRK, b_LNR = (torch.stack([pair[i].detach().double() for pair in pairs]) for i in (0, 1))
        stacks.append((a_LRK.to(device), (b_LNR * (reference.scale / scale)).to(device)))
    return stacks
