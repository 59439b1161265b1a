"""A GPU played by the CPU, for code paths that only CUDA runs: which device a tensor lies on, what waits for the
device, and what a captured graph replays. The numbers are a CPU's, so results can be compared with a run on one.

FakeTensorMode cannot do this where torch is built without CUDA: autograd asks for a CUDA device guard. Here a tensor is
"on cuda" when its storage was put there, or computed from one that was. Left out: memory, speed, streams, kernels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

CUDA, CPU = torch.device("cuda", 0), torch.device("cpu")
READS = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "equal", "is_nonzero", "linalg_eigh", "_linalg_eigh")


STORAGES: dict[int, StorageWeakRef] = {}  # what lies on the device; it outlives a test, as tables that ops cache do


class Waits(RuntimeError):
    """Something waits for the device where nothing may."""


class Device:
    """What lies on it, and whether the host may wait for it just now."""

    def __init__(self) -> None:
        self.may_wait = True
        self.waits: list[str] = []
        self.capturing: Graph | None = None

    def holds(self, tensor: Tensor) -> bool:
        found = STORAGES.get(tensor.untyped_storage()._cdata)
        return found is not None and not found.expired()

    def take(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        STORAGES[storage._cdata] = StorageWeakRef(storage)
        return tensor

    def give(self, tensor: Tensor) -> Tensor:
        STORAGES.pop(tensor.untyped_storage()._cdata, None)
        return tensor

    def wait(self, what: str) -> None:
        self.waits.append(what)
        if self.capturing is not None or not self.may_wait:
            raise Waits(f"{what} waits for the device{' while a graph is captured' if self.capturing else ''}")

    def place(self, tensor: Tensor) -> torch.device:
        return CUDA if self.holds(tensor) else CPU

    def move(self, tensor: Tensor, where: torch.device, dtype: torch.dtype | None, copy: bool, what: str) -> Tensor:
        if where.type == self.place(tensor).type:
            return tensor.to(dtype or tensor.dtype, copy=copy)
        self.wait(what)
        moved = tensor.to(dtype or tensor.dtype, copy=True)
        return self.take(moved) if where.type == "cuda" else self.give(moved)


class Names(TorchFunctionMode):
    """What Python says of devices: where a tensor lies, is made, is moved to, and what is read without an operation."""

    def __init__(self, device: Device) -> None:
        super().__init__()
        self.device = device

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, device, name = dict(kwargs or {}), self.device, getattr(function, "__name__", "")
        if function == Tensor.device.__get__:  # type: ignore[attr-defined]
            return device.place(args[0])
        if function == Tensor.is_cuda.__get__:  # type: ignore[attr-defined]
            return device.holds(args[0])
        if function is Tensor.to:
            copy = kwargs.pop("copy", False)
            if len(args) > 1 and isinstance(args[1], Tensor):
                return device.move(args[0], device.place(args[1]), args[1].dtype, copy, name)
            options = [*args[1:], *kwargs.values()]
            where = next((torch.device(x) for x in options if isinstance(x, torch.device | str)), device.place(args[0]))
            dtype = next((x for x in options if isinstance(x, torch.dtype)), None)
            return device.move(args[0], where, dtype, copy, name)
        if function in (Tensor.cuda, Tensor.cpu):
            return device.move(args[0], torch.device(name), None, False, name)
        if function in (Tensor.tolist, Tensor.numpy) and device.holds(args[0]):
            device.wait(name)
        if function is Tensor.new_tensor and device.holds(args[0]):
            device.wait(name)
            return device.take(function(*args, **kwargs))
        if kwargs.get("device") is not None and torch.device(kwargs["device"]).type == "cuda":
            kwargs["device"] = CPU
            if function in (torch.tensor, torch.as_tensor):
                device.wait(f"{name} of host numbers")
            return device.take(function(*args, **kwargs))
        return function(*args, **kwargs)


class Operations(TorchDispatchMode):
    """What is computed: no operation mixes devices, results lie where their inputs do, reads wait."""

    def __init__(self, device: Device) -> None:
        super().__init__()
        self.device = device

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, device, name = kwargs or {}, self.device, str(function)
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        if not any(map(device.holds, given)):
            return function(*args, **kwargs)
        elsewhere = [x for x in given if x.dim() and not device.holds(x)]
        is_indexed = name.startswith(("aten.index.", "aten.index_put", "aten._index_put"))
        is_masked = is_indexed and any(x is not None and x.dtype is torch.bool for x in args[1])
        if is_masked or any(name.startswith(f"aten.{read}") for read in READS):
            device.wait(name)
        elif elsewhere and (is_indexed or "aten.copy_" in name):
            device.wait(name)
        elif elsewhere:
            raise RuntimeError(f"{name} got tensors on cuda and on the CPU: {[tuple(x.shape) for x in elsewhere]}")
        if device.capturing is not None:
            device.capturing.save(function, args, kwargs)
        found = function(*args, **kwargs)
        made = [x for x in tree_leaves(found) if isinstance(x, Tensor)]
        if not ("aten.copy_" in name and not device.holds(args[0])):
            for one in made:
                device.take(one)
        if device.capturing is not None:
            device.capturing.calls.append((function, args, kwargs, given, made))
        return found


class Graph:
    """A CUDA graph: its capture leaves no trace in memory, its replay does the same operations on the same memory."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, Any, Any, list[Tensor], list[Tensor]]] = []
        self._before: dict[int, tuple[torch.UntypedStorage, torch.UntypedStorage]] = {}
        self.num_replays = 0

    def save(self, function: Any, args: Any, kwargs: Any) -> None:
        """Keep what `function` is about to write to."""
        names = [argument.name for argument in function._schema.arguments]
        named = {**dict(zip(names, args, strict=False)), **kwargs}
        written = [a.name for a in function._schema.arguments if a.alias_info is not None and a.alias_info.is_write]
        for tensor in tree_leaves([named.get(name) for name in written]):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                self._before.setdefault(storage._cdata, (storage, storage.clone()))

    def restore(self) -> None:
        for storage, before in self._before.values():
            storage.copy_(before)
        self._before.clear()

    def replay(self) -> None:
        self.num_replays += 1
        with _disable_current_modes(), torch._C.DisableTorchFunction(), torch.no_grad():
            for function, args, kwargs, given, made in self.calls:
                theirs = {x.untyped_storage()._cdata for x in given}
                found = [x for x in tree_leaves(function(*args, **kwargs)) if isinstance(x, Tensor)]
                for place, value in zip(made, found, strict=True):
                    if place.untyped_storage()._cdata not in theirs:
                        place.copy_(value)

    def pool(self) -> object:
        return self


