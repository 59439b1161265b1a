"""The LoRA factors of all modules in one flat buffer, with their gradients and Adam's moments in three more like it.

The model's parameters become views of it, so that one kernel steps all of them while PEFT saves and loads as ever. All
A lie before all B, modules of one shape side by side, so that a shape is one batched matmul. R rank, K in, N out, L
modules of one shape, M all modules, S elements of a buffer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Factors = Mapping[str, tuple[Tensor, Tensor]]
Stacks = list[tuple[Tensor, Tensor]]
ALIGNMENT = 64  # elements: 256 bytes of float32


@dataclass(frozen=True, slots=True)
class Group:
    """Modules of one shape. Module i's A begins at `a_start + i * a_stride`, its B at `b_start + i * b_stride`."""

    modules: tuple[str, ...]
    num_in: int
    num_out: int
    a_start: int
    a_stride: int
    b_start: int
    b_stride: int


@dataclass(frozen=True)
class Layout:
    """The table of offsets, in elements. What lies between the factors is zero and stays zero."""

    rank: int
    groups: tuple[Group, ...]
    boundary: int  # A below, B from here on
    size: int

    @classmethod
    def of(cls, shapes: Mapping[str, tuple[int, int]], rank: int) -> Layout:
        """The layout for module -> (N, K). Raises ValueError when there is no module or an empty one."""
        if not shapes or rank < 1 or min(min(shape) for shape in shapes.values()) < 1:
            raise ValueError(f"a flat buffer needs modules of at least one row, column and rank; got {dict(shapes)}")
        by_shape: dict[tuple[int, int], list[str]] = {}
        for module, shape in shapes.items():
            by_shape.setdefault(shape, []).append(module)
        strides = [(_aligned(rank * num_in), _aligned(num_out * rank)) for num_out, num_in in by_shape]
        boundary = sum(a * len(m) for (a, _), m in zip(strides, by_shape.values(), strict=True))
        groups = []
        a_start, b_start = 0, boundary
        for ((num_out, num_in), modules), (a_stride, b_stride) in zip(by_shape.items(), strides, strict=True):
            groups.append(Group(tuple(modules), num_in, num_out, a_start, a_stride, b_start, b_stride))
            a_start += a_stride * len(modules)
            b_start += b_stride * len(modules)
        return cls(rank, tuple(groups), boundary, b_start)

    @property
    def halves(self) -> tuple[slice, slice]:
        """All A, and all B."""
        return slice(None, self.boundary), slice(self.boundary, None)

    @property
    def modules(self) -> tuple[str, ...]:
        """The order of every result with one entry per module."""
        return tuple(module for group in self.groups for module in group.modules)

    def table(self, by_module: Mapping[str, float]) -> Tensor:
        """One float64 per module, in the order of `modules`."""
        return torch.tensor([by_module[module] for module in self.modules], dtype=torch.float64)

    def stacks(self, buffer_S: Tensor) -> Stacks:
        """(A_LRK, B_LNR) for each group: views of a buffer of this layout."""
        self._check(buffer_S)
        rank = self.rank
        return [
            (
                buffer_S.as_strided((len(g.modules), rank, g.num_in), (g.a_stride, g.num_in, 1), g.a_start),
                buffer_S.as_strided((len(g.modules), g.num_out, rank), (g.b_stride, rank, 1), g.b_start),
            )
            for g in self.groups
        ]

    def factors(self, buffer_S: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
        """Module -> (A_RK, B_NR): views of a buffer of this layout."""
        pairs = zip(self.groups, self.stacks(buffer_S), strict=True)
        return {m: (a_LRK[i], b_LNR[i]) for g, (a_LRK, b_LNR) in pairs for i, m in enumerate(g.modules)}

    def fill(self, buffer_S: Tensor, factors: Factors) -> None:
        """Copy factors of exactly these modules and shapes into a buffer. Raises ValueError for others."""
        places = self.factors(buffer_S)
        if factors.keys() != places.keys():
            odd = sorted(factors.keys() ^ places.keys())
            raise ValueError(f"the factors are not those of the flat buffer: {odd[0]} (and {len(odd) - 1} more)")
        for module, pair in places.items():
            for place, value in zip(pair, factors[module], strict=True):
                if place.shape != value.shape:
                    raise ValueError(f"{module}: a factor {tuple(value.shape)} does not fit {tuple(place.shape)}")
        with torch.no_grad():
            for module, (a_RK, b_NR) in places.items():
                a_RK.copy_(factors[module][0])
                b_NR.copy_(factors[module][1])

    def _check(self, buffer_S: Tensor) -> None:
        if buffer_S.shape != (self.size,) or buffer_S.stride() != (1,) or buffer_S.storage_offset():
            raise ValueError(f"expected a whole flat buffer of {self.size} elements; got {tuple(buffer_S.shape)}")


class FlatLoRA:
    """The live factors of one model as views of `values`, their `.grad` as views of `gradients`.

    `means` and `squares` are Adam's moments, `num_steps` its count, a float32 scalar on the device. Gradients must be
    zeroed with `zero_gradients`: setting `.grad` to None would lead autograd elsewhere, which `check` finds.
    """

    def __init__(self, live: Mapping[str, tuple[torch.nn.Parameter, torch.nn.Parameter]]) -> None:
        """Move the parameters of module -> (A_RK, B_NR) into flat buffers of their dtype and device.

        Raises ValueError, with nothing moved, for ranks, dtypes or devices that differ and for parameters that modules
        share.
        """
        _check_live(live)
        self._live = dict(live)
        first = next(iter(live.values()))[0]
        self.layout = Layout.of({m: (b.shape[0], a.shape[1]) for m, (a, b) in live.items()}, first.shape[0])
        self.values, self.gradients, self.means, self.squares = (
            torch.zeros(self.layout.size, dtype=first.dtype, device=first.device) for _ in range(4)
        )
        self.num_steps = torch.zeros((), dtype=torch.float32, device=first.device)
        self.layout.fill(self.values, live)
        self._views = self.layout.factors(self.values), self.layout.factors(self.gradients)
        for parameter, value, gradient in self._triples():
            parameter.data, parameter.grad = value, gradient

    def zero_gradients(self) -> None:
        """Zero all gradients in place, leaving them attached."""
        self.gradients.zero_()

    def forget_moments(self) -> None:
        """Adam starts over: moments and count are zero."""
        for buffer in (self.means, self.squares, self.num_steps):
            buffer.zero_()

    def load(self, factors: Factors) -> None:
        """Copy an adapter of the same modules and shapes into the buffer. Raises ValueError for another."""
        self.layout.fill(self.values, factors)

    def factors(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Module -> (A_RK, B_NR), views of the values, in the order in which the modules were given."""
        return {module: self._views[0][module] for module in self._live}

    def check(self) -> None:
        """Raise RuntimeError when a parameter or its gradient no longer lies in the flat buffers."""
        for parameter, value, gradient in self._triples():
            if parameter.data_ptr() != value.data_ptr():
                raise RuntimeError("an adapter weight left the flat buffer: something replaced it; make a new FlatLoRA")
            if parameter.grad is None or parameter.grad.data_ptr() != gradient.data_ptr():
                raise RuntimeError(
                    "a gradient left the flat buffer: zero gradients with FlatLoRA.zero_gradients, not with "
                    "zero_grad(set_to_none=True)"
                )

    def release(self) -> None:
        """Give every parameter memory of its own again, with its present value and no gradient."""
        for parameter, value, _ in self._triples():
            parameter.data, parameter.grad = value.clone(), None

    def _triples(self) -> Sequence[tuple[torch.nn.Parameter, Tensor, Tensor]]:
        values, gradients = self._views
        return [
            triple
            for module, pair in self._live.items()
            for triple in zip(pair, values[module], gradients[module], strict=True)
        ]


def _aligned(num: int) -> int:
    return -(-num // ALIGNMENT) * ALIGNMENT


def _check_live(live: Mapping[str, tuple[torch.nn.Parameter, torch.nn.Parameter]]) -> None:
    kinds: set[object] = set()
    for module, (a_RK, b_NR) in live.items():
        if a_RK.ndim != 2 or b_NR.ndim != 2 or a_RK.shape[0] != b_NR.shape[1]:
            raise ValueError(f"{module}: {tuple(a_RK.shape)} and {tuple(b_NR.shape)} are no A (R, K) and B (N, R)")
        kinds |= {(a_RK.shape[0], p.dtype, p.device) for p in (a_RK, b_NR)}
    if len(kinds) > 1:
        raise ValueError(f"one flat buffer holds one rank, dtype and device; got {sorted(map(str, kinds))}")
    parameters = [id(p) for pair in live.values() for p in pair]
    if len(set(parameters)) < len(parameters):
        raise ValueError("two modules share a LoRA parameter: a flat buffer gives each its own place")
