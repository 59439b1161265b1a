"""attention over packed tokens at the heads of 0.5B and 8B, forward and backward to the queries: 4096 tokens in 8 rows,
and a tree of a prompt of 1536 tokens with 16 branches of 160, each by every way that can do it."""

from __future__ import annotations

import functools
import random
from collections.abc import Callable

import torch
from case import Case, Contender
from cltrain_kernels import attention as attending
from cltrain_kernels.attention import Attention
from cltrain_kernels.packing import Bucket, Packed, Row, moved, pack, segment
from torch import Tensor

HEADS = {"0.5B": (14, 2, 64), "8B": (32, 8, 128)}
DEVICE = torch.device("cuda")


def cases(quick: bool) -> list[Case]:
    return [
        Case(
            "attention",
            {"model": model, "of": "tree" if is_tree else "rows", "dtype": "torch.bfloat16"},
            functools.partial(problem, model, is_tree),
            functools.partial(contenders, model, is_tree),
        )
        for model in (["0.5B"] if quick else HEADS)
        for is_tree in (False, True)
    ]


def draw(is_tree: bool, num_tokens: int = 4096) -> Packed:
    rng = random.Random(0)

    def ids(num: int) -> tuple[int, ...]:
        return tuple(rng.randrange(30_000) for _ in range(num))

    if is_tree:
        prompt = ids(num_tokens * 3 // 8)
        rows = [prompt + ids(num_tokens * 5 // 128) for _ in range(16)]
        segments = [segment([Row(one, (0.0,) + (1.0,) * (len(one) - 1)) for one in rows])]
    else:
        cuts = sorted(rng.sample(range(64, num_tokens - 64, 64), 7))
        sizes = [end - begin for begin, end in zip([0, *cuts], [*cuts, num_tokens], strict=True)]
        segments = [segment([Row(ids(size), (0.0,) + (1.0,) * (size - 1))]) for size in sizes]
    return moved(pack(segments, Bucket(num_tokens, num_tokens, 8)), DEVICE)


def inputs(model: str, num_tokens: int, dtype: torch.dtype = torch.bfloat16) -> list[Tensor]:
    """Queries, keys, values and the upstream gradient, (1, heads, T, head) each."""
    heads, kv_heads, size = HEADS[model]
    generator = torch.Generator(device=DEVICE).manual_seed(1)
    return [
        torch.randn(1, num, num_tokens, size, generator=generator, device=DEVICE).to(torch.bfloat16).to(dtype)
        for num in (heads, kv_heads, kv_heads, heads)
    ]


def gradient(how: Attention, packed: Packed, tensors: list[Tensor]) -> Tensor:
    query, key, value, upstream = tensors
    query, key, value = (x.detach().requires_grad_() for x in (query, key, value))
    parts = attending.parts_of(packed, how, query.dtype)
    attending.attend(query, key, value, parts).backward(upstream.transpose(1, 2))
    grads = [x.grad for x in (query, key, value)]
    return torch.cat([grad.flatten() for grad in grads if grad is not None])


def ways(packed: Packed) -> list[Attention]:
    found: list[Attention] = ["chains", "mask"]
    if DEVICE.type == "cuda" and not packed.is_tree and attending._varlen() is not None:
        found.append("varlen")
    return found


def problem(model: str, is_tree: bool) -> str | None:
    """Every way's gradients are those of a dense mask in float64, on a smaller batch, and twice the same to the bit."""
    packed = draw(is_tree, 1024)
    truth = gradient("mask", packed, inputs(model, 1024, torch.float64))
    for how in ways(packed):
        found, again = (gradient(how, packed, inputs(model, 1024)) for _ in range(2))
        cosine = float(found.double() @ truth / (found.double().norm() * truth.norm()))
        if not cosine > 0.999:
            return f"{how}: its gradients have a cosine of {cosine:.5f} to float64's"
        if not torch.equal(found, again):
            return f"{how}: two runs differ"
    return None


def contenders(model: str, is_tree: bool) -> tuple[list[Contender], dict[str, str]]:
    packed = draw(is_tree)
    tensors = inputs(model, len(packed.ids_T))
    found = [Contender(f"ours_{how}", quiet(how, packed, tensors)) for how in ways(packed)]
    absent = {} if is_tree or attending._varlen() else {"ours_varlen": "absent: this torch has no varlen_attn"}
    if is_tree:
        found.append(Contender("flex_compiled", flex(packed, tensors)))
    return found, absent


def quiet(how: Attention, packed: Packed, tensors: list[Tensor]) -> Callable[[], None]:
    def run() -> None:
        gradient(how, packed, tensors)

    return run


def flex(packed: Packed, tensors: list[Tensor]) -> Callable[[], None]:
    """torch's FlexAttention with the tree as a block mask, compiled."""
    compiled: list[Callable[..., Tensor]] = []

    def run() -> None:
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        ends_T, num = packed.ends_T, len(packed.ids_T)
        if not compiled:
            mask = create_block_mask(
                lambda b, h, q, k: (k <= q) & (q < ends_T[k]), None, None, num, num, device=DEVICE.type
            )
            attention = torch.compile(flex_attention)
            compiled.append(lambda q, k, v: attention(q, k, v, block_mask=mask, enable_gqa=True))
        query, key, value = (x.detach().requires_grad_() for x in tensors[:3])
        compiled[0](query, key, value).backward(tensors[3])

    return run
