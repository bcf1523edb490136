"""Triton kernel ``sweep``, over all input capsules, and its parts; ``launch.py`` says what it is launched for.

The letters are those of ``reference.py``. A tile is BB samples times JG x JT output capsules: capsule
``n * JG + g`` of a tile is entry g of the n-th of JT tensors ``[JG, BB, D]``, all of them in registers. The votes of
one n are one batched ``tl.dot`` of poses ``[BB, K]`` and matrices ``[JG, K, D]``: the groups g lie in different warps
and a vote's entries in four lanes, so only the softmax crosses warps, and J is not padded. D and K are D_out and D_in
(or a part of D_in) rounded up to powers of two.

Strides come as tuples, defined in ``launch.py``: s of the poses or votes, w of the weight, p of the prior, m of the
mask.

Logits are to base 2, and so is V: the kernels see log2(e) V. Statistics of the softmax are ``[3, I, B]``: the largest
logit, log2 of the sum of 2^(logit - largest) and, in the backward, ``sum_j c dc``. The first two are apart because in
their sum a large logit would round the coupling away.
"""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
# Where a largest logit and a sum of shares start, as in csrc/numbers.h: closed routes get shares of 0, not 0 / 0.
LEAST_LOGIT = tl.constexpr(-3.4028234663852886e38)
LEAST_SHARE = tl.constexpr(1.1754943508222875e-38)


@triton.jit
def _dot(a, b, acc):
    """a @ b by the tensor cores, [JG, M, K] @ [JG, K, N], plus acc unless it is None. A batch of one is no batch: the
    columns of a plain product may lie in several warps."""
    if len(a.shape) == 3 and a.shape[0] == 1:
        M: tl.constexpr = a.shape[1]
        K: tl.constexpr = a.shape[2]
        N: tl.constexpr = b.shape[2]
        if acc is not None:
            acc = tl.reshape(acc, (M, N))
        product = tl.dot(tl.reshape(a, (M, K)), tl.reshape(b, (K, N)), acc, input_precision="tf32")
        product = tl.reshape(product, (1, M, N))
    else:
        product = tl.dot(a, b, acc, input_precision="tf32")
    return product


@triton.jit
def dot(a, b, PRECISION: tl.constexpr, B_EXACT: tl.constexpr):
    """a @ b. "half" multiplies half types as they are, exactly; "tf32" as the hardware does, which cuts the last bits
    off; "rounded" rounds a to nearest, for a b that was bfloat16; "float32" is as good as float32: hi and lo parts that
    tf32 holds exactly, three products, or two where b was a half type and has no lo.

    Whoever sums such products adds them outside: the tensor cores cut off their sums, too, and over many terms that
    would show.
    """
    if PRECISION == "half":
        return _dot(a, b, None)
    a = a.to(tl.float32)
    b = b.to(tl.float32)
    if PRECISION == "tf32":
        return _dot(a, b, None)
    a_hi = ((a.to(tl.uint32, bitcast=True) + 0x1000) & 0xFFFFE000).to(tl.float32, bitcast=True)  # to nearest
    if PRECISION == "rounded":
        return _dot(tl.where(a == a, a_hi, a), b, None)  # a NaN with all bits set would become -0
    a_lo = a - a_hi
    if B_EXACT:
        return _dot(a_hi, b, _dot(a_lo, b, None))
    b_hi = (b.to(tl.uint32, bitcast=True) & 0xFFFFE000).to(tl.float32, bitcast=True)  # cut off: one instruction less
    return _dot(a_hi, b_hi, _dot(a_hi, b - b_hi, _dot(a_lo, b_hi, None)))


@triton.jit
def votes(
    x, x_at, x_ok, w_at, w_ok, s_d: tl.constexpr, w_d: tl.constexpr,
    JG: tl.constexpr, BB: tl.constexpr, D_IN: tl.constexpr, D: tl.constexpr, K: tl.constexpr,
    PRECISION: tl.constexpr, B_EXACT: tl.constexpr,
):  # fmt: skip
    """The votes [JG, BB, D] of an input capsule for JG output capsules: poses [BB, D_in] @ matrices [JG, D_in, D]."""
    d = tl.arange(0, K)
    if D_IN <= K:
        w = tl.load(w_at, mask=w_ok & (d < D_IN)[None, :, None], other=0.0)
        return dot(tl.broadcast_to(x[None, :, :], (JG, BB, K)), w, PRECISION, B_EXACT)
    u = tl.zeros((JG, BB, D), tl.float32)
    for k in range(0, D_IN, K):
        x_k = tl.load(x_at, mask=x_ok & (k + d < D_IN)[None, :], other=0.0)
        w_k = tl.load(w_at, mask=w_ok & (k + d < D_IN)[None, :, None], other=0.0)
        u += dot(tl.broadcast_to(x_k[None, :, :], (JG, BB, K)), w_k, PRECISION, B_EXACT)
        x_at += K * s_d
        w_at += K * w_d
    return u


