"""Fused operations for training. Each has a readable PyTorch reference that is its specification.

Importing this package imports neither triton nor a GPU driver: Triton code loads on its first use.
"""

from cltrain_kernels.dispatch import Implementation, implementation_for
from cltrain_kernels.linear_loss import frozen_head, linear_loss, linear_loss_reference
from cltrain_kernels.linear_loss_types import LinearLoss, Reference
from cltrain_kernels.token_logprob import token_logprob, token_logprob_reference

__all__ = [
    "Implementation",
    "LinearLoss",
    "Reference",
    "frozen_head",
    "implementation_for",
    "linear_loss",
    "linear_loss_reference",
    "token_logprob",
    "token_logprob_reference",
]
