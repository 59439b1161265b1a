"""Runs a PEFT model's decoder by the ops of this package, and undoes it: one attribute is set, no module is replaced.

What does not fit is left to the model's own modules, for good or for one call, with one line in the log that says why.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cltrain_kernels.decoder import IN_ATTENTION, IN_MLP, Adapters, check_adapters, decode, picked, with_slots

log = logging.getLogger(__name__)

DECODERS = {
    ("transformers.models.llama.modeling_llama", "LlamaModel"),
    ("transformers.models.mistral.modeling_mistral", "MistralModel"),
    ("transformers.models.qwen2.modeling_qwen2", "Qwen2Model"),
    ("transformers.models.qwen3.modeling_qwen3", "Qwen3Model"),
}
BASES = {("torch.nn.modules.linear", "Linear"), ("bitsandbytes.nn.modules", "Linear4bit")}
ADAPTED = {("peft.tuners.lora.layer", "Linear"), ("peft.tuners.lora.bnb", "Linear4bit")}


@dataclass(frozen=True)
class Applied:
    """What `apply` did to a model's decoder; `why_not` is None where the ops run."""

    decoder: Any
    why_not: str | None

    def remove(self) -> None:
        """Give the decoder its own forward back. A second call does nothing."""
        if self.why_not is None:
            self.decoder.__dict__.pop("forward", None)


def apply(peft_model: Any) -> Applied:
    """Let the ops run the decoder of a PEFT LoRA model (Llama, Mistral, Qwen2 or Qwen3), if all of it fits.

    Parameters keep their names and identity: PEFT saves, loads, disables and switches adapters as ever. A model that
    does not fit stays as it is, and the log says why.
    """
    decoder = decoder_of(peft_model)
    why_not = _why_not(peft_model, decoder)
    if why_not is None:
        decoder.forward = _Forward(decoder)
        device = decoder.embed_tokens.weight.device
        _say_once(logging.INFO, f"LoRA by fused ops on {device}")
    else:
        _say_once(logging.WARNING, f"LoRA by PEFT's own modules: {why_not}")
    return Applied(decoder, why_not)


def hidden_at(
    model: Any, input_ids_BT: Tensor, places_M: Tensor, adapters: Adapters | None = None, **kwargs: Any
) -> Tensor:
    """hidden_MD, the final hidden states at `places_M` of the flattened tokens of a PeftModel or *ForCausalLM.

    Where the ops run, the last layer works for those tokens alone behind its attention. `adapters` needs the ops:
    ValueError without them, for a name that no module has, while adapters are merged or disabled, and for slots that
    do not fit. Slots on a CPU are read for that; to read them elsewhere would be to wait for the device, so there a
    token whose slot is beyond the names becomes NaN.
    """
    decoder = decoder_of(model)
    kwargs = {"input_ids": input_ids_BT, "use_cache": False, **kwargs}
    if is_applied(decoder):
        return decoder(places_M=places_M, adapters=adapters, **kwargs).last_hidden_state
    if adapters is not None:
        raise ValueError("several adapters in one batch need the fused ops: apply() them to this model first")
    return picked(decoder(**kwargs).last_hidden_state.flatten(0, 1), places_M)


def decoder_of(model: Any) -> Any:
    """The decoder under a *ForCausalLM or a PeftModel around one; None where there is no such thing."""
    return getattr(model.get_base_model() if hasattr(model, "peft_config") else model, "model", None)


def is_applied(decoder: Any) -> bool:
    """Whether the ops run this decoder."""
    return isinstance(decoder.__dict__.get("forward"), _Forward)


class _Forward:
    """The decoder's forward: the ops', or its own for calls that they do not do.

    It remembers the decoder's modules and looks again when an adapter came or went: to walk them at each call would
    take longer than a small step.
    """

    def __init__(self, decoder: Any) -> None:
        self.decoder = decoder
        self._linears = [module for _, module in _linears(decoder)]
        self._look()

    def __call__(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Any = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        places_M: Tensor | None = None,
        adapters: Adapters | None = None,
        **kwargs: Any,
    ) -> Any:
        from transformers.modeling_outputs import BaseModelOutputWithPast

        decoder = self.decoder
        why_not = _why_not_call(decoder, position_ids, past_key_values, use_cache, kwargs) or self._why_not_now()
        if why_not is None:
            if (input_ids is None) == (inputs_embeds is None):
                raise ValueError("give either input_ids or inputs_embeds")
            hidden_BTD = decoder.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
            if adapters is not None:
                check_adapters(adapters, self._linears)
                hidden_BTD = with_slots(hidden_BTD, adapters)
            with torch.autocast(hidden_BTD.device.type, enabled=False):  # it would cast what is in one dtype already
                hidden = decode(decoder, hidden_BTD, attention_mask, position_ids, places_M, adapters, **kwargs)
            return BaseModelOutputWithPast(last_hidden_state=hidden)
        _say_once(logging.INFO, f"a call is left to the model's own forward: {why_not}")
        if adapters is not None:
            raise ValueError(f"several adapters in one batch need the fused ops, which cannot run: {why_not}")
        output = type(decoder).forward(
            decoder, input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids,
            past_key_values=past_key_values, inputs_embeds=inputs_embeds, use_cache=use_cache, **kwargs,
        )  # fmt: skip
        if places_M is not None:
            output.last_hidden_state = picked(output.last_hidden_state.flatten(0, 1), places_M)
        return output

    def _look(self) -> None:
        self._modules = list(self.decoder.layers.modules())
        self._factors = self._ids_of_factors()
        self._why_not_layers = _why_not_layers(self.decoder)

    def _why_not_now(self) -> str | None:
        if self._ids_of_factors() != self._factors:
            self._look()
        if any(_has_hooks(module) for module in self._modules):
            return "a module of the layers has hooks"
        return self._why_not_layers

    def _ids_of_factors(self) -> list[int]:
        return [id(a) for m in self._linears if "lora_A" in m._modules for a in m._modules["lora_A"]._modules.values()]


