"""The batching loop: one thread owns the model, and every token step takes along whoever is there.

A new request joins at the next step, a finished one leaves at once; long prompts go in by chunks between the steps of
the others. Rows of one batch may use different adapters. No prefix reuse, no preemption.
"""

from __future__ import annotations

import logging
import math
import queue
import random
import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from cltrain.deploy.cache import SlotCache, visible
from cltrain.deploy.lora import Adapter, AdapterTable, RowLora
from cltrain.deploy.sampling import Sampling, Token, choose, score
from cltrain.errors import DataError, ServerError
from cltrain.models.base import Base, stop_ids

log = logging.getLogger(__name__)

Finish = Literal["stop", "length"]


@dataclass(frozen=True, slots=True)
class Delta:
    """What a row has to say after a step: new tokens; at its end the reason or error and the prompt's scores."""

    tokens: tuple[Token, ...]
    finish: Finish | None = None
    error: str | None = None
    prompt: tuple[Token | None, ...] | None = None  # the first token of a prompt has no prediction

    @property
    def is_last(self) -> bool:
        return self.finish is not None or self.error is not None


@dataclass(eq=False)
class Row:
    """One sequence being answered. It holds on to its adapter, which is its lease."""

    prompt_ids: tuple[int, ...]
    sampling: Sampling
    adapter: Adapter | None
    emit: Callable[[Delta], None]  # called from the engine's thread; must not block or raise
    is_streamed: bool = False  # False: one Delta at the end
    is_cancelled: bool = False
    slot: int = -1  # set while it is running
    num_cached: int = 0
    tokens: list[Token] = field(default_factory=list)
    prompt_scores: list[Token | None] = field(default_factory=lambda: [None])
    generator: random.Random = field(default_factory=random.Random)


