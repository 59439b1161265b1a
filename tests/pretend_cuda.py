"""A GPU played by the CPU, for code paths that only CUDA runs: where a tensor lies, what waits for the device, and what
a captured graph replays. The numbers are a CPU's, so a result can be compared with that of a run on one.

FakeTensorMode is no help where torch is built without CUDA: there autograd ends the process for want of a device guard.
Here a tensor lies on the device if its storage was put there, or computed from one that was. Left out: memory, streams,
speed, what a CUDA kernel does otherwise than a CPU's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import cltrain_kernels.attention
import pytest
import torch
import torch.nn.attention.varlen
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

CUDA, CPU = torch.device("cuda", 0), torch.device("cpu")
STORAGES: dict[int, StorageWeakRef] = {}  # what lies on the device; it outlives a test, as tables that ops cache do
READS = (
    "_local_scalar_dense",
    "nonzero",
    "masked_select",
    "unique",
    "equal.",
    "is_nonzero",
    "linalg_eig",
    "_linalg_eig",
)
INDEXED = ("aten.index.", "aten.index_put", "aten._index_put")


class Waits(RuntimeError):
    """Something waits for the device where nothing may."""


class Device:
    """Whether the host may wait for it just now, what did, and the graph that is being captured."""

    def __init__(self) -> None:
        self.may_wait = True
        self.waits: list[str] = []
        self.graphs: list[Graph] = []
        self.capturing: Graph | None = None

    def wait(self, what: str) -> None:
        self.waits.append(what)
        if self.capturing is not None or not self.may_wait:
            raise Waits(f"{what} waits for the device{' while a graph is captured' if self.capturing else ''}")

    def move(self, tensor: Tensor, where: torch.device, dtype: torch.dtype | None, copy: bool) -> Tensor:
        if (where.type == "cuda") == holds(tensor):
            return tensor.to(dtype or tensor.dtype, copy=copy)
        self.wait(f"a copy to {where.type}")
        moved = tensor.to(dtype or tensor.dtype, copy=True)
        return take(moved) if where.type == "cuda" else give(moved)


def holds(tensor: Tensor) -> bool:
    """Whether the device does."""
    found = STORAGES.get(tensor.untyped_storage()._cdata)
    return found is not None and not found.expired()


def take(tensor: Tensor) -> Tensor:
    storage = tensor.untyped_storage()
    STORAGES[storage._cdata] = StorageWeakRef(storage)
    return tensor


def give(tensor: Tensor) -> Tensor:
    STORAGES.pop(tensor.untyped_storage()._cdata, None)
    return tensor


class Names(TorchFunctionMode):
    """What Python says of devices: where a tensor lies, is made, is moved to, and what is read without an operation."""

    def __init__(self, device: Device) -> None:
        super().__init__()
        self.device = device

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, device, name = dict(kwargs or {}), self.device, getattr(function, "__name__", "")
        if function == Tensor.device.__get__:
            return CUDA if holds(args[0]) else CPU
        if function == Tensor.is_cuda.__get__:  # type: ignore[attr-defined]
            return holds(args[0])
        if function in (Tensor.cuda, Tensor.cpu):
            return device.move(args[0], torch.device(name), None, False)
        if function is Tensor.to:
            copy, asked = kwargs.pop("copy", False), [*args[1:], *kwargs.values()]
            asked += [kind for x in asked if isinstance(x, Tensor) for kind in (CUDA if holds(x) else CPU, x.dtype)]
            places = [torch.device(x) for x in asked if isinstance(x, torch.device | str)]
            dtype = next((x for x in asked if isinstance(x, torch.dtype)), None)
            return device.move(args[0], (places or [CUDA if holds(args[0]) else CPU])[0], dtype, copy)
        if function in (Tensor.tolist, Tensor.numpy, Tensor.new_tensor) and holds(args[0]):
            device.wait(name)
            made = function(*args, **kwargs)
            return take(made) if function is Tensor.new_tensor else made
        if kwargs.get("device") is not None and torch.device(kwargs["device"]).type == "cuda":
            if function in (torch.tensor, torch.as_tensor):
                device.wait(f"torch.{name}")
            return take(function(*args, **{**kwargs, "device": CPU}))
        return function(*args, **kwargs)


class Operations(TorchDispatchMode):
    """What is computed: nothing mixes devices, results lie where their inputs do, reads wait."""

    def __init__(self, device: Device) -> None:
        super().__init__()
        self.device = device

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, device, name = kwargs or {}, self.device, str(function)
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        if not any(map(holds, given)):
            return function(*args, **kwargs)
        strangers = [tuple(x.shape) for x in given if x.dim() and not holds(x)]  # a single number may come from the CPU
        is_indexed, is_copied = name.startswith(INDEXED), name.startswith("aten.copy_")
        is_masked = is_indexed and any(x is not None and x.dtype is torch.bool for x in args[1])
        is_read = any(name.startswith(f"aten.{read}") for read in READS)
        if is_masked or is_read or (strangers and (is_indexed or is_copied)):
            device.wait(name)
        elif strangers:
            raise RuntimeError(f"{name} got tensors on cuda, and on the CPU some of shape {strangers}")
        if device.capturing is not None:
            device.capturing.save(function, args, kwargs)
        found = function(*args, **kwargs)
        made = [x for x in tree_leaves(found) if isinstance(x, Tensor)]
        for one in made:
            if not is_copied:  # its result is its target, wherever that is
                take(one)
        if device.capturing is not None:
            device.capturing.calls.append((function, args, kwargs, given, made))
        return found


class Graph:
    """A CUDA graph: its capture leaves no trace in memory, its replay does the same operations on the same memory."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, Any, Any, list[Tensor], list[Tensor]]] = []
        self.num_replays = 0
        self._before: dict[int, tuple[torch.UntypedStorage, torch.UntypedStorage]] = {}

    def save(self, function: Any, args: Any, kwargs: Any) -> None:
        """Keep what `function` is about to overwrite."""
        arguments = function._schema.arguments
        given = {**{a.name: x for a, x in zip(arguments, args, strict=False)}, **kwargs}
        written = [given.get(a.name) for a in arguments if a.alias_info is not None and a.alias_info.is_write]
        for tensor in tree_leaves(written):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                self._before.setdefault(storage._cdata, (storage, storage.clone()))

    def restore(self) -> None:
        for storage, before in self._before.values():
            storage.copy_(before)

    def replay(self) -> None:
        self.num_replays += 1
        with _disable_current_modes(), torch._C.DisableTorchFunction(), torch.no_grad():
            for function, args, kwargs, given, made in self.calls:
                theirs = {x.untyped_storage()._cdata for x in given}
                found = [x for x in tree_leaves(function(*args, **kwargs)) if isinstance(x, Tensor)]
                for place, value in zip(made, found, strict=True):
                    if place.untyped_storage()._cdata not in theirs:
                        place.copy_(value)

    def pool(self) -> Graph:
        return self


