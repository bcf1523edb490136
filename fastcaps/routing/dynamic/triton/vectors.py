"""The smaller Triton kernels of dynamic routing: over the B * J vectors of an iteration, and a product of matrices."""

import triton
import triton.language as tl

from fastcaps.routing.dynamic.triton.sweeps import LOG2E, dot


@triton.jit
def _sum_parts(x, parts, size, at, ok, ROWS: tl.constexpr, D: tl.constexpr):
    """The sum of parts [ROWS, D] that are ``size`` apart, always in the same order: 16 at a time, to wait for all."""
    total = tl.zeros((ROWS, D), tl.float32)
    for start in range(0, parts, 16):
        part = start + tl.arange(0, 16).to(tl.int64)[:, None, None]
        total += tl.sum(
            tl.load(x + part * size + at[None, :, :], mask=ok[None, :, :] & (part < parts), other=0.0), axis=0
        )
    return total


@triton.jit(do_not_specialize=["N", "parts", "J"])
def squash(
    partial,  # [parts, N, D_out] float32, N = B * J
    bias,  # [J, D_out] float32, or None
    s,  # [N, D_out] float32, written
    V,  # [N, D_out] float32: log2(e) times the sum of earlier outputs, or None where there are none
    V_next,  # [N, D_out] float32, written; None in the last iteration
    out,  # [N, D_out], written in the last iteration; else None
    N, parts, J, eps, D_OUT: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """s = bias + the parts in their order, and what an iteration leaves to the next one or to the caller."""
    n = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    e = tl.arange(0, D).to(tl.int64)
    at = n[:, None] * D_OUT + e[None, :]
    ok = (n < N)[:, None] & (e < D_OUT)[None, :]
    total = _sum_parts(partial, parts, N.to(tl.int64) * D_OUT, at, ok, ROWS, D)
    if bias is not None:
        total += tl.load(bias + (n % J)[:, None] * D_OUT + e[None, :], mask=ok, other=0.0)
    tl.store(s + at, total, mask=ok)
    v = total * _squash_scale(tl.sum(total * total, axis=1), eps)[:, None]
    if out is not None:
        tl.store(out + at, v.to(out.dtype.element_ty), mask=ok)
    if V_next is not None:
        v *= LOG2E
        if V is not None:
            v += tl.load(V + at, mask=ok, other=0.0)
        tl.store(V_next + at, v, mask=ok)


@triton.jit
def _squash_scale(n2, eps):
    """squash(s) / s for |s|^2 = n2."""
    scale = tl.sqrt_rn(n2) / (1.0 + n2)
    if eps > 0:
        scale = n2 / (1.0 + n2) / tl.sqrt_rn(n2 + eps)
    return scale


@triton.jit(do_not_specialize=["N", "parts", "J", "g_b", "g_j", "g_e"])
def squash_backward(
    partial,  # [parts, N, D_out] float32: dV of the iteration whose agreement v made; None: grad is given
    grad,  # [B, J, D_out]: the incoming gradient, or None
    dv,  # [N, D_out] float32: the sum of later dV, read unless FIRST, written; None with grad
    s,  # [N, D_out] float32
    ds,  # [N, D_out] float32, written
    N, parts, J, g_b, g_j, g_e, eps,
    D_OUT: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr, FIRST: tl.constexpr,
):  # fmt: skip
    """ds = squash'(s)^T dv with dv the incoming gradient, or the sum over later iterations' dV."""
    n = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    e = tl.arange(0, D).to(tl.int64)
    at = n[:, None] * D_OUT + e[None, :]
    ok = (n < N)[:, None] & (e < D_OUT)[None, :]
    if grad is not None:
        d = tl.load(grad + (n // J)[:, None] * g_b + (n % J)[:, None] * g_j + e[None, :] * g_e, mask=ok, other=0.0)
        d = d.to(tl.float32)
    else:
        d = _sum_parts(partial, parts, N.to(tl.int64) * D_OUT, at, ok, ROWS, D)
        if not FIRST:
            d += tl.load(dv + at, mask=ok, other=0.0)
        tl.store(dv + at, d, mask=ok)
    x = tl.load(s + at, mask=ok, other=0.0)
    n2 = tl.sum(x * x, axis=1)
    length = tl.sqrt_rn(n2)
    # d and a multiple of its part along s; in terms of the direction nothing overflows before n2 does.
    direction = x / tl.where(n2 == 0, 1.0, length)[:, None]
    along = (1.0 - n2) / (1.0 + n2)
    if eps > 0:
        along = 2.0 / (1.0 + n2) - n2 / (n2 + eps)
    along *= tl.sum(direction * d, axis=1)
    tl.store(ds + at, _squash_scale(n2, eps)[:, None] * (d + along[:, None] * direction), mask=ok)


@triton.jit(do_not_specialize=["N", "T"])
def earlier_outputs(
    s,  # [T, N, D_out] float32
    V,  # [T, N, D_out] float32, written
    N, T, eps, D_OUT: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """log2(e) V_t, V_t = v_0 + ... + v_{t-1}, of all iterations, from the weighted sums, as ``squash`` adds them up."""
    n = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    e = tl.arange(0, D).to(tl.int64)
    at = n[:, None] * D_OUT + e[None, :]
    ok = (n < N)[:, None] & (e < D_OUT)[None, :]
    total = tl.zeros((ROWS, D), tl.float32)
    for _ in range(T):
        tl.store(V + at, total, mask=ok)
        x = tl.load(s + at, mask=ok, other=0.0)
        total += x * _squash_scale(tl.sum(x * x, axis=1), eps)[:, None] * LOG2E
        at += N.to(tl.int64) * D_OUT


@triton.jit(do_not_specialize=["M", "N", "L", "J", "splits"])
def product(
    a,  # [J, M, N], any strides
    b,  # [J or 1, N, L], any strides
    out,  # [splits, J, M, L], any strides
    M, N, L, J, splits, a_j, a_m, a_n, b_j, b_n, b_l, o_s, o_j, o_m, o_l,
    TM: tl.constexpr, TN: tl.constexpr, TL: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """a @ b for every j, in a fixed order, whatever the stream; the sum over N in ``splits`` pieces."""
    pid = tl.program_id(0)
    j = (pid % J).to(tl.int64)
    pid = pid // J
    split = (pid % splits).to(tl.int64)
    pid = pid // splits
    l = ((pid % tl.cdiv(L, TL)) * TL + tl.arange(0, TL)).to(tl.int64)
    m = ((pid // tl.cdiv(L, TL)) * TM + tl.arange(0, TM)).to(tl.int64)
    acc = tl.zeros((TM, TL), tl.float32)
    for start in range(split * N // splits, (split + 1) * N // splits, TN):
        n = start + tl.arange(0, TN)
        n_ok = n < (split + 1) * N // splits
        a_at = a + j * a_j + m[:, None] * a_m + n[None, :] * a_n
        x = tl.load(a_at, mask=(m < M)[:, None] & n_ok[None, :], other=0.0)
        y = tl.load(b + j * b_j + n[:, None] * b_n + l[None, :] * b_l, mask=n_ok[:, None] & (l < L)[None, :], other=0.0)
        acc += dot(x, y, PRECISION, False)
    out_at = out + split * o_s + j * o_j + m[:, None] * o_m + l[None, :] * o_l
    tl.store(out_at, acc, mask=(m < M)[:, None] & (l < L)[None, :])
