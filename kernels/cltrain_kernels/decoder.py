"""The decoder of Llama, Mistral, Qwen2 and Qwen3 models with LoRA, run by the ops of this package.

It reads the weights from the model's own modules at each call, so names, saving and loading stay as they are. Attention
and its masks stay those of transformers. Caches, returned attentions or hidden states, gradient checkpointing, hooks
and dropout are not done here: `apply.py` leaves such calls to the model's own forward.

B rows, T tokens, D hidden, M chosen tokens, R rank.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cltrain_kernels.lora_linear import Norm, Projection, lora_linear, lora_mlp
from cltrain_kernels.rms_norm import rms_norm
from cltrain_kernels.rope import rope

IN_ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
IN_MLP = ("gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class Adapters:
    """Several adapters in one batch: each token is computed by `names[slot]` and trains that one only; -1 is none."""

    names: tuple[str, ...]
    slot_BT: Tensor  # int64


def decode(
    decoder: Any,
    hidden_BTD: Tensor,
    attention_mask: Any = None,
    position_ids: Tensor | None = None,
    places_M: Tensor | None = None,
    adapters: Adapters | None = None,
    **attention: Any,
) -> Tensor:
    """Final hidden states (B, T, D), or (M, D) only those at `places_M` of the flattened tokens: for all others the
    last layer then ends with its attention. `attention` goes to the attention function (cu_seq_lens, for one)."""
    windows = [_window(layer.self_attn) for layer in decoder.layers]
    masks = _masks(decoder.config, windows, hidden_BTD, attention_mask, position_ids)  # given ones may tell of packing
    if position_ids is None:
        position_ids = torch.arange(hidden_BTD.shape[1], device=hidden_BTD.device)[None]
    tables = decoder.rotary_emb(hidden_BTD, position_ids=position_ids)
    x = hidden_BTD
    for i, (layer, window) in enumerate(zip(decoder.layers, windows, strict=True)):
        attn, mlp = layer.self_attn, layer.mlp
        mixed_BTN = _attend(attn, x, _norm(layer.input_layernorm), tables, masks[window], window, adapters, attention)
        if places_M is not None and i == len(decoder.layers) - 1:
            x, mixed_BTN = (picked(t.flatten(0, 1), places_M) for t in (x, mixed_BTN))
            adapters = adapters and Adapters(adapters.names, adapters.slot_BT.flatten()[places_M])
        x = x + lora_linear(mixed_BTN, [_projection(attn.o_proj, adapters)])[0]
        gate, up, down = (_projection(getattr(mlp, name), adapters) for name in IN_MLP)
        x = x + lora_mlp(x, gate, up, down, _norm(layer.post_attention_layernorm))
    return rms_norm(x, decoder.norm.weight, decoder.norm.variance_epsilon)


def check_adapters(adapters: Adapters, linears: Iterable[Any]) -> None:
    """Raise ValueError where tokens would get the numbers of the bare or merged base instead of their adapter's."""
    adapted = [module for module in linears if hasattr(module, "lora_A")]
    there = {name for module in adapted for name in module.lora_A}
    if missing := [name for name in adapters.names if name not in there]:
        raise ValueError(f"no module has an adapter {missing[0]!r}; there are {', '.join(sorted(there)) or 'none'}")
    if len(set(adapters.names)) < len(adapters.names):
        raise ValueError(f"an adapter has one slot, but a name repeats: {', '.join(adapters.names)}")
    for module in adapted:
        if module.merged or module.disable_adapters:
            state = "merged into the base" if module.merged else "disabled"
            raise ValueError(f"adapters are {state}, so no slot would get its own: undo that first")


def with_slots(hidden_BTD: Tensor, adapters: Adapters) -> Tensor:
    """Embedded tokens whose slots all exist. ValueError for another shape, and on a CPU for slots beyond the names;
    elsewhere nobody waits for the device and such tokens are NaN."""
    slots, num = adapters.slot_BT, len(adapters.names)
    if slots.shape != hidden_BTD.shape[:2]:
        raise ValueError(f"slots of shape {tuple(slots.shape)} for tokens of shape {tuple(hidden_BTD.shape[:2])}")
    is_beyond_BT = (slots < -1) | (slots >= num)
    if slots.device.type != "cpu":
        return hidden_BTD.masked_fill(is_beyond_BT[..., None], torch.nan)
    if is_beyond_BT.any():
        raise ValueError(f"slot {int(slots[is_beyond_BT][0])} is beyond the {num} adapters; -1 is none")
    return hidden_BTD