def _why_not(peft_model: Any, decoder: Any) -> str | None:
    """Why the ops cannot run this model; None where they can."""
    kinds = {str(getattr(c.peft_type, "value", c.peft_type)) for c in getattr(peft_model, "peft_config", {}).values()}
    if kinds != {"LORA"}:
        return f"adapters of kind {', '.join(sorted(kinds)) or 'none'}, not LORA"
    if _kind(decoder) not in DECODERS:
        return f"{type(decoder).__name__} is none of {', '.join(sorted(name for _, name in DECODERS))}"
    if "forward" in decoder.__dict__:
        return "the decoder's forward is replaced already"
    if decoder.config.hidden_act != "silu":
        return f"hidden_act = {decoder.config.hidden_act!r}, not silu"
    from peft.utils.other import AuxiliaryTrainingWrapper  # whole layers and tokens that are trained too

    ours = {id(module) for _, module in _linears(decoder)}
    for name, module in peft_model.named_modules():
        is_lora_elsewhere = hasattr(module, "lora_A") and id(module) not in ours
        if is_lora_elsewhere or isinstance(module, AuxiliaryTrainingWrapper):
            return f"{name} is adapted too, not only the projections of attention and MLP"
    return _why_not_layers(decoder)


def _why_not_layers(decoder: Any) -> str | None:
    dtype = decoder.embed_tokens.weight.dtype
    for name, module in _linears(decoder):
        base = getattr(module, "base_layer", module)
        if _kind(base) not in BASES or (base is not module and _kind(module) not in ADAPTED):
            return f"{name} is a {type(module).__name__} over a {type(base).__name__}"
        if base.weight.requires_grad or (base.bias is not None and base.bias.requires_grad):
            return f"{name}: the base's own weight or bias is trained"
        if base.weight.dtype is not dtype and getattr(base.weight, "quant_state", None) is None:
            return f"{name} is {base.weight.dtype}, the embedding {dtype}"
        for adapter in getattr(module, "lora_A", ()):
            if adapter in module.lora_variant or getattr(module, "fan_in_fan_out", False):
                return f"{name}: adapter {adapter!r} is a variant of LoRA (DoRA, for one)"
            if module.lora_B[adapter].bias is not None:
                return f"{name}: adapter {adapter!r} has a bias"
            if not isinstance(module.lora_dropout[adapter], torch.nn.Identity):
                return f"{name}: adapter {adapter!r} has dropout"
    for name, module in decoder.named_modules():
        if name.endswith("norm") and (module.weight.requires_grad or module.weight.dtype is not dtype):
            return f"{name} is trained, or not {dtype} as the embedding is"
    return None


def _why_not_call(
    decoder: Any, position_ids: Tensor | None, past_key_values: Any, use_cache: bool | None, kwargs: dict[str, Any]
) -> str | None:
    """Why the ops cannot do this call; None where they can."""
    # By default transformers makes a cache in training too. Nobody reads it there, but it also hides packed positions.
    by_default = use_cache is None and decoder.config.use_cache
    if use_cache or past_key_values is not None:
        return "it uses a cache"
    if by_default and (position_ids is not None or not torch.is_grad_enabled()):
        return "it uses a cache; use_cache=False would not"
    for option in ("output_hidden_states", "output_attentions"):
        if kwargs.get(option) or getattr(decoder.config, option, False):
            return f"it asks for {option}"
    if kwargs.get("return_dict") is False:
        return "it asks for a tuple"
    if decoder.training and getattr(decoder, "gradient_checkpointing", False):
        return "gradient checkpointing is on"
    weight = decoder.embed_tokens.weight
    if (
        torch.is_autocast_enabled(weight.device.type)
        and torch.get_autocast_dtype(weight.device.type) is not weight.dtype
    ):
        return f"autocast asks for another dtype than the base's {weight.dtype}"
    return None


def _has_hooks(module: Any) -> bool:
    if not (module._forward_hooks or module._forward_pre_hooks or module._backward_hooks):
        return "_hf_hook" in module.__dict__  # accelerate's, which replace the forward
    hooks = (*module._forward_hooks.values(), *module._forward_pre_hooks.values(), *module._backward_hooks.values())
    # transformers leaves its own behind, which do nothing unless a call asks for outputs
    return any(getattr(hook, "__module__", "") != "transformers.utils.output_capturing" for hook in hooks)


def _linears(decoder: Any) -> Iterator[tuple[str, Any]]:
    for i, layer in enumerate(decoder.layers):
        for block, names in ((layer.self_attn, IN_ATTENTION), (layer.mlp, IN_MLP)):
            for name in names:
                yield f"layers.{i}.{name}", getattr(block, name)


def _kind(module: Any) -> tuple[str, str]:
    return type(module).__module__, type(module).__qualname__


@functools.cache
def _say_once(level: int, text: str) -> None:
    log.log(level, text)
