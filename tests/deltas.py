"""Random adapters of one or more modules and their dense float64 deltas, for tests of formulas that never form them."""

import torch
from cltrain_kernels.flat import Layout

from cltrain.models.adapter import AdapterFile


def make_adapter(shapes, rank, seed, alpha=6.0, size=1.0, dtype=torch.float32):
    """Module names m0, m1, ... of the given (N, K)."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return size * torch.randn(*shape, generator=generator).to(dtype)

    factors = {f"m{i}": (draw(rank, num_in), draw(num_out, rank)) for i, (num_out, num_in) in enumerate(shapes)}
    return AdapterFile(factors, rank, alpha, tuple(factors), None)


def dense(adapter, module="m0"):
    a_RK, b_NR = adapter.factors[module]
    return adapter.alpha / adapter.rank * b_NR.double() @ a_RK.double()


def regauged(adapter, seed, spread=1.0):
    """The same deltas from (R A, B R^-1), R random with condition at most 10^(2 spread), in float64."""
    generator = torch.Generator().manual_seed(seed)
    factors = {}
    for module, (a_RK, b_NR) in adapter.factors.items():
        square = torch.randn(2, adapter.rank, adapter.rank, generator=generator, dtype=torch.float64)
        left, right = torch.linalg.qr(square).Q
        sizes = 10 ** (spread * (2 * torch.rand(adapter.rank, generator=generator, dtype=torch.float64) - 1))
        factors[module] = (left * sizes @ right @ a_RK.double(), b_NR.double() @ right.T / sizes @ left.T)
    return adapter.with_factors(factors)


def flat(adapter):
    """(layout, values_S) of an adapter's factors."""
    layout = Layout.of({m: (len(b), a.shape[1]) for m, (a, b) in adapter.factors.items()}, adapter.rank)
    values = next(iter(adapter.factors.values()))[0].new_zeros(layout.size)
    layout.fill(values, adapter.factors)
    return layout, values