def picked(x_TD: Tensor, places_M: Tensor) -> Tensor:
    """Rows at places that may repeat, whose gradients then add up in the same order each time: on a CPU those of
    index_select do, on CUDA those of an index."""
    return x_TD.index_select(0, places_M) if x_TD.device.type == "cpu" else x_TD[places_M]


def _attend(
    attn: Any,
    x_BTD: Tensor,
    norm: Norm,
    tables: tuple[Tensor, Tensor],
    mask: Any,
    window: int | None,
    adapters: Adapters | None,
    options: dict[str, Any],
) -> Tensor:
    """What the heads of one layer say (B, T, N), before its output projection."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    projections = [_projection(getattr(attn, name), adapters) for name in IN_ATTENTION[:3]]
    q, k, v = (y.unflatten(-1, (-1, attn.head_dim)) for y in lora_linear(x_BTD, projections, norm))
    if hasattr(attn, "q_norm"):
        q = rms_norm(q, attn.q_norm.weight, attn.q_norm.variance_epsilon)
        k = rms_norm(k, attn.k_norm.weight, attn.k_norm.variance_epsilon)
    q, k = rope(q, *tables), rope(k, *tables)
    attention = ALL_ATTENTION_FUNCTIONS[attn.config._attn_implementation]
    mixed_BTHD, _ = attention(
        attn,
        *(heads.transpose(1, 2) for heads in (q, k, v)),
        mask,
        dropout=attn.attention_dropout if attn.training else 0.0,
        scaling=attn.scaling,
        sliding_window=window,
        **options,
    )
    return mixed_BTHD.flatten(2)


def _projection(module: Any, adapters: Adapters | None) -> Projection:
    """What a linear layer computes now: PEFT's switches (active, disabled, merged) are read at each call."""
    base = getattr(module, "base_layer", module)
    if base is module:
        return Projection(base.weight, base.bias)
    names = [name for name in (adapters.names if adapters else module.active_adapters) if name in module.lora_A]
    if module.disable_adapters or module.merged or not names:
        return Projection(base.weight, base.bias)
    a_RK = [module.lora_A[name].weight for name in names]
    b_NR = [module.lora_B[name].weight for name in names]
    if adapters is None and len(names) == 1:
        return Projection(base.weight, base.bias, a_RK[0], b_NR[0], module.scaling[names[0]])
    blocks = list(zip(names, a_RK, strict=True))  # filled on the device: a copy from the host would wait for it
    scale = torch.cat([torch.full((len(a),), module.scaling[name], device=a.device) for name, a in blocks])
    if adapters is not None:
        slots = [torch.full((len(a),), adapters.names.index(name), device=a.device) for name, a in blocks]
        scale = scale * (adapters.slot_BT.reshape(-1, 1) == torch.cat(slots))
    return Projection(base.weight, base.bias, torch.cat(a_RK), torch.cat(b_NR, dim=1), scale)


def _norm(module: Any) -> Norm:
    return Norm(module.weight, module.variance_epsilon)


def _window(attn: Any) -> int | None:
    """The sliding window of a layer's attention: Qwen's know theirs, all of Mistral's have the config's."""
    if hasattr(attn, "sliding_window"):
        return attn.sliding_window
    return attn.config.sliding_window if attn.config.model_type == "mistral" else None


def _masks(
    config: Any, windows: list[int | None], hidden_BTD: Tensor, attention_mask: Any, position_ids: Tensor | None
) -> dict[int | None, Any]:
    """The mask for each window, made by transformers for whatever attention the model uses.

    In positions it looks for packed sequences, for which it waits for the device; without any there are none.
    """
    from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask

    if isinstance(attention_mask, dict):  # already made, as `generate` does
        return {w: attention_mask["full_attention" if w is None else "sliding_attention"] for w in set(windows)}
    common = {
        "config": config,
        "inputs_embeds": hidden_BTD,
        "attention_mask": attention_mask,
        "past_key_values": None,
        "position_ids": position_ids,
    }
    makers = {w: create_causal_mask if w is None else create_sliding_window_causal_mask for w in set(windows)}
    return {window: make(**common) for window, make in makers.items()}
