"""A decoder run over a packed bucket, with the attention that suits its device and dtype.

`mask` is SDPA with a dense mask and does everything; `chains` is one causal SDPA per chain of the tries, over its own
keys and those above it: never more work than the rows by themselves, but shapes that change with the batch; `varlen`
is torch's variable-length flash attention, for rows in half precision on CUDA.
"""

from __future__ import annotations

import functools
import inspect
import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from cltrain_kernels.apply import decoder_of, hidden_at, is_applied
from cltrain_kernels.decoder import picked
from cltrain_kernels.packing import Chain, Packed, Row, moved, pack, segment

log = logging.getLogger(__name__)

Attention = Literal["mask", "chains", "varlen"]
NAME = "cltrain_packed"  # under which transformers knows `attend`
MIN_SHARED = 16  # tokens of a common beginning that are worth an attention of their own
MAX_MASK = 1 << 22  # numbers in the mask of one chain (16 MiB of float32)


def attention_for(device: torch.device, dtype: torch.dtype, *, is_tree: bool, is_captured: bool = False) -> Attention:
    """The attention for buckets of rows or of trees, in a CUDA graph or not; logged once for each choice.

    CPU, one thread, forward and backward of 1024 tokens in 8 rows: 20 ms by chains, 120 ms by mask. CUDA: by reasoning,
    a measurement is owed (kernels/README.md).
    """
    is_half_on_cuda = device.type == "cuda" and dtype in (torch.float16, torch.bfloat16)
    chosen: Attention = "mask" if is_captured else "chains"
    if is_half_on_cuda and not is_tree:
        if _varlen() is not None:
            chosen = "varlen"
        else:
            _say_once(f"this torch has no varlen_attn: packed rows attend by {chosen}")
    _say_once(f"packed {'trees' if is_tree else 'rows'} in {dtype} on {device.type} attend by {chosen}")
    return chosen


def rows_hidden(model: Any, rows_ids: Sequence[Sequence[int]], wanted: Sequence[Sequence[int]]) -> Tensor:
    """hidden_MD, final hidden states of a PeftModel or *ForCausalLM at tokens `wanted[i]` of each row i, in order.

    Where the ops run (see `apply`), the rows lie side by side and what they begin with alike (MIN_SHARED tokens or
    more) is there once; elsewhere, and for rows longer than a sliding window, they are padded to the longest. Every row
    must have a token.
    """
    decoder = decoder_of(model)
    embedding_VD = decoder.embed_tokens.weight
    longest = max(len(ids) for ids in rows_ids)
    window = _window(decoder.config)
    if not is_applied(decoder) or (window is not None and longest > window):
        # Padded on the right, which no real token sees: with causal attention no mask is needed.
        ids_BT = torch.tensor([[*ids, *[0] * (longest - len(ids))] for ids in rows_ids], device=embedding_VD.device)
        padded = [i * longest + t for i, chosen in enumerate(wanted) for t in chosen]
        return hidden_at(model, ids_BT, torch.tensor(padded, dtype=torch.long, device=embedding_VD.device))
    trie = segment([Row(tuple(ids), (0.0,) * len(ids)) for ids in rows_ids], MIN_SHARED)
    places: list[int] = []
    for i, chosen in enumerate(wanted):
        of_row = trie.places(i)
        places += [of_row[t] for t in chosen]
    one = replace(trie, predictions=((0, 0, 0.0),))
    packed = moved(pack([one], one.size), embedding_VD.device)
    attention = attention_for(embedding_VD.device, embedding_VD.dtype, is_tree=packed.is_tree)
    return packed_hidden(decoder, packed, attention, torch.tensor(places, dtype=torch.long, device=embedding_VD.device))


def packed_hidden(
    backbone: Any, packed: Packed, attention: Attention, places_M: Tensor | None = None
) -> Tensor:  # fmt: skip
    """Final hidden states hidden_TD of a bucket from the decoder under a Llama, Qwen2, Qwen3 or Mistral.

    With `places_M` only those there, hidden_MD: where the fused ops run, the last layer works for no other token behind
    its attention. Raises ValueError for a tree by `varlen`, and where the bucket (by `chains`: a row) is longer than a
    sliding window.
    """
    if packed.is_tree and attention == "varlen":
        raise ValueError("varlen attention knows rows only, and the bucket holds a tree: use mask or chains")
    longest = packed.longest if attention == "chains" else len(packed.ids_T)
    if (window := _window(backbone.config)) is not None and longest > window:
        raise ValueError(f"{longest} tokens do not fit a sliding window of {window}: use smaller buckets")
    extra: dict[str, Any] = {"parts": parts_of(packed, attention, backbone.embed_tokens.weight.dtype)}
    if places_M is not None and is_applied(backbone):
        extra["places_M"] = places_M
    before = backbone.config._attn_implementation
    try:
        backbone.config._attn_implementation = _registered()
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