class Engine:
    """Answers rows on one base with any of the loaded adapters. Close it to end its thread."""

    def __init__(
        self,
        base: Base,
        *,
        base_name: str = "base",
        max_batch: int = 16,
        max_adapters: int = 6,
        prefill_tokens: int = 512,
    ) -> None:
        self.base = base
        self.adapters = AdapterTable(base, base_name=base_name, max_adapters=max_adapters)
        self.stop_ids = stop_ids(base)
        self.num_steps = 0
        self._decoder, self._head = base.model.get_decoder(), base.model.get_output_embeddings()
        parameter = next(base.model.parameters())
        self._device, self._dtype = parameter.device, parameter.dtype
        self._lora = RowLora(base.model)
        self._cache = SlotCache(base.model.config, max_batch, self._device, self._dtype)
        self._free = list(range(max_batch))
        self._prefill_tokens = prefill_tokens
        self._inbox: queue.SimpleQueue[Row | None] = queue.SimpleQueue()
        self._waiting: deque[Row] = deque()
        self._prefilling: list[Row] = []
        self._decoding: list[Row] = []
        self._is_open = True
        self._thread = threading.Thread(target=self._run, name="cltrain-engine", daemon=True)
        self._thread.start()

    def submit(self, row: Row) -> None:
        """Queue a row. Raises DataError when it does not fit the context, ServerError when the engine is closed."""
        num_prompt, limit = len(row.prompt_ids), self.base.context
        if not num_prompt:
            raise DataError("The prompt is empty.")
        if num_prompt + row.sampling.max_tokens > limit:
            raise DataError(
                f"This model's maximum context length is {limit} tokens. However, you requested "
                f"{num_prompt + row.sampling.max_tokens} tokens ({num_prompt} in the prompt, "
                f"{row.sampling.max_tokens} in the completion)."
            )
        if not all(0 <= token < self._head.out_features for token in row.prompt_ids):
            raise DataError(f"The prompt has token ids outside the vocabulary of {self._head.out_features}.")
        if not self.is_alive:
            raise ServerError("the engine is closed")
        row.generator = random.Random(row.sampling.seed)
        self._inbox.put(row)

    def cancel(self, row: Row) -> None:
        """Drop a row at the next step; it says nothing more. Harmless when it has ended."""
        row.is_cancelled = True

    @property
    def is_alive(self) -> bool:
        return self._is_open and self._thread.is_alive()

    @property
    def num_running(self) -> int:
        """Rows that hold a slot or wait for one, roughly: the engine's thread moves them meanwhile."""
        return len(self._prefilling) + len(self._decoding) + len(self._waiting) + self._inbox.qsize()

    def close(self) -> None:
        """End the thread; rows still running get an error."""
        self._is_open = False
        self._inbox.put(None)
        self._thread.join(timeout=30)
        self._lora.close()

    def _run(self) -> None:
        try:
            with torch.inference_mode():
                while self._is_open:
                    self._admit()
                    if self._prefilling:
                        self._guard(self._prefill_group(), self._prefill)
                    if self._decoding:
                        self._guard(self._decoding.copy(), self._decode)
        finally:  # also when a bug ends the thread: nobody waits for ever
            self._is_open = False
            while not self._inbox.empty():
                if (late := self._inbox.get()) is not None:
                    self._waiting.append(late)
            for row in (*self._decoding, *self._prefilling, *self._waiting):
                row.emit(Delta((), error="the server is shutting down"))

    def _admit(self) -> None:
        for row in [row for row in (*self._prefilling, *self._decoding) if row.is_cancelled]:
            self._leave(row)
        is_idle = not (self._prefilling or self._decoding or self._waiting)
        if is_idle:
            self._lora.forget()
            self._cache.shrink()
        while is_idle or not self._inbox.empty():
            arrived = self._inbox.get()  # blocks only when there is nothing to do
            is_idle = False
            if arrived is not None:
                self._waiting.append(arrived)
        while self._waiting and self._free:
            row = self._waiting.popleft()
            if not row.is_cancelled:
                row.slot = self._free.pop(0)
                self._prefilling.append(row)

    def _guard(self, rows: list[Row], step: Callable[[list[Row]], None]) -> None:
        """A step that fails (out of memory, a broken kernel) costs its rows an error, never the server."""
        try:
            step(rows)
            self.num_steps += 1
        except Exception as error:  # whatever torch raises: the other requests go on
            log.exception("a step of %d rows failed", len(rows))
            for row in rows:
                if row.slot >= 0:
                    self._end(row, error=f"{type(error).__name__}: {error}")

    def _prefill_group(self) -> list[Row]:
        """The first rows in line whose padded chunks fit one step."""
        group: list[Row] = []
        longest = 0
        for row in self._prefilling:
            longest = max(longest, min(len(row.prompt_ids) - row.num_cached, self._prefill_tokens))
            if group and longest * (len(group) + 1) > self._prefill_tokens:
                break
            group.append(row)
        return group

    def _prefill(self, rows: list[Row]) -> None:
        room = self._prefill_tokens // len(rows)
        chunks = [row.prompt_ids[row.num_cached : row.num_cached + room] for row in rows]
        hidden_BTH = self._forward(rows, chunks)
        ended: list[tuple[Row, Tensor]] = []
        for index, (row, chunk) in enumerate(zip(rows, chunks, strict=True)):
            start, row.num_cached = row.num_cached, row.num_cached + len(chunk)
            if row.sampling.num_prompt_top is not None:
                targets = row.prompt_ids[start + 1 : row.num_cached + 1]
                if targets:
                    logits_TV = self._head(hidden_BTH[index, : len(targets)])
                    row.prompt_scores += score(logits_TV, targets, row.sampling.num_prompt_top)
            if row.num_cached == len(row.prompt_ids):
                ended.append((row, hidden_BTH[index, len(chunk) - 1]))
        for row in rows:
            self._prefilling.remove(row)
            (self._decoding if row.num_cached == len(row.prompt_ids) else self._prefilling).append(row)
        if ended:
            self._next_tokens([row for row, _ in ended], torch.stack([hidden_H for _, hidden_H in ended]))

    def _decode(self, rows: list[Row]) -> None:
        rows.sort(key=lambda row: row.slot)  # neighbouring slots are read without a copy
        hidden_B1H = self._forward(rows, [(row.tokens[-1].id,) for row in rows])
        for row in rows:
            row.num_cached += 1
        self._next_tokens(rows, hidden_B1H[:, 0])

    def _forward(self, rows: list[Row], chunks: Sequence[Sequence[int]]) -> Tensor:
        """Hidden states (B, T, H) of each row's next tokens, padded at the right to the longest chunk."""
        longest = max(len(chunk) for chunk in chunks)
        ids_BT = torch.tensor([[*chunk, *[0] * (longest - len(chunk))] for chunk in chunks], device=self._device)
        starts_B1 = torch.tensor([[row.num_cached] for row in rows], device=self._device)
        positions_BT = starts_B1 + torch.arange(longest, device=self._device)
        num_columns = max(row.num_cached for row in rows) + longest
        self._cache.place([row.slot for row in rows], positions_BT, num_columns)
        self._lora.use([row.adapter for row in rows])
        hidden: Tensor = self._decoder(
            input_ids=ids_BT,
            position_ids=positions_BT,
            attention_mask=self._masks(positions_BT, num_columns),
            past_key_values=self._cache,
            use_cache=True,
        ).last_hidden_state
        return hidden

    def _masks(self, positions_BT: Tensor, num_columns: int) -> Any:
        config = self.base.model.config
        window = getattr(config, "sliding_window", None)
        full = visible(positions_BT, num_columns, None, self._dtype)
        if config.model_type in ("qwen2", "qwen3"):  # their layers choose by kind
            masks = {"full_attention": full}
            if window and "sliding_attention" in config.layer_types:
                masks["sliding_attention"] = visible(positions_BT, num_columns, window, self._dtype)
            return masks
        return visible(positions_BT, num_columns, window, self._dtype) if window else full

    def _next_tokens(self, rows: list[Row], hidden_BH: Tensor) -> None:
        chosen = choose(self._head(hidden_BH), [(row.sampling, row.generator) for row in rows])
        for row, token in zip(rows, chosen, strict=True):
            if math.isnan(token.logprob):
                self._cache.wipe(row.slot)
                self._end(row, error="the model's output is not a number")
                continue
            row.tokens.append(token)
            if token.id in self.stop_ids and not row.sampling.ignore_eos:
                self._end(row, "stop")
            elif len(row.tokens) >= row.sampling.max_tokens:
                self._end(row, "length")
            elif row.is_streamed and not row.is_cancelled:
                row.emit(Delta((token,)))

    def _end(self, row: Row, finish: Finish | None = None, error: str | None = None) -> None:
        self._leave(row)
        if row.is_cancelled:
            return
        tokens = (row.tokens[-1:] if finish else []) if row.is_streamed else row.tokens
        prompt = tuple(row.prompt_scores) if row.sampling.num_prompt_top is not None else None
        row.emit(Delta(tuple(tokens), finish, error, prompt))

    def _leave(self, row: Row) -> None:
        (self._decoding if row in self._decoding else self._prefilling).remove(row)
        self._free.append(row.slot)
        self._free.sort()
        row.slot = -1
