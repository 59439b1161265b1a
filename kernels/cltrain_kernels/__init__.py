"""Fused operations for training. Each has a readable PyTorch reference that is its specification.

Importing this package imports neither triton nor a GPU driver: Triton code loads on its first use.
"""

from cltrain_kernels.dispatch import Implementation, implementation_for
from cltrain_kernels.token_logprob import token_logprob, token_logprob_reference

__all__ = ["Implementation", "implementation_for", "token_logprob", "token_logprob_reference"]
