"""Which adapter tensors belong to a base, from its config.json alone. Imports no torch: preflight runs anywhere."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from cltrain.errors import ConfigError, DataError

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")

BLOCKS = {  # linear module -> where it sits in a layer
    "q_proj": "self_attn",
    "k_proj": "self_attn",
    "v_proj": "self_attn",
    "o_proj": "self_attn",
    "gate_proj": "mlp",
    "up_proj": "mlp",
    "down_proj": "mlp",
}


def check_family(config: dict[str, Any]) -> str:
    """The model_type of a supported base config. Raises DataError naming the supported ones."""
    family = str(config.get("model_type"))
    if family not in FAMILIES:
        raise DataError(f"base of type {family!r} is not supported; supported: {', '.join(FAMILIES)}")
    if config.get("quantization_config"):
        raise DataError("the base's weights are quantised: use the full-precision directory")
    return family


def module_shapes(config: dict[str, Any], targets: Sequence[str]) -> dict[str, tuple[int, int]]:
    """Module path -> (N out, K in) of every linear that `targets` adapts, in `module_order`.

    Raises ConfigError for a target that the base does not have, DataError for an unsupported or incomplete config.
    """
    check_family(config)
    unknown = [name for name in targets if name not in BLOCKS]
    if unknown or not targets:
        raise ConfigError(f"adapter.targets: {unknown or 'nothing'} cannot be adapted; choose from {', '.join(BLOCKS)}")
    try:
        hidden, inner = int(config["hidden_size"]), int(config["intermediate_size"])
        num_heads, num_layers = int(config["num_attention_heads"]), int(config["num_hidden_layers"])
    except KeyError as error:
        raise DataError(f"the base's config.json lacks {error}") from None
    head_dim = int(config.get("head_dim") or hidden // num_heads)
    kv_dim = int(config.get("num_key_value_heads") or num_heads) * head_dim
    sizes = {
        "q_proj": (num_heads * head_dim, hidden),
        "k_proj": (kv_dim, hidden),
        "v_proj": (kv_dim, hidden),
        "o_proj": (hidden, num_heads * head_dim),
        "gate_proj": (inner, hidden),
        "up_proj": (inner, hidden),
        "down_proj": (hidden, inner),
    }
    shapes = {f"model.layers.{i}.{BLOCKS[name]}.{name}": sizes[name] for i in range(num_layers) for name in targets}
    return dict(sorted(shapes.items(), key=lambda item: module_order(item[0])))


def module_order(module: str) -> tuple[tuple[int, str], ...]:
    """Sort key of module paths: layer numbers as numbers, names by the alphabet. The order of factors everywhere."""
    return tuple((int(part), "") if part.isdigit() else (-1, part) for part in module.split("."))


def tensor_names(module: str) -> tuple[str, str]:
    """The names of a module's A_RK and B_NR in an adapter file (PEFT's)."""
    return f"base_model.model.{module}.lora_A.weight", f"base_model.model.{module}.lora_B.weight"


def expected_shapes(config: dict[str, Any], targets: Sequence[str], rank: int) -> dict[str, tuple[int, int]]:
    """Tensor name -> shape of a complete adapter file for this base: A is (R, K), B is (N, R)."""
    shapes: dict[str, tuple[int, int]] = {}
    for module, (num_out, num_in) in module_shapes(config, targets).items():
        name_a, name_b = tensor_names(module)
        shapes[name_a] = (rank, num_in)
        shapes[name_b] = (num_out, rank)
    return shapes