@dataclass(frozen=True, slots=True)
class Run:
    """A chain with the mask of its own queries and all keys that they see; None where causal attention needs none."""

    chain: Chain
    mask: Tensor | None


Parts = tuple[Run, ...] | Tensor  # or the mask_TT of `mask`, in booleans, or the int32 starts_S of `varlen`


def parts_of(packed: Packed, attention: Attention, dtype: torch.dtype) -> Parts:
    """What `attend` is told, once for all layers: a mask is kept for the backward, and by each that made its own."""
    if attention == "mask":
        return dense_mask(packed)
    if attention == "varlen":
        return packed.starts_S
    return tuple(Run(chain, _mask_of(chain, packed, dtype)) for chain in packed.chains)


def _mask_of(chain: Chain, packed: Packed, dtype: torch.dtype) -> Tensor | None:
    num = chain.end - chain.begin
    num_seen = num + sum(packed.chains[i].end - packed.chains[i].begin for i in chain.above)
    if 2 * num >= num_seen or num * num_seen > MAX_MASK:
        return None
    mask = torch.full((num, num_seen), -torch.inf, dtype=dtype, device=packed.ids_T.device)
    return mask.triu(num_seen - num + 1)


def attend(query: Tensor, key: Tensor, value: Tensor, parts: Parts, scaling: float | None = None) -> Tensor:
    """Packed attention, (1, heads, T, head) each -> (1, T, heads, head). Its gradients repeat to the bit."""
    if query.device.type == "cpu" or not torch.is_grad_enabled():
        return _attended(query, key, value, parts, scaling)
    return _Repeatable.apply(parts, scaling, query, key, value)


def _attend_for_transformers(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, scaling: float | None = None,
    dropout: float = 0.0, parts: Parts | None = None, **_: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    assert parts is not None
    assert attention_mask is None
    return attend(query, key, value, parts, scaling), None


class _Repeatable(torch.autograd.Function):
    """The backward with deterministic kernels: CUDA's attentions add up in any order unless they are told not to. They
    alone are: all of torch, told so, would refuse whatever has no such kernel."""

    @staticmethod
    def forward(
        ctx: Any,
        parts: Parts,
        scaling: float | None,
        query: Tensor,
        key: Tensor,
        value: Tensor,
    ) -> Tensor:
        with torch.enable_grad():
            query, key, value = (x.detach().requires_grad_() for x in (query, key, value))
            attended = _attended(query, key, value, parts, scaling)
        ctx.inputs, ctx.attended = (query, key, value), attended
        return attended.detach()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Any, ...]:
        with _deterministic():
            return None, None, *torch.autograd.grad(ctx.attended, ctx.inputs, upstream)


@contextmanager
def _deterministic() -> Iterator[None]:
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # else torch refuses products, should there be any
    more: Any = torch.utils.deterministic
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    fills = more.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    more.fill_uninitialized_memory = False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        more.fill_uninitialized_memory = fills


def _attended(query: Tensor, key: Tensor, value: Tensor, parts: Parts, scaling: float | None) -> Tensor:
    if isinstance(parts, Tensor):
        if parts.dtype is not torch.bool:
            return _attend_varlen(query, key, value, scaling, parts)
        return _masked(query, key, value, parts, scaling).transpose(1, 2)
    sizes = [run.chain.end - run.chain.begin for run in parts]
    queries, keys, values = (x.split(sizes, dim=2) for x in (query, key, value))
    attended = []
    for i, run in enumerate(parts):
        seen = (*run.chain.above, i)
        k, v = (torch.cat([of[j] for j in seen], dim=2) if run.chain.above else of[i] for of in (keys, values))
        attended.append(_attend_run(queries[i], k, v, run.mask, scaling))
    return torch.cat(attended, dim=2).transpose(1, 2)


def _attend_run(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float | None) -> Tensor:
    """Causal attention of the last tokens of a row over all of it. Without a mask the queries before them are zeros,
    whose answers nobody reads: as much work as the row by itself, and no memory for a mask."""
    if mask is not None:
        return _masked(query, key, value, mask, scaling)
    num_before = key.shape[2] - query.shape[2]
    query = F.pad(query, (0, 0, num_before, 0)) if num_before else query
    is_grouped = query.shape[1] != key.shape[1]
    whole = F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling, enable_gqa=is_grouped)
    return whole[:, :, num_before:]


def _masked(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scaling: float | None) -> Tensor:
    groups = query.shape[1] // key.shape[1]
    if query.device.type == "cpu":
        return F.scaled_dot_product_attention(query, key, value, mask, scale=scaling, enable_gqa=groups > 1)
    # On CUDA a mask and groups together would leave the fast kernels.
    key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
    return F.scaled_dot_product_attention(query, key, value, mask, scale=scaling)


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

    AttentionInterface.register(NAME, _attend_for_transformers)
    return NAME


@functools.cache
def _say_once(text: str) -> None:
    log.info(text)
