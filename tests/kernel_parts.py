"""Random tiny models of four families with PEFT adapters that matter, for the tests of what runs their decoders."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cltrain_kernels import Applied, apply
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

VOCABULARY = 97
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"mlp_bias": True, "attention_bias": True},
    "mistral": {"sliding_window": 5},
    "qwen2": {"use_sliding_window": True, "sliding_window": 5, "layer_types": ["full_attention", "sliding_attention"]},
    "qwen3": {},
}


def make_base(family: str, **options: Any) -> Any:
    config = AutoConfig.for_model(
        family, vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, max_position_embeddings=64,
        initializer_range=0.08, **{**FAMILIES.get(family, {}), **options},
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config)
        for name, parameter in model.named_parameters():  # biases and norms that are not trivial
            if name.endswith("bias") or "norm" in name:
                parameter.data += 0.2 * torch.randn_like(parameter)
    return model


def make(family: str, targets: list[str] | str = TARGETS, base: Any = None, **lora: Any) -> Any:
    """A PEFT model with a random adapter that matters."""
    base = base or make_base(family)
    config = LoraConfig(r=4, lora_alpha=8, target_modules=targets, **lora)
    model = get_peft_model(base, config)
    fill(model, seed=1)
    return model.train()


def fill(model: Any, seed: int, adapter: str = "default") -> None:
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if f".{adapter}." in name or name.endswith(f".{adapter}"):
            parameter.data.copy_(0.3 * torch.randn(parameter.shape, generator=generator))


def batch(seed: int = 0, shape: tuple[int, int] = (2, 11)) -> Tensor:
    return torch.randint(VOCABULARY, shape, generator=torch.Generator().manual_seed(seed))


def step(model: Any, ids: Tensor, **inputs: Any) -> tuple[float, dict[str, Tensor]]:
    """Loss and the gradients of everything that is trained."""
    model.zero_grad()
    loss = model(input_ids=ids, labels=ids, **inputs).loss
    loss.backward()
    return float(loss.detach()), gradients_of(model)


def gradients_of(model: Any) -> dict[str, Tensor]:
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def applied(model: Any) -> Applied:
    done = apply(model)
    assert done.why_not is None, done.why_not
    return done


def assert_same(ours: tuple[float, dict[str, Tensor]], theirs: tuple[float, dict[str, Tensor]]) -> None:
    """Equal within 1e-5 of the whole gradient in float32; in single small tensors ten times that is rounding."""
    assert ours[0] == pytest.approx(theirs[0], rel=1e-6)
    assert ours[1].keys() == theirs[1].keys()
    errors = {name: float((ours[1][name] - gradient).norm()) for name, gradient in theirs[1].items()}
    sizes = {name: float(gradient.norm()) for name, gradient in theirs[1].items()}
    assert sum(e**2 for e in errors.values()) ** 0.5 < 1e-5 * sum(s**2 for s in sizes.values()) ** 0.5
    worst = max(errors, key=lambda name: errors[name] / sizes[name])
    assert errors[worst] < 1e-4 * sizes[worst], worst
