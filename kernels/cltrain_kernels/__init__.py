"""Fused operations for training. Each has a readable PyTorch reference that is its specification.

Importing this package imports neither triton nor a GPU driver: Triton code loads on its first use.
"""

from cltrain_kernels.apply import Applied, apply, hidden_at
from cltrain_kernels.decoder import Adapters
from cltrain_kernels.dispatch import Implementation, implementation_for
from cltrain_kernels.linear_loss import frozen_head, linear_loss, linear_loss_reference
from cltrain_kernels.linear_loss_types import LinearLoss, Reference
from cltrain_kernels.lora_linear import (
    Norm,
    Projection,
    lora_linear,
    lora_linear_reference,
    lora_mlp,
    lora_mlp_reference,
)
from cltrain_kernels.rms_norm import rms_norm, rms_norm_reference
from cltrain_kernels.rope import rope, rope_reference
from cltrain_kernels.swiglu import swiglu, swiglu_reference
from cltrain_kernels.token_logprob import token_logprob, token_logprob_reference

__all__ = [
    "Adapters",
    "Applied",
    "Implementation",
    "LinearLoss",
    "Norm",
    "Projection",
    "Reference",
    "apply",
    "frozen_head",
    "hidden_at",
    "implementation_for",
    "linear_loss",
    "linear_loss_reference",
    "lora_linear",
    "lora_linear_reference",
    "lora_mlp",
    "lora_mlp_reference",
    "rms_norm",
    "rms_norm_reference",
    "rope",
    "rope_reference",
    "swiglu",
    "swiglu_reference",
    "token_logprob",
    "token_logprob_reference",
]
