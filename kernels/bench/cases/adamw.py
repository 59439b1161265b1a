"""adamw: clip and step over the flat buffer of 0.5B's and 8B's LoRA factors, against torch's foreach and fused."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from case import Case, Contender
from cltrain_kernels.adamw import AdamW, Corners, adamw_step
from cltrain_kernels.flat import FlatLoRA
from torch import Tensor
from torch.nn import Parameter

LINEARS = {  # layers, and N x K of the seven linears
    "0.5B": (24, [(896, 896), (128, 896), (128, 896), (896, 896), (4864, 896), (4864, 896), (896, 4864)]),
    "8B": (32, [(4096, 4096), (1024, 4096), (1024, 4096), (4096, 4096), (14336, 4096), (14336, 4096), (4096, 14336)]),
}
RANK = 16
SETTINGS = AdamW(max_norm=1.0)


def cases(quick: bool) -> list[Case]:
    return [
        Case("adamw", {"model": m, "rank": RANK}, functools.partial(problem, m), functools.partial(contenders, m))
        for m in (["0.5B"] if quick else LINEARS)
    ]


def draw(model: str, dtype: torch.dtype = torch.float32) -> dict[str, tuple[Parameter, Parameter]]:
    """Factors with gradients."""
    rng = torch.Generator("cuda").manual_seed(0)

    def normal(*shape: int) -> Parameter:
        made = Parameter(torch.randn(shape, generator=rng, device="cuda").to(dtype))
        made.grad = torch.randn(shape, generator=rng, device="cuda").to(dtype)
        return made

    num_layers, shapes = LINEARS[model]
    sizes = {f"{i}.{j}": shape for i in range(num_layers) for j, shape in enumerate(shapes)}
    return {module: (normal(RANK, num_in), normal(num_out, RANK)) for module, (num_out, num_in) in sizes.items()}


def flat(factors: dict[str, tuple[Parameter, Parameter]]) -> FlatLoRA:
    """The factors in a flat buffer, gradients and all."""
    gradients = {m: tuple(p.grad.clone() for p in pair) for m, pair in factors.items()}
    state = FlatLoRA(factors)
    state.layout.fill(state.gradients, gradients)
    return state


def torchs(factors: dict[str, tuple[Parameter, Parameter]], **how: Any) -> Callable[[], None]:
    parameters = [p for pair in factors.values() for p in pair]
    adam = torch.optim.AdamW(parameters, lr=1e-3, weight_decay=0.0, **how)

    def step() -> None:
        torch.nn.utils.clip_grad_norm_(parameters, SETTINGS.max_norm)
        adam.step()

    return step


def problem(model: str) -> str | None:
    """Three steps are at most twice as far from float64 as torch's fused in float32, two runs are equal, corners hold
    the factors in bfloat16, and nothing waits for the device."""
    rates = torch.full((2,), 1e-3, device="cuda")
    runs = []
    for _ in range(2):
        factors = draw(model)
        state = flat(factors)
        places = {m: (a.detach().bfloat16(), b.detach().bfloat16()) for m, (a, b) in factors.items()}
        corners = Corners(places, 0.5)
        adamw_step(state, rates, SETTINGS, corners)  # makes the tables
        torch.cuda.set_sync_debug_mode("error")
        try:
            for _ in range(2):
                adamw_step(state, rates, SETTINGS, corners)
        except RuntimeError as error:
            return f"a step waits: {error}"
        finally:
            torch.cuda.set_sync_debug_mode("default")
        runs.append(factors)
    for module, (a_RK, b_NR) in factors.items():
        expected = a_RK.bfloat16(), (0.5 * b_NR).bfloat16()
        if not all(torch.equal(place, copy) for place, copy in zip(places[module], expected, strict=True)):
            return f"the corners of {module} are not its factors"
    values = []
    for dtype in (torch.float64, torch.float32):
        theirs = draw(model, dtype)
        step = torchs(theirs, fused=True)
        for _ in range(3):
            step()
        values.append(joined(theirs))
    error, limit = ((x - values[0]).abs().max() for x in (joined(runs[0]), values[1]))
    limit = 2 * limit + torch.finfo(torch.float32).eps * values[0].abs().max()
    if not error <= limit:
        return f"values: error {float(error):.3g} exceeds {float(limit):.3g}"
    return None if torch.equal(joined(runs[0]), joined(runs[1])) else "two runs differ"


def joined(factors: dict[str, tuple[Parameter, Parameter]]) -> Tensor:
    return torch.cat([p.detach().double().flatten() for pair in factors.values() for p in pair])


def contenders(model: str) -> tuple[list[Contender], dict[str, str]]:
    state, rates = flat(draw(model)), torch.full((2,), 1e-3, device="cuda")
    found = [Contender("ours", lambda: nothing(adamw_step(state, rates, SETTINGS)))]
    for name in ("foreach", "fused"):
        found.append(Contender(name, torchs(draw(model), **{name: True})))
    return found, {}


def nothing(_: object) -> None:
    """A step has no gradient to compare."""
