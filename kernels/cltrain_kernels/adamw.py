"""One optimiser step over a flat buffer: clip by the gradient's norm, AdamW with a rate for A and one for B (LoRA+,
2402.12354), and on request bfloat16 copies of the factors for the matmuls that read them.

Nothing here asks the device for a number, so a step can be captured in a CUDA graph: rates, count and norm are tensors.
S elements of the buffer.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from cltrain_kernels.dispatch import implementation_for
from cltrain_kernels.flat import FlatLoRA, Layout


@dataclass(frozen=True, slots=True)
class AdamW:
    """What stays the same over an update; the names and defaults of torch.optim.AdamW, without decay it is Adam."""

    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    max_norm: float = float("inf")  # of the gradient over all modules

    def __post_init__(self) -> None:
        if not (0 <= self.betas[0] < 1 and 0 <= self.betas[1] < 1 and self.eps >= 0 and self.weight_decay >= 0):
            raise ValueError(f"AdamW takes betas in [0, 1), eps and weight_decay of at least 0; got {self}")
        if not self.max_norm > 0:
            raise ValueError(f"max_norm must be above 0 (inf: no clipping); got {self.max_norm}")


@dataclass(frozen=True, eq=False)
class Corners:
    """Where a step leaves low-precision copies: module -> (A_RK, scale * B_NR), any strides, one dtype."""

    places: Mapping[str, tuple[Tensor, Tensor]]
    scale: float

    def check(self, layout: Layout) -> None:
        """Raise ValueError unless the places are those of the layout's modules."""
        shapes = {m: ((layout.rank, g.num_in), (g.num_out, layout.rank)) for g in layout.groups for m in g.modules}
        found = {module: (tuple(a.shape), tuple(b.shape)) for module, (a, b) in self.places.items()}
        if found != shapes:
            wrong = next(m for m in {**shapes, **found} if shapes.get(m) != found.get(m))
            raise ValueError(f"{wrong}: corners of {found.get(wrong)} for factors of {shapes.get(wrong)}")
        if len({(p.dtype, p.device) for pair in self.places.values() for p in pair}) > 1:
            raise ValueError("the corners differ in dtype or device")


def adamw_step(state: FlatLoRA, rates_2: Tensor, settings: AdamW, corners: Corners | None = None) -> Tensor:
    """Step `state` in place with the rates of A and of B; returns the gradient's norm before clipping, a scalar tensor.

    `rates_2` has the buffers' dtype and device. The gradients may come out clipped: zero them before the next backward.
    A gradient that is not finite makes the whole state so: look at the norm. Raises ValueError for tensors that do not
    fit.
    """
    if rates_2.shape != (2,) or (rates_2.dtype, rates_2.device) != (state.values.dtype, state.values.device):
        raise ValueError(
            f"expected two rates (of A and of B), {state.values.dtype} on {state.values.device}; got "
            f"{tuple(rates_2.shape)}, {rates_2.dtype} on {rates_2.device}"
        )
    if corners is not None:
        corners.check(state.layout)
    if state.values.dtype is torch.float32 and implementation_for("adamw", state.values.device) == "triton":
        from cltrain_kernels.adamw_triton import adamw_step_triton

        return adamw_step_triton(state, rates_2, settings, corners)
    if state.values.device.type == "cpu":
        return _adamw_step_cpu(state, rates_2, settings, corners)
    return adamw_step_reference(state, rates_2, settings, corners)


def adamw_step_reference(state: FlatLoRA, rates_2: Tensor, settings: AdamW, corners: Corners | None = None) -> Tensor:
    """The specification of `adamw_step`, in PyTorch."""
    beta1, beta2 = settings.betas
    state.num_steps += 1
    correction1, correction2 = (c.to(state.values.dtype) for c in bias_corrections(state.num_steps, settings))
    norm = torch.linalg.vector_norm(state.gradients)
    gradients_S = state.gradients * clip_factor(norm, settings)
    state.means.lerp_(gradients_S, 1 - beta1)
    state.squares.mul_(beta2).addcmul_(gradients_S, gradients_S, value=1 - beta2)
    for rate, part in zip(rates_2, state.layout.halves, strict=True):
        mean_S = state.means[part] / correction1
        scale_S = (state.squares[part] / correction2).sqrt() + settings.eps
        state.values[part] -= rate * (mean_S / scale_S + settings.weight_decay * state.values[part])
    refresh(state, corners)
    return norm


def clip_factor(norm: Tensor, settings: AdamW) -> Tensor:
    """What gradients of this norm are multiplied by, as torch.nn.utils.clip_grad_norm_ does."""
    return (settings.max_norm / (norm + 1e-6)).clamp(max=1.0)


def bias_corrections(num_steps: Tensor, settings: AdamW) -> tuple[Tensor, Tensor]:
    """What the moments are divided by after this many steps, in float64: in float32, 1 - 0.999 has four digits."""
    first, second = (1 - torch.pow(beta, num_steps.double()) for beta in settings.betas)
    return first, second


def refresh(state: FlatLoRA, corners: Corners | None) -> None:
    """Copy the factors into the corners."""
    if corners is None:
        return
    for module, (a_RK, b_NR) in state.factors().items():
        a_place, b_place = corners.places[module]
        a_place.copy_(a_RK)
        b_place.copy_(b_NR * corners.scale)


def _adamw_step_cpu(state: FlatLoRA, rates_2: Tensor, settings: AdamW, corners: Corners | None) -> Tensor:
    """The same in one pass per factor by the kernel behind torch.optim.AdamW(fused=True)."""
    norm = torch.linalg.vector_norm(state.gradients)
    state.num_steps += 1
    divisor = clip_factor(norm, settings).reciprocal().float()
    for rate, part in zip(rates_2, state.layout.halves, strict=True):
        torch._fused_adamw_(
            [state.values[part]], [state.gradients[part]], [state.means[part]], [state.squares[part]], [],
            [state.num_steps], lr=float(rate), beta1=settings.betas[0], beta2=settings.betas[1],
            weight_decay=settings.weight_decay, eps=settings.eps, amsgrad=False, maximize=False, grad_scale=divisor,
        )  # fmt: skip
    refresh(state, corners)
    return norm