@triton.jit
def _softmax(logits, leak, JT: tl.constexpr, LEAKY: tl.constexpr):
    """Of JT tensors [JG, BB]: 2^(logits - top), the largest logit top [BB], and the sum of the first, [BB]. With LEAKY
    the logit ``leak`` of a further capsule counts too."""
    top = logits[0]
    for n in tl.static_range(1, JT):
        top = tl.maximum(top, logits[n])
    top = tl.maximum(tl.max(top, axis=0), leak if LEAKY else LEAST_LOGIT)
    total = tl.zeros_like(logits[0])
    shares = ()
    for n in tl.static_range(JT):
        shares = shares + (tl.exp2(logits[n] - top[None, :]),)
        total += shares[n]
    total = tl.sum(total, axis=0) + LEAST_SHARE
    if LEAKY:
        total += tl.exp2(leak - top)
    return shares, top, total


@triton.jit
def prior_of_two(prior):
    """A prior for exponents of two. A finite one stays finite: -inf alone closes a route."""
    scaled = prior * LOG2E
    return tl.where((scaled < LEAST_LOGIT) & (prior >= LEAST_LOGIT), LEAST_LOGIT, scaled)


@triton.jit
def coupling(l, top, log):
    """2^(l - top - log), at most 1 also where l was found in another order than the largest logit; a NaN stays one."""
    return tl.exp2(tl.minimum(l - top[None, :] - log[None, :], 0.0, propagate_nan=tl.PropagateNan.ALL))


@triton.jit
def _merge(top1, log1, mean1, top2, log2, mean2):
    """The statistics [BB] of two sets of output capsules together."""
    top = tl.maximum(top1, top2)
    share1, share2 = tl.exp2(top1 - top + log1), tl.exp2(top2 - top + log2)
    return top, tl.log2(share1 + share2), (share1 * mean1 + share2 * mean2) / (share1 + share2)