class Stream:
    def wait_stream(self, _: Stream) -> None: ...


class Event:
    def __init__(self, **_: bool) -> None: ...

    def record(self) -> None: ...

    def elapsed_time(self, _: Event) -> float:
        return 1.0


def varlen_attn(
    query: Tensor, key: Tensor, value: Tensor, cu_seq_q: Tensor, cu_seq_k: Tensor, max_q: int, max_k: int, *,
    return_aux: Any = None, scale: float | None = None, window_size: tuple[int, int] = (-1, -1),
) -> Tensor:  # fmt: skip
    """torch 2.11's, causal: its signature, and what it asks of its arguments."""
    assert window_size == (-1, 0)
    assert query.shape == key.shape == value.shape, "it has no grouped heads"
    assert {x.dtype for x in (query, key, value)} <= {torch.float16, torch.bfloat16}
    assert all(x.is_cuda and x.stride(-1) == 1 for x in (query, key, value))
    assert cu_seq_q.is_cuda
    assert cu_seq_q.dtype is cu_seq_k.dtype is torch.int32
    places = torch.arange(len(query), device=query.device)
    segments = (places[:, None] >= cu_seq_q[None]).sum(1)
    mask = (segments[:, None] == segments[None]) & (places[:, None] >= places[None])
    q, k, v = (x.transpose(0, 1) for x in (query, key, value))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale).transpose(0, 1)


@contextmanager
def pretended(monkeypatch: pytest.MonkeyPatch) -> Iterator[Device]:
    """Inside the block torch behaves as if there were a GPU. The ops run their references there."""
    device = Device()
    names, run_backward, make_generator = Names(device), torch.autograd._engine_run_backward, torch.Generator

    @contextmanager
    def capture(graph: Graph, pool: Graph | None = None, stream: Stream | None = None) -> Iterator[None]:
        assert device.capturing is None
        device.capturing = graph
        device.graphs.append(graph)
        try:
            yield
        finally:
            device.capturing = None
            with _disable_current_modes():
                graph.restore()

    @contextmanager
    def entered(_: Stream) -> Iterator[None]:
        yield

    def run_seen(*args: Any, **kwargs: Any) -> Any:
        with names:  # off while it handles `backward`, inside of which autograd functions written in Python run
            return run_backward(*args, **kwargs)

    def set_sync_debug_mode(mode: str) -> None:
        device.may_wait = mode != "error"

    cuda: dict[str, Callable[..., Any]] = {
        "Stream": lambda *_: Stream(), "current_stream": lambda *_: Stream(), "stream": entered, "CUDAGraph": Graph,
        "graph": capture, "Event": Event, "set_sync_debug_mode": set_sync_debug_mode,
        **dict.fromkeys(("empty_cache", "synchronize", "reset_peak_memory_stats"), lambda: None),
        **dict.fromkeys(("memory_allocated", "max_memory_allocated"), lambda: 0),
    }  # fmt: skip
    for name, replacement in cuda.items():
        monkeypatch.setattr(torch.cuda, name, replacement)
    monkeypatch.setattr(torch, "Generator", lambda *_: make_generator())
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    monkeypatch.setattr(torch.autograd, "_engine_run_backward", run_seen)
    monkeypatch.setattr(torch.nn.attention.varlen, "varlen_attn", varlen_attn)
    monkeypatch.setenv("CLTRAIN_KERNELS", "reference")
    forget_choices()
    try:
        with Operations(device), names:
            yield device
    finally:
        forget_choices()


def forget_choices() -> None:
    """What the attention remembers of this torch."""
    for remembered in vars(cltrain_kernels.attention).values():
        if hasattr(remembered, "cache_clear"):
            remembered.cache_clear()
