"""Log-probability of chosen tokens: `log softmax(logits)[id]` per row, without ever storing a softmax.

This file holds the public function and its specification; `token_logprob_triton.py` holds the fast path.
M rows (tokens), V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cltrain_kernels.dispatch import implementation_for


def token_logprob(logits_MV: Tensor, ids_M: Tensor) -> Tensor:
    """float32 log-prob in nats of token `ids_M[m]` under row m; differentiable in the logits.

    Negative ids are ignored rows: their log-prob is 0 and their gradient is 0. An id >= V gives NaN. Logits may be
    float16, bfloat16, float32 or float64 and strided in any way; sums are float32 (float64 for float64 input, which
    always runs the reference). Raises ValueError on shapes, dtypes or devices that do not fit.
    """
    _check(logits_MV, ids_M)
    if logits_MV.dtype is not torch.float64 and implementation_for("token_logprob", logits_MV.device) == "triton":
        from cltrain_kernels.token_logprob_triton import token_logprob_triton

        return token_logprob_triton(logits_MV, ids_M)
    return token_logprob_reference(logits_MV, ids_M)


def token_logprob_reference(logits_MV: Tensor, ids_M: Tensor) -> Tensor:
    """The specification of `token_logprob`, in PyTorch."""
    _check(logits_MV, ids_M)
    num_vocabulary = logits_MV.shape[1]
    if logits_MV.dtype is not torch.float64:
        logits_MV = logits_MV.float()
    picked_M = logits_MV.gather(1, ids_M.long().clamp(0, num_vocabulary - 1)[:, None])[:, 0]
    logprob_M = picked_M - logits_MV.logsumexp(1)
    logprob_M = torch.where(ids_M < num_vocabulary, logprob_M, torch.nan)
    return torch.where(ids_M < 0, 0.0, logprob_M)


def _check(logits_MV: Tensor, ids_M: Tensor) -> None:
    if logits_MV.ndim != 2 or ids_M.ndim != 1 or logits_MV.shape[0] != ids_M.shape[0] or logits_MV.shape[1] < 1:
        raise ValueError(f"expected logits (M, V) and ids (M,); got {tuple(logits_MV.shape)} and {tuple(ids_M.shape)}")
    if not logits_MV.is_floating_point() or ids_M.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"expected float logits and int32 or int64 ids; got {logits_MV.dtype} and {ids_M.dtype}")
    if logits_MV.device != ids_M.device:
        raise ValueError(f"logits are on {logits_MV.device} but ids on {ids_M.device}")