@triton.jit(do_not_specialize=["B", "I", "slices"])
def sweep(
    poses,  # [B, I, D_in], or votes [B, I, J or 1, D_out]
    weight,  # [I, J, D_out, D_in], any of its strides 0; None: votes are given
    prior,  # [B or 1, I, J] float32, or None
    mask,  # [B, I] bool, or None
    V,  # [B, J, D_out] float32; None: the first iteration
    ds,  # [B, J, D_out] float32; None: the forward
    stats,  # [3, I, B] float32, read or written; or None
    partial,  # [slices, B, J, D_out] float32, written; None where only the statistics are
    B, I, slices, s, w, p, m,
    J: tl.constexpr, D_OUT: tl.constexpr, D_IN: tl.constexpr, D: tl.constexpr, K: tl.constexpr,
    BB: tl.constexpr, JG: tl.constexpr, JT: tl.constexpr, LEAKY: tl.constexpr,
    PRECISION: tl.constexpr, B_EXACT: tl.constexpr, MODE: tl.constexpr,
):  # fmt: skip
    """Over a slice of the input capsules, sum_i c u, or in the backward dV = sum_i c (dc - sum_j c dc) u.

    MODE says where the coupling c comes from, and what is written:

    - "uniform": c is the same for all output capsules. Written: the sums.
    - "softmax": the output capsules fit in a tile, and the softmax is taken on the way. Written: the sums, and the
      softmax's statistics where ``stats`` is given.
    - "statistics": no sums; a program goes through all tiles. Written: the statistics.
    - "read": several tiles, whose coupling follows from the statistics of an earlier launch. Written: the sums.
    """
    VOTES: tl.constexpr = weight is None
    AGREES: tl.constexpr = V is not None
    BACKWARD: tl.constexpr = ds is not None
    PRIOR: tl.constexpr = prior is not None
    UNIFORM: tl.constexpr = MODE == "uniform"
    SUMS: tl.constexpr = MODE != "statistics"
    TILES: tl.constexpr = (J + JG * JT - 1) // (JG * JT)
    EVEN: tl.constexpr = TILES * JG * JT == J
    pid = tl.program_id(0)
    if SUMS:
        first_tile, last_tile = pid % TILES, pid % TILES + 1
        pid = pid // TILES
    else:
        first_tile, last_tile = 0, TILES
    batches = tl.cdiv(B, BB)
    b = ((pid % batches) * BB + tl.arange(0, BB)).to(tl.int64)
    part = (pid // batches).to(tl.int64)
    b_ok = b < B
    e, d = tl.arange(0, D)[None, None, :].to(tl.int64), tl.arange(0, K).to(tl.int64)
    g = tl.arange(0, JG)[:, None, None].to(tl.int64)
    e_ok = b_ok[None, :, None] & (e < D_OUT)
    rows = I.to(tl.int64) * B  # of one of the statistics
    for tile in range(first_tile, last_tile):
        j = tile * (JG * JT) + g  # [JG, 1, 1]
        at = (b[None, :, None] * J + j) * D_OUT + e  # [JG, BB, D]
        if VOTES:
            x_at = poses + b[None, :, None] * s.b + j * s.j + e * s.d
        else:
            x_at = poses + b[:, None] * s.b + d[None, :] * s.d
            w_at = weight + j * w.j + e * w.e + d[None, :, None] * w.d  # [JG, K, D]
        accs, Vs, dss = (), (), ()
        for n in tl.static_range(JT):
            ok = e_ok & (j + n * JG < J)  # [JG, BB, D]
            accs = accs + (tl.zeros((JG, BB, D), tl.float32),)
            if AGREES:
                Vs = Vs + (tl.load(V + at + n * JG * D_OUT, mask=ok, other=0.0),)
            if BACKWARD:
                dss = dss + (tl.load(ds + at + n * JG * D_OUT, mask=ok, other=0.0),)
        for i in range(part * I // slices, (part + 1) * I // slices):
            valid = b_ok
            if mask is not None:
                valid &= tl.load(mask + b * m.b + i * m.i, mask=b_ok, other=0) != 0
            x = None
            if not VOTES and D_IN <= K:
                x = tl.load(x_at + i * s.i, mask=valid[:, None] & (d < D_IN)[None, :], other=0.0)
            us, logits, dcs, new = (), (), (), ()
            for n in tl.static_range(JT):
                j_ok = j + n * JG < J
                if VOTES:
                    u_ok = valid[None, :, None] & (e < D_OUT) & j_ok
                    u = tl.load(x_at + i * s.i + n * JG * s.j, mask=u_ok, other=0.0).to(tl.float32)
                else:
                    u = votes(
                        x, x_at + i * s.i, valid[:, None], w_at + i * w.i + n * JG * w.j, (e < D_OUT) & j_ok,
                        s.d, w.d, JG, BB, D_IN, D, K, PRECISION, B_EXACT,
                    )  # fmt: skip
                us = us + (accs[n] + u if UNIFORM else u,)
                if not UNIFORM:
                    l = tl.zeros((JG, BB), tl.float32)
                    if AGREES:
                        l = tl.sum(u * Vs[n], axis=2)
                    j_ok = tl.reshape(j_ok, (JG, 1))
                    if PRIOR:
                        p_at = prior + b[None, :] * p.b + i * p.i + (tl.reshape(j, (JG, 1)) + n * JG) * p.j
                        l += prior_of_two(tl.load(p_at, mask=valid[None, :] & j_ok, other=0.0))
                    logits = logits + (l if EVEN else tl.where(j_ok, l, float("-inf")),)
                    if BACKWARD:
                        dc = tl.sum(u * dss[n], axis=2)
                        dcs = dcs + (dc if EVEN else tl.where(j_ok, dc, 0.0),)
            if UNIFORM:
                accs = us
            else:
                top_at = stats
                if stats is not None:
                    top_at = stats + i * B + b
                    log_at, mean_at = top_at + rows, top_at + 2 * rows
                if MODE == "read":
                    shares = ()
                    top = tl.load(top_at, mask=b_ok, other=0.0)
                    log = tl.load(log_at, mask=b_ok, other=0.0)
                    for n in tl.static_range(JT):
                        shares = shares + (coupling(logits[n], top, log),)
                    scale = tl.full((1, BB), 1.0, tl.float32)
                    if BACKWARD:
                        mean = tl.load(mean_at, mask=b_ok, other=0.0)
                else:
                    leak = 0.0 if tile == first_tile else LEAST_LOGIT  # once for all tiles
                    shares, top, total = _softmax(logits, leak, JT, LEAKY)
                    scale = 1.0 / total[None, :]
                    mean = total  # not read in the forward
                    if BACKWARD:
                        weighted = shares[0] * dcs[0]
                        for n in tl.static_range(1, JT):
                            weighted += shares[n] * dcs[n]
                        mean = tl.sum(weighted, axis=0) / total
                    if stats is not None:
                        log = tl.log2(total)
                        if not SUMS and tile > 0:
                            old_top = tl.load(top_at, mask=b_ok, other=0.0)
                            old_log = tl.load(log_at, mask=b_ok, other=0.0)
                            old_mean = tl.load(mean_at, mask=b_ok, other=0.0) if BACKWARD else mean
                            top, log, mean = _merge(old_top, old_log, old_mean, top, log, mean)
                        tl.store(top_at, top, mask=b_ok)
                        tl.store(log_at, log, mask=b_ok)
                        if BACKWARD:
                            tl.store(mean_at, mean, mask=b_ok)
                if SUMS:
                    for n in tl.static_range(JT):
                        c = shares[n] * scale
                        if BACKWARD:
                            c *= dcs[n] - mean[None, :]
                        new = new + (accs[n] + c[:, :, None] * us[n],)
                    accs = new
        if SUMS:
            out = partial + part * B * J * D_OUT + at
            for n in tl.static_range(JT):
                total_n = accs[n] * (1.0 / (J + LEAKY)) if UNIFORM else accs[n]
                tl.store(out + n * JG * D_OUT, total_n, mask=e_ok & (j + n * JG < J))
        else:
            tl.debug_barrier()  # the next tile reads the statistics that other threads wrote
