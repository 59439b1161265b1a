"""Keys and values of every running row, at the row's own length, in a form that transformers' decoders accept.

A row's token at position p is written to column p and columns after it are masked, so what an earlier tenant or
padding left there is never seen. (B rows, H heads, T new tokens, L visible columns, D head size.)
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

GROW_TOKENS = 256


class SlotCache:
    """One slot per running row. `place` says which slots and positions the next forward writes and reads."""

    is_compileable = False
    is_sliding = (False,)

    def __init__(self, config: Any, num_slots: int, device: torch.device, dtype: torch.dtype) -> None:
        heads = config.num_key_value_heads
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        self._shape = (num_slots, heads, 0, head_dim)
        empty = torch.zeros(self._shape, device=device, dtype=dtype)
        self._keys = [empty] * config.num_hidden_layers
        self._values = [empty] * config.num_hidden_layers
        self._slots: Tensor | slice = slice(0, 0)
        self._rows_B1 = torch.zeros(0, 1, dtype=torch.long, device=device)
        self._positions_BT = torch.zeros(0, 0, dtype=torch.long, device=device)
        self._num_columns = 0

    def place(self, slots: list[int], positions_BT: Tensor, num_columns: int) -> None:
        if num_columns > self._keys[0].shape[2]:
            self._grow(num_columns)
        index = torch.tensor(slots, device=positions_BT.device)
        is_range = slots == list(range(slots[0], slots[0] + len(slots)))
        self._slots = slice(slots[0], slots[0] + len(slots)) if is_range else index
        self._rows_B1 = index[:, None]
        self._positions_BT = positions_BT
        self._num_columns = num_columns

    def update(self, keys_BHTD: Tensor, values_BHTD: Tensor, layer: int, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Called by every attention layer: write the new columns, return all visible ones, (B, H, L, D)."""
        keys, values = self._keys[layer], self._values[layer]
        keys[self._rows_B1, :, self._positions_BT] = keys_BHTD.transpose(1, 2)
        values[self._rows_B1, :, self._positions_BT] = values_BHTD.transpose(1, 2)
        return keys[self._slots, :, : self._num_columns], values[self._slots, :, : self._num_columns]

    def get_seq_length(self, *_: Any) -> int:
        return 0  # positions and masks are always given

    def wipe(self, slot: int) -> None:
        """Zero a slot: a masked NaN is still a NaN for the next tenant."""
        for layer in (*self._keys, *self._values):
            layer[slot] = 0

    def shrink(self) -> None:
        """Give the memory back; called when no row is running and the columns have grown beyond the first step."""
        if self._keys[0].shape[2] > GROW_TOKENS:
            empty = self._keys[0].new_zeros(self._shape)
            self._keys = [empty] * len(self._keys)
            self._values = [empty] * len(self._values)

    def _grow(self, num_columns: int) -> None:
        wanted = max(2 * self._keys[0].shape[2], -(-num_columns // GROW_TOKENS) * GROW_TOKENS)
        for layers in (self._keys, self._values):
            for index, old in enumerate(layers):
                layers[index] = old.new_zeros(*old.shape[:2], wanted, old.shape[3])
                layers[index][:, :, : old.shape[2]] = old


def visible(positions_BT: Tensor, num_columns: int, window: int | None, dtype: torch.dtype) -> Tensor:
    """Additive mask (B, 1, T, L): 0 where a token may look, the dtype's lowest number elsewhere."""
    columns_L = torch.arange(num_columns, device=positions_BT.device)
    is_hidden = columns_L > positions_BT[:, None, :, None]
    if window is not None:
        is_hidden |= columns_L <= positions_BT[:, None, :, None] - window
    return torch.zeros(is_hidden.shape, device=positions_BT.device, dtype=dtype).masked_fill_(
        is_hidden, torch.finfo(dtype).min
    )
