"""Forward and backward of a LoRA step, r = 16 on all linears, of 0.5B and 8B models with random weights in bfloat16:
our ops and loss head against PEFT under transformers, and under Liger where it is installed.

No gradient checkpointing anywhere; the same packed tokens, labels and attention for all; B drawn at random. PEFT runs
in both of its ways to hold adapters: float32 under autocast, and bfloat16. Correctness is checked against float64 on
two layers of the same widths. Not here: torch.compile, which takes longer than the whole run may, and the optimiser.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from case import Case, Contender, installed
from cltrain_kernels import Applied, apply, hidden_at, linear_loss
from torch import Tensor

MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "0.5B": (
        "qwen2",
        {"hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24, "num_attention_heads": 14,
         "num_key_value_heads": 2, "vocab_size": 151_936, "tie_word_embeddings": True},
    ),
    "8B": (
        "llama",
        {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
         "num_key_value_heads": 8, "vocab_size": 128_256, "tie_word_embeddings": False},
    ),
}  # fmt: skip
RANK = 16


def cases(quick: bool) -> list[Case]:
    sizes = [("0.5B", 1024, 0.3)] if quick else [("0.5B", 512, 0.3), ("0.5B", 2048, 0.3), ("8B", 4096, 0.3)]
    return [
        Case(
            "step",
            {"model": name, "tokens": t, "supervised": p, "R": RANK, "dtype": "torch.bfloat16"},
            functools.partial(problem, name),
            functools.partial(contenders, name, t, p),
        )
        for name, t, p in sizes
    ]


class Step:
    """One PEFT model and batch, and the ways to run them."""

    def __init__(self, name: str, num_tokens: int, supervised: float, num_layers: int | None = None) -> None:
        from peft import LoraConfig, get_peft_model
        from transformers import AutoConfig, AutoModelForCausalLM

        family, sizes = MODELS[name]
        sizes = {**sizes, **({"num_hidden_layers": num_layers} if num_layers else {})}
        config = AutoConfig.for_model(family, use_cache=False, **sizes)
        torch.manual_seed(0)
        with torch.device("cuda"):
            base = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
            lora = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear", task_type="CAUSAL_LM")
            self.model = get_peft_model(base, lora).train()
        self.applied: Applied | None = None
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        for parameter in self.parameters:
            torch.nn.init.normal_(parameter, std=0.02)
        generator = torch.Generator().manual_seed(1)
        self.ids = torch.randint(sizes["vocab_size"], (1, num_tokens), generator=generator)
        is_answer = torch.arange(num_tokens) % 32 >= round(32 * (1 - supervised))
        self.labels = torch.where(is_answer, self.ids, -100)

    def ours(self) -> Tensor:
        self.hold_adapters_in(torch.float32)
        if self.applied is None:
            self.applied = apply(self.model)
            assert self.applied.why_not is None, self.applied.why_not
        targets = self.labels[0].roll(-1)
        targets[-1] = -100
        places = (targets >= 0).nonzero()[:, 0]
        head_VD = self.model.get_base_model().get_output_embeddings().weight
        hidden_MD = hidden_at(self.model, self.ids.cuda(), places.cuda())
        weights_M = torch.full((len(places),), 1 / len(places))
        return self.gradient(linear_loss(hidden_MD, head_VD, targets[places], weights_M).loss)

    def peft(self, adapters: torch.dtype) -> Tensor:
        if self.applied is not None:
            self.applied.remove()
            self.applied = None
        self.hold_adapters_in(adapters)
        with torch.autocast("cuda", torch.bfloat16, enabled=adapters is torch.float32):
            loss = self.model(input_ids=self.ids.cuda(), labels=self.labels.cuda()).loss
        return self.gradient(loss)

    def liger(self) -> Tensor:
        """Changes the model for good: the last contender."""
        self.patch_by_liger()
        return self.peft(torch.float32)

    @functools.cache  # noqa: B019  (one model in each case)
    def patch_by_liger(self) -> None:
        from liger_kernel import transformers as liger

        base = self.model.get_base_model()
        getattr(liger, f"apply_liger_kernel_to_{base.config.model_type}")(model=base)

    def hold_adapters_in(self, dtype: torch.dtype) -> None:
        for parameter in self.parameters:
            parameter.data = parameter.data.to(dtype)

    def gradient(self, loss: Tensor) -> Tensor:
        return torch.cat([g.flatten() for g in torch.autograd.grad(loss, self.parameters)])


def problem(name: str) -> str | None:
    """Our gradient is at most twice as far from float64 as PEFT's under autocast, over all factors of two layers."""
    step = Step(name, 256, 0.3, num_layers=2)
    ours, theirs = step.ours().double(), step.peft(torch.float32).double()
    step.model.double()
    loss = step.model(input_ids=step.ids.cuda(), labels=step.labels.cuda()).loss
    true = step.gradient(loss)
    error, limit = float((ours - true).norm() / true.norm()), 2 * float((theirs - true).norm() / true.norm())
    return None if error <= limit else f"gradient: relative error {error:.3g} exceeds {limit:.3g}, twice PEFT's"


def contenders(name: str, num_tokens: int, supervised: float) -> tuple[list[Contender], dict[str, str]]:
    step = Step(name, num_tokens, supervised)
    found = [
        Contender("ours", step.ours),
        Contender("peft_autocast", functools.partial(step.peft, torch.float32)),
        Contender("peft_bfloat16", functools.partial(step.peft, torch.bfloat16)),
    ]
    reason = installed("liger_kernel")
    return [*found, *([] if reason else [Contender("liger", step.liger)])], {"liger": reason} if reason else {}
