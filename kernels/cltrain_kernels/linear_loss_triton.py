"""Triton step of `linear_loss`: one program per row streams the logits (and the reference's) once for every figure,
then once more to overwrite the student's with their gradient. The logits are the op's own buffer; the reference is only
read.

Per row online (arXiv 1805.02867): maximum m, s = sum e^(z-m), t = sum e^(z-m) (z-m) for the entropy, m and s of the
reference too (n of logits r), and for the divergence the sum of e^(z-m) or e^(r-n) times ((z-m) - (r-n)); all rescaled
when a block raises a maximum. The token's logit is caught as it streams by: no program reads what it overwrote.
"""

# mypy: ignore-errors

import torch
import triton
import triton.language as tl

from cltrain_kernels.aot import Compilation

MAX_BLOCK = 4096
NONE, LOGPROB, LOGITS = 0, 1, 2
FORWARD, REVERSE, K3 = 0, 1, 2
DIVERGENCES = {None: FORWARD, "forward": FORWARD, "reverse": REVERSE, "k3": K3}


@triton.jit
def load_logits(logits, offsets, num_vocabulary):
    z = tl.load(logits + offsets, mask=offsets < num_vocabulary, other=-float("inf")).to(tl.float32)
    return tl.where(z < -1e30, -1e30, z)  # for -inf, so that 0 * z is 0; maximum() would hide a NaN


@triton.jit
def expm1_less(x):
    """exp(x) - 1 - x, by its series where the difference would lose all digits."""
    series = 1.0 + x / 3 * (1.0 + x / 4 * (1.0 + x / 5 * (1.0 + x / 6 * (1.0 + x / 7 * (1.0 + x / 8)))))
    return tl.where(tl.abs(x) < 0.25, x * x / 2 * series, tl.exp(x) - 1.0 - x)


@triton.jit
def step_kernel(
    logits, reference, reference_logprob_in, ids, weights, divergence_weights, logprob, entropy, divergence,
    reference_logprob, num_vocabulary, logits_row, reference_row, WITH: tl.constexpr, DIVERGENCE: tl.constexpr,
    HAS_GRADIENT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    logits += row * logits_row
    reference += row * reference_row
    columns = tl.arange(0, BLOCK)
    token = tl.load(ids + row)
    m, s, t, picked = -1e30, 0.0, 0.0, 0.0
    n, s_reference, picked_reference, cross = -1e30, 0.0, 0.0, 0.0
    for start in range(0, num_vocabulary, BLOCK):
        offsets = start + columns
        z = load_logits(logits, offsets, num_vocabulary)
        picked += tl.sum(tl.where(offsets == token, z, 0.0), axis=0)
        new_m = tl.maximum(m, tl.max(z, axis=0))
        fade = tl.exp(m - new_m)
        e = tl.exp(z - new_m)
        if WITH == 2:
            r = load_logits(reference, offsets, num_vocabulary)
            picked_reference += tl.sum(tl.where(offsets == token, r, 0.0), axis=0)
            new_n = tl.maximum(n, tl.max(r, axis=0))
            fade_reference = tl.exp(n - new_n)
            e_reference = tl.exp(r - new_n)
            gap = (z - new_m) - (r - new_n)
            moved = (m - n) - (new_m - new_n)
            if DIVERGENCE == 1:
                cross = fade * (cross + s * moved) + tl.sum(tl.where(e > 0.0, e * gap, 0.0), axis=0)
            if DIVERGENCE == 0:
                gaps = tl.where(e_reference > 0.0, e_reference * gap, 0.0)
                cross = fade_reference * (cross - s_reference * moved) - tl.sum(gaps, axis=0)
            s_reference = s_reference * fade_reference + tl.sum(e_reference, axis=0)
            n = new_n
        t = fade * (t + s * (m - new_m)) + tl.sum(e * (z - new_m), axis=0)
        s = s * fade + tl.sum(e, axis=0)
        m = new_m
    log_s = tl.log(s)
    own = picked - m - log_s
    tl.store(logprob + row, own)
    tl.store(entropy + row, log_s - t / s)
    weight = tl.load(weights + row)
    other_weight = tl.load(divergence_weights + row)
    log_s_reference = 0.0
    value = 0.0
    if WITH > 0:
        if WITH == 2:
            log_s_reference = tl.log(s_reference)
            theirs = picked_reference - n - log_s_reference
        else:
            theirs = tl.load(reference_logprob_in + row).to(tl.float32)
        if DIVERGENCE == 2:
            ratio = theirs - own
            value = expm1_less(ratio)
            weight += other_weight * (value + ratio)
        elif DIVERGENCE == 1:
            value = cross / s - log_s + log_s_reference
        else:
            value = cross / s_reference + log_s - log_s_reference
        tl.store(divergence + row, value)
        tl.store(reference_logprob + row, theirs)
    if HAS_GRADIENT:
        for start in range(0, num_vocabulary, BLOCK):
            offsets = start + columns
            z = load_logits(logits, offsets, num_vocabulary)
            logp = z - m - log_s
            p = tl.exp(logp)
            gradient = weight * (p - tl.where(offsets == token, 1.0, 0.0))
            if (WITH == 2) & (DIVERGENCE != 2):
                logq = load_logits(reference, offsets, num_vocabulary) - n - log_s_reference
                if DIVERGENCE == 1:
                    gradient += other_weight * p * (logp - logq - value)
                else:
                    gradient += other_weight * (p - tl.exp(logq))
            gradient = tl.where(token < 0, 0.0, gradient)
            tl.store(logits + offsets, gradient.to(logits.dtype.element_ty), mask=offsets < num_vocabulary)


def triton_step(chunk):
    """See `linear_loss_chunks.Chunk`; returns its figures."""
    num_rows, num_vocabulary = chunk.logits_NV.shape
    logits, reference, given = chunk.logits_NV, chunk.reference_NV, chunk.reference_logprob_N
    if reference is not None and reference.stride(1) != 1:
        reference = reference.contiguous()
    num_figures = 2 if chunk.divergence is None else 4
    figures = [torch.empty(num_rows, dtype=torch.float32, device=logits.device) for _ in range(num_figures)]
    step_kernel[(num_rows,)](
        logits, logits if reference is None else reference, figures[0] if given is None else given.contiguous(),
        chunk.ids_N, chunk.weights_N, chunk.divergence_weights_N, *figures, *figures[: 4 - num_figures],
        num_vocabulary, logits.stride(0), 0 if reference is None else reference.stride(0),
        WITH=LOGITS if reference is not None else NONE if given is None else LOGPROB,
        DIVERGENCE=DIVERGENCES[chunk.divergence], HAS_GRADIENT=chunk.has_gradient,
        BLOCK=min(MAX_BLOCK, max(16, triton.next_power_of_2(num_vocabulary))), num_warps=8,
    )  # fmt: skip
    return figures


def compilations():
    names = [name for name in step_kernel.arg_names if not name.isupper()]
    types = dict.fromkeys(names, "*fp32") | {"logits": "*bf16", "reference": "*bf16", "ids": "*i64"}
    types |= dict.fromkeys(("num_vocabulary", "logits_row", "reference_row"), "i32")
    return [
        Compilation(
            step_kernel,
            types,
            {"WITH": kind, "DIVERGENCE": divergence, "HAS_GRADIENT": True, "BLOCK": MAX_BLOCK},
            tuple(name for name in names if name != "reference_row" or kind == LOGITS),
            num_warps=8,
        )
        for kind, divergence in ((NONE, FORWARD), (LOGPROB, K3), (LOGITS, FORWARD), (LOGITS, REVERSE))
    ]
