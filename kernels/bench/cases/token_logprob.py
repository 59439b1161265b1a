"""token_logprob: forward, and forward with backward, against eager and compiled PyTorch."""

from __future__ import annotations

import functools

import torch
from case import Case, Contender
from cltrain_kernels import token_logprob_reference
from cltrain_kernels.testing import assert_as_accurate_as_eager
from torch import Tensor

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
SHAPES = [(m, v) for v in (32_000, 151_936) for m in (1024, 8192)]


def cases(quick: bool) -> list[Case]:
    return [
        Case(
            "token_logprob",
            {"dtype": str(dtype), "M": m, "V": v},
            functools.partial(problem, v, dtype),
            functools.partial(contenders, m, v, dtype),
        )
        for m, v in ([(1024, 32_000)] if quick else SHAPES)
        for dtype in (DTYPES[:1] if quick else DTYPES)
    ]


def eager(logits_MV: Tensor, ids_M: Tensor) -> Tensor:
    return logits_MV.log_softmax(-1).gather(1, ids_M[:, None])[:, 0]


def draw(num_rows: int, num_vocabulary: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    rng = torch.Generator("cuda").manual_seed(0)
    logits = torch.randn(num_rows, num_vocabulary, generator=rng, device="cuda", dtype=torch.float32) * 3
    return logits.to(dtype), torch.randint(num_vocabulary, (num_rows,), generator=rng, device="cuda")


def problem(num_vocabulary: int, dtype: torch.dtype) -> str | None:
    from cltrain_kernels.token_logprob_triton import token_logprob_triton

    checks = (eager, token_logprob_reference) if dtype is torch.float32 else (eager,)  # the reference sums in float32
    for check in checks:
        try:
            assert_as_accurate_as_eager(token_logprob_triton, check, *draw(65, num_vocabulary, dtype))
        except AssertionError as error:
            return str(error)
    return None


def contenders(num_rows: int, num_vocabulary: int, dtype: torch.dtype) -> tuple[list[Contender], dict[str, str]]:
    from cltrain_kernels.token_logprob_triton import token_logprob_triton

    logits, ids = draw(num_rows, num_vocabulary, dtype)
    leaf = logits.detach().requires_grad_()
    found = []
    for name, op in {"ours": token_logprob_triton, "eager": eager, "compiled": torch.compile(eager)}.items():
        found.append(Contender(f"{name}_forward", lambda op=op: no_gradient(op(logits, ids))))
        found.append(Contender(f"{name}_both", lambda op=op: torch.autograd.grad(op(leaf, ids).sum(), leaf)[0]))
    return found, {}


def no_gradient(_: object) -> None:
    """A forward has no gradient to compare."""