class Stream:
    def wait_stream(self, _: Any) -> None: ...


@contextmanager
def nothing(*_: Any, **__: Any) -> Iterator[None]:
    yield


@contextmanager
def pretended(monkeypatch: pytest.MonkeyPatch) -> Iterator[Device]:
    """Inside the block torch behaves as if there were a GPU. The ops run their references there."""
    device = Device()

    @contextmanager
    def graph(graph: Graph, pool: Any = None) -> Iterator[None]:
        assert device.capturing is None
        device.capturing = graph
        try:
            yield
        finally:
            device.capturing = None
            with _disable_current_modes(), torch._C.DisableTorchFunction():
                graph.restore()

    replaced: dict[str, Callable[..., Any]] = {
        "Stream": Stream, "current_stream": Stream, "stream": nothing, "CUDAGraph": Graph, "graph": graph,
    }  # fmt: skip
    names, run_backward = Names(device), torch.autograd._engine_run_backward

    def run_seen(*args: Any, **kwargs: Any) -> Any:
        with names:  # a mode is off while it handles `backward`, within which autograd functions of Python run
            return run_backward(*args, **kwargs)

    monkeypatch.setattr(torch.autograd, "_engine_run_backward", run_seen)
    for name, value in replaced.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setenv("CLTRAIN_KERNELS", "reference")
    with ExitStack() as stack:
        stack.enter_context(Operations(device))
        stack.enter_context(names)
        yield device
