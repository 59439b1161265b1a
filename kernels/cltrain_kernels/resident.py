"""A trainer that stays: the model, its LoRA state in flat buffers and, on CUDA, one captured graph per bucket live on
between updates. An adapter comes in and goes out by copying; nothing is built, wrapped or captured again for it.

An update happens whole or not at all: whatever goes wrong, values, moments and count are those from before it. What it
leaves out: which rows to learn from and how bounds are kept; that is the caller's, by `penalize` and `project`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from cltrain_kernels.adamw import AdamW, Corners, adamw_step, refresh
from cltrain_kernels.attention import attention_for, packed_hidden
from cltrain_kernels.flat import Factors, FlatLoRA
from cltrain_kernels.linear_loss import frozen_head, linear_loss
from cltrain_kernels.packing import Bucket, Packed, Row, Segment, moved, pack, pack_all, segment

NUM_WARMUP = 3  # runs before a capture, so that libraries have chosen their kernels and workspaces


@dataclass(frozen=True, slots=True)
class Outcome:
    """What each step measured: its loss before the step, and its gradient's norm before clipping."""

    losses: list[float]
    norms: list[float]


class Resident:
    """One model with its LoRA factors in flat buffers, ready for updates of any number of steps.

    `model` is a causal language model of transformers in eval mode, wrapped by PEFT or not; `live` are its factors,
    module -> (A_RK, B_NR), and nothing else of it may require gradients. Not for several threads at once.
    """

    def __init__(
        self,
        model: Any,
        live: Mapping[str, tuple[Parameter, Parameter]],
        buckets: Sequence[Bucket],
        settings: AdamW,
        corners: Corners | None = None,
    ) -> None:
        """Take over the factors. Raises ValueError for a model in training mode, other trainable parameters, an output
        layer with an adapter, no bucket."""
        model = model.get_base_model() if hasattr(model, "peft_config") else model
        ours = {id(p) for pair in live.values() for p in pair}
        others = [name for name, p in model.named_parameters() if p.requires_grad and id(p) not in ours]
        if others:
            raise ValueError(f"{others[0]} (and {len(others) - 1} more) would get gradients that nobody uses: freeze")
        if model.training:
            raise ValueError("the model is in training mode: a resident trainer has no dropout; call model.eval()")
        if not buckets:
            raise ValueError("a resident trainer needs at least one bucket")
        self.buckets = tuple(buckets)
        self.settings, self.corners = settings, corners
        self.state = FlatLoRA(live)
        self._backbone, self._head_VD = model.model, frozen_head(model.get_output_embeddings())
        self._dtype, self._device = next(model.parameters()).dtype, self.state.values.device
        self._rates_2 = self.state.values.new_zeros(2)
        self._loss = self.state.values.new_zeros((), dtype=torch.float32)
        self._norm = self.state.values.new_zeros(())
        self._backup = [buffer.clone() for buffer in self._kept()]
        self._inputs: dict[tuple[Bucket, bool], Packed] = {}  # what the captured graphs read
        self._graphs: dict[object, Any] = {}

    def update(
        self,
        batches: Sequence[Sequence[Segment]],
        rates: Sequence[tuple[float, float]],
        *,
        start: Factors | None = None,
        penalize: Callable[[FlatLoRA], object] | None = None,
        project: Callable[[FlatLoRA], object] | None = None,
        write: Callable[[dict[str, tuple[Tensor, Tensor]]], object] | None = None,
    ) -> Outcome:
        """One step for each batch, with its rates of A and of B; the loss is the weighted sum of the rows' NLL in nats.

        `start`: begin with these factors and fresh moments, instead of going on. `penalize` may add to the gradients
        before a step and `project` may move the values after it; neither may wait for the device. `write` gets the
        result, and when it fails the update fails.

        Raises ValueError for batches that fit no bucket or predict nothing, RuntimeError for a loss or gradient that is
        not finite and when memory runs out. After any error the state is what it was.
        """
        if not batches or len(batches) != len(rates):
            raise ValueError(f"an update needs a batch and a pair of rates per step; got {len(batches)}, {len(rates)}")
        packed = [pack_all(batch, self.buckets) for batch in batches]
        self._back_up()
        try:
            return self._update(packed, rates, start, penalize, project, write)
        except BaseException as error:
            self._roll_back()
            if is_out_of_memory(error):
                largest = max(one.bucket for batch in packed for one in batch)
                raise RuntimeError(
                    f"out of memory in an update with buckets up to {largest}: the adapter is as before; make the "
                    f"largest bucket smaller ({error})"
                ) from error
            raise

    def prepare(self) -> None:
        """On CUDA, capture the graphs of all buckets now, for rows. Elsewhere there is nothing to do."""
        if self._device.type != "cuda":
            return
        self._back_up()
        row = replace(segment([Row((0, 0), (0.0, 1.0))]), predictions=((0, 0, 0.0),))
        for bucket in self.buckets:
            self._accumulate(pack([row], bucket))
        self._run("step", self._step)
        self._roll_back()

    def _update(
        self,
        packed: Sequence[Sequence[Packed]],
        rates: Sequence[tuple[float, float]],
        start: Factors | None,
        penalize: Callable[[FlatLoRA], object] | None,
        project: Callable[[FlatLoRA], object] | None,
        write: Callable[[dict[str, tuple[Tensor, Tensor]]], object] | None,
    ) -> Outcome:
        self.state.check()
        if start is not None:
            self.state.load(start)
            self.state.forget_moments()
            refresh(self.state, self.corners)
        if self._device.type == "cuda":  # all of it now: later a copy from the host would wait for the steps before it
            packed = [[moved(one, self._device) for one in batch] for batch in packed]
        table_N2 = torch.tensor(rates, dtype=self._rates_2.dtype).to(self._device)
        measured_N2 = torch.empty_like(table_N2)
        for step, batch in enumerate(packed):
            self.state.zero_gradients()
            self._loss.zero_()
            self._rates_2.copy_(table_N2[step])
            for one in batch:
                self._accumulate(one)
            if penalize is not None:
                penalize(self.state)
            self._run("step", self._step)
            if project is not None:
                project(self.state)
                refresh(self.state, self.corners)
            measured_N2[step, 0] = self._loss
            measured_N2[step, 1] = self._norm
        losses, norms = measured_N2.T.tolist()  # the only wait for the device
        if not torch.isfinite(measured_N2).all() or not torch.isfinite(self.state.values).all():
            raise RuntimeError(f"the update is not finite (losses {losses}, gradient norms {norms}): nothing changed")
        if write is not None:
            write(self.state.factors())
        return Outcome(losses, norms)

    def _accumulate(self, packed: Packed) -> None:
        """Add the gradients of one bucket and its loss."""
        if self._device.type == "cuda":
            key = (packed.bucket, packed.is_tree)
            if key not in self._inputs:
                self._inputs[key] = moved(packed, self._device)
            inputs = self._inputs[key]
            copy_into(inputs, packed)
            self._run(key, lambda: self._add_gradients(inputs))
        else:
            self._add_gradients(packed)

    def _add_gradients(self, packed: Packed) -> None:
        is_captured = self._device.type == "cuda"
        attention = attention_for(self._device, self._dtype, is_tree=packed.is_tree, is_captured=is_captured)
        hidden_MD = packed_hidden(self._backbone, packed, attention, packed.sources_M)
        loss = linear_loss(hidden_MD, self._head_VD, packed.targets_M, packed.weights_M).loss
        loss.backward()  # type: ignore[no-untyped-call, unused-ignore]
        self._loss += loss.detach()

    def _step(self) -> None:
        self._norm.copy_(adamw_step(self.state, self._rates_2, self.settings, self.corners))

    def _run(self, key: object, function: Callable[[], None]) -> None:
        """Call `function`; on CUDA replay its graph, captured at the first call under this key."""
        if self._device.type != "cuda":
            function()
            return
        if key not in self._graphs:
            self._graphs[key] = self._captured(function)
        self._graphs[key].replay()

    def _captured(self, function: Callable[[], None]) -> Any:
        """A CUDA graph of `function`, with everything that its warm-up runs changed put back."""
        changed = [*self._kept(), self.state.gradients, self._loss, self._norm]
        before = [buffer.clone() for buffer in changed]
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(NUM_WARMUP):
                function()
        torch.cuda.current_stream().wait_stream(stream)
        for buffer, kept in zip(changed, before, strict=True):
            buffer.copy_(kept)
        graph = torch.cuda.CUDAGraph()
        others = next(iter(self._graphs.values()), None)  # no graph leaves anything in its pool: all may share one
        with torch.cuda.graph(graph, pool=others.pool() if others is not None else None):
            function()
        return graph

    def _back_up(self) -> None:
        for kept, buffer in zip(self._backup, self._kept(), strict=True):
            kept.copy_(buffer)

    def _roll_back(self) -> None:
        for kept, buffer in zip(self._backup, self._kept(), strict=True):
            buffer.copy_(kept)
        refresh(self.state, self.corners)

    def _kept(self) -> tuple[Tensor, ...]:
        """All that makes a difference to the next update."""
        return self.state.values, self.state.means, self.state.squares, self.state.num_steps


def copy_into(inputs: Packed, packed: Packed) -> None:
    """Overwrite a bucket's tensors with those of another batch of the same bucket."""
    for field in fields(packed):
        place, value = getattr(inputs, field.name), getattr(packed, field.name)
        if isinstance(place, Tensor):
            place.copy_(value)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error means that a device, or the host, has no memory left."""
    said = str(error)
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or (
        isinstance(error, RuntimeError) and "DefaultCPUAllocator" in said
    )
