"""A decoder run over a packed bucket, with the attention that suits its device and dtype.

`mask` is SDPA with a dense mask and does everything; `segments` is one causal SDPA per segment, for CPUs; `varlen` is
torch's variable-length flash attention, for half precision on CUDA. The last two need segments that are rows.
"""

from __future__ import annotations

import functools
import inspect
import logging
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from cltrain_kernels.apply import is_applied
from cltrain_kernels.decoder import picked
from cltrain_kernels.packing import Packed

log = logging.getLogger(__name__)

Attention = Literal["mask", "segments", "varlen"]
NAME = "cltrain_packed"  # under which transformers knows `_attend`

# (device, half precision, tree) -> what runs. CPU: 1024 tokens in 8 segments, forward and backward, one thread, 120 ms
# by mask and 20 ms by segments; 1 segment: 131 and 75. CUDA: by reasoning, a measurement is owed (kernels/README.md).
TABLE: dict[tuple[str, bool, bool], Attention] = {
    ("cpu", False, False): "segments",
    ("cpu", True, False): "segments",
    ("cuda", True, False): "varlen",
}


def attention_for(device: torch.device, dtype: torch.dtype, *, is_tree: bool) -> Attention:
    """The attention for buckets of rows or of trees; logged once for each choice."""
    chosen = TABLE.get((device.type, dtype in (torch.float16, torch.bfloat16), is_tree), "mask")
    if chosen == "varlen" and _varlen() is None:
        _say_once("this torch has no varlen_attn: packed rows attend through a dense mask")
        return "mask"
    _say_once(f"packed {'trees' if is_tree else 'rows'} in {dtype} on {device.type} attend by {chosen}")
    return chosen


def packed_hidden(
    backbone: Any, packed: Packed, attention: Attention, places_M: Tensor | None = None
) -> Tensor:  # fmt: skip
    """Final hidden states hidden_TD of a bucket from the decoder under a Llama, Qwen2, Qwen3 or Mistral.

    With `places_M` only those there, hidden_MD: where the fused ops run, the last layer works for no other token behind
    its attention. Raises ValueError for a tree that `attention` cannot do, and where a segment is longer than a sliding
    window.
    """
    if packed.is_tree and attention != "mask":
        raise ValueError(f"{attention} attention knows rows only, and the bucket holds a tree: use mask")
    if (window := _window(backbone.config)) is not None and len(packed.ids_T) > window:
        raise ValueError(
            f"a bucket of {len(packed.ids_T)} tokens does not fit a sliding window of {window}: use smaller buckets"
        )
    extra: dict[str, Any] = {}
    if attention == "mask":
        extra["attention_mask"] = dense_mask(packed)[None, None]
    elif attention == "segments":
        extra["segment_starts"] = [start for start in packed.starts_S.tolist() if start < len(packed.ids_T)]
    else:
        extra["segment_starts"] = packed.starts_S
    if places_M is not None and is_applied(backbone):
        extra["places_M"] = places_M
    before = backbone.config._attn_implementation
    try:
        backbone.config._attn_implementation = "sdpa" if attention == "mask" else _registered()
        output = backbone(input_ids=packed.ids_T[None], position_ids=packed.positions_T[None], use_cache=False, **extra)
    finally:
        backbone.config._attn_implementation = before
    if "places_M" in extra:
        return output.last_hidden_state
    hidden_TD: Tensor = output.last_hidden_state[0]
    return hidden_TD if places_M is None else picked(hidden_TD, places_M)


def dense_mask(packed: Packed) -> Tensor:
    """mask_TT: whether the place of a row sees the place of a column."""
    places_T = torch.arange(len(packed.ends_T), device=packed.ends_T.device)
    return (places_T[None] <= places_T[:, None]) & (places_T[:, None] < packed.ends_T[None])


def _attend(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, scaling: float | None = None,
    dropout: float = 0.0, segment_starts: list[int] | Tensor | None = None, **_: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """(1, heads, T, head) each -> (1, T, heads, head), every segment by itself."""
    assert segment_starts is not None
    assert attention_mask is None
    if isinstance(segment_starts, Tensor):
        return _attend_varlen(query, key, value, scaling, segment_starts), None
    num = query.shape[2]
    sizes = [end - start for start, end in zip(segment_starts, [*segment_starts[1:], num], strict=True)]
    parts = zip(*(x.split(sizes, dim=2) for x in (query, key, value)), strict=True)
    is_grouped = query.shape[1] != key.shape[1]
    attended = [
        F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling, enable_gqa=is_grouped)
        for q, k, v in parts
    ]
    return torch.cat(attended, dim=2).transpose(1, 2), None


def _attend_varlen(query: Tensor, key: Tensor, value: Tensor, scaling: float | None, starts_S: Tensor) -> Tensor:
    attend, causal = _varlen()  # type: ignore[misc]
    groups = query.shape[1] // key.shape[1]
    query, key, value = (x[0].transpose(0, 1) for x in (query, key, value))
    if groups > 1:
        key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
    num = query.shape[0]  # the bucket's size: lengths of segments would be numbers of the device
    attended: Tensor = attend(query, key, value, starts_S, starts_S, num, num, scale=scaling, **causal)
    return attended[None]


@functools.cache
def _varlen() -> tuple[Any, dict[str, Any]] | None:
    """torch's varlen_attn and how this version is told to be causal; None where there is none."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    names = inspect.signature(varlen_attn).parameters
    if "scale" not in names:
        return None
    if "window_size" in names:
        return varlen_attn, {"window_size": (-1, 0)}
    return (varlen_attn, {"is_causal": True}) if "is_causal" in names else None


def _window(config: Any) -> int | None:
    """The sliding window that some layer uses, in tokens."""
    kinds = getattr(config, "layer_types", None)
    is_sliding = "sliding_attention" in kinds if kinds else getattr(config, "use_sliding_window", True)
    window = getattr(config, "sliding_window", None)
    return int(window) if is_sliding and window else None


@functools.cache
def _registered() -> str:
    from transformers import AttentionInterface

    AttentionInterface.register(NAME, _attend)
    return NAME


@functools.cache
def _say_once(text: str) -> None:
    log.info(text)
