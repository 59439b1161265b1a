"""Per-row LoRA: every row of a batch goes through the base with its own adapter, or with none.

PEFT's mixed batches cost 2.5 to 4 times the time of this on a small model. Adapters are immutable once loaded and a
request keeps a reference to its own, so loading and unloading never touch a request that has begun.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cltrain.errors import ConflictError, DataError
from cltrain.models.adapter import check_fits, read_adapter
from cltrain.models.base import Base

RECENT_STACKS = 4


@dataclass(frozen=True, eq=False)
class Adapter:
    """A loaded adapter: per module path A (K, R) and B (R, N), scale folded into B. Compared by identity."""

    name: str
    root: str
    rank: int
    factors: dict[str, tuple[Tensor, Tensor]]


class FullError(DataError):
    """No room for another adapter."""


class AdapterTable:
    """The adapters that a server answers by name. Safe to use from any thread."""

    def __init__(self, base: Base, *, base_name: str, max_adapters: int) -> None:
        self.base_name = base_name
        self._base = base
        self._max_adapters = max_adapters
        parameter = next(base.model.parameters())
        self._device, self._dtype = parameter.device, parameter.dtype
        self._adapters: dict[str, Adapter] = {}
        self._lock = threading.Lock()

    def resolve(self, name: str) -> Adapter | None:
        """The adapter of that name; None for the base. KeyError when there is none."""
        if name == self.base_name:
            return None
        with self._lock:
            return self._adapters[name]

    def loaded(self) -> dict[str, str]:
        """Name to root directory, in the order of loading."""
        with self._lock:
            return {name: adapter.root for name, adapter in self._adapters.items()}

    def load(self, name: str, directory: Path) -> None:
        """Read an adapter under a new name.

        Raises ConflictError when the name is taken, FullError when there is no room, FileNotFoundError when there is
        no adapter there, DataError when it cannot serve on this base.
        """
        self._check_free(name)
        if not (directory / "adapter_config.json").is_file():
            raise FileNotFoundError(f"No adapter found for {directory}")
        adapter = self._read(name, directory)
        with self._lock:
            self._check_room(name)
            self._adapters[name] = adapter

    def unload(self, name: str) -> None:
        """Forget the name; requests that began on it finish. KeyError when there is none."""
        with self._lock:
            del self._adapters[name]

    def _check_free(self, name: str) -> None:
        if name == self.base_name:
            raise ConflictError(f"The lora adapter '{name}' conflicts with a served base model.")
        with self._lock:
            self._check_room(name)

    def _check_room(self, name: str) -> None:
        if name in self._adapters:
            raise ConflictError(
                f"The lora adapter '{name}' has already been loaded. If you want to load the adapter in place, "
                "set 'load_inplace' to True."
            )
        if len(self._adapters) >= self._max_adapters:
            raise FullError(
                f"{self._max_adapters} adapters are loaded and server.max_adapters allows no more: unload one first"
            )

    def _read(self, name: str, directory: Path) -> Adapter:
        file = read_adapter(directory)
        check_fits(self._base, file)
        factors: dict[str, tuple[Tensor, Tensor]] = {}
        for path, (a_RK, b_NR) in file.factors.items():
            a_KR = a_RK.t().to(self._device, self._dtype).contiguous()
            b_RN = (b_NR.t() * file.scale).to(self._device, self._dtype).contiguous()
            if not (torch.isfinite(a_KR).all() and torch.isfinite(b_RN).all()):
                raise DataError(f"{directory}: {path} overflows {self._dtype}")
            factors[path] = (a_KR, b_RN)
        return Adapter(name, str(directory), file.rank, factors)


class RowLora:
    """Adds each row's own low-rank delta to the outputs of the model's linear layers, in the thread that called `use`;
    another thread's forward of the same model stays the bare base."""

    def __init__(self, model: torch.nn.Module) -> None:
        self._model = model
        self._hooks: dict[str, Any] = {}
        self._current: dict[str, tuple[Tensor, Tensor]] = {}
        self._owner: int | None = None
        self._recent: OrderedDict[tuple[Adapter | None, ...], dict[str, tuple[Tensor, Tensor]]] = OrderedDict()

    def use(self, rows: Sequence[Adapter | None]) -> None:
        """The next forward has len(rows) rows; row i is answered by rows[i], None being the base."""
        key = tuple(rows)
        stacks = self._recent.get(key)
        if stacks is None:
            stacks = self._recent[key] = _stack(rows)
            if len(self._recent) > RECENT_STACKS:
                self._recent.popitem(last=False)
            for path in stacks.keys() - self._hooks.keys():
                self._hooks[path] = self._model.get_submodule(path).register_forward_hook(self._hook(path))
        else:
            self._recent.move_to_end(key)
        self._current = stacks
        self._owner = threading.get_ident()

    def forget(self) -> None:
        """Let go of stacked weights: called when no row is running, so that unloaded adapters free their memory."""
        self._recent.clear()
        self._current = {}

    def close(self) -> None:
        for handle in self._hooks.values():
            handle.remove()
        self._hooks.clear()
        self.forget()

    def _hook(self, path: str) -> Callable[..., Tensor | None]:
        def add_delta(_module: torch.nn.Module, args: tuple[Tensor, ...], out_BTN: Tensor) -> Tensor | None:
            stack = self._current.get(path)
            if stack is None or threading.get_ident() != self._owner:
                return None
            a_BKR, b_BRN = stack
            return torch.baddbmm(out_BTN, torch.bmm(args[0], a_BKR), b_BRN)

        return add_delta


def _stack(rows: Sequence[Adapter | None]) -> dict[str, tuple[Tensor, Tensor]]:
    """Per module (B, K, R) and (B, R, N): an expanded view when all rows agree, else stacked, zeros where absent."""
    distinct = {id(adapter): adapter for adapter in rows if adapter is not None}
    if not distinct:
        return {}
    num_rows = len(rows)
    first = next(iter(distinct.values()))
    if len(distinct) == 1 and None not in rows:
        return {p: (a.expand(num_rows, *a.shape), b.expand(num_rows, *b.shape)) for p, (a, b) in first.factors.items()}
    rank = max(adapter.rank for adapter in distinct.values())
    stacks: dict[str, tuple[Tensor, Tensor]] = {}
    for path in sorted({path for adapter in distinct.values() for path in adapter.factors}):
        a, b = next(adapter.factors[path] for adapter in distinct.values() if path in adapter.factors)
        a_BKR = a.new_zeros(num_rows, a.shape[0], rank)
        b_BRN = b.new_zeros(num_rows, rank, b.shape[1])
        for index, adapter in enumerate(rows):
            if adapter is not None and path in adapter.factors:
                row_a, row_b = adapter.factors[path]
                a_BKR[index, :, : row_a.shape[1]] = row_a
                b_BRN[index, : row_b.shape[0]] = row_b
        stacks[path] = (a_BKR, b_BRN)
    return stacks
