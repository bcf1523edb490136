"""Triton kernels of dynamic routing; ``launch.py`` launches them and says what each is for.

The letters are those of ``reference.py``. A tile is BB samples times JG x JT output capsules: capsule
``n * JG + g`` of a tile is entry g of the n-th of JT tensors ``[JG, BB, D]``, all of them in registers. The votes of
one n are one batched ``tl.dot`` of poses ``[BB, K]`` and matrices ``[JG, K, D]``: the groups g lie in different warps
and a vote's entries in four lanes, so only the softmax crosses warps, and J is not padded. D and K are D_out and D_in
(or a part of D_in) rounded up to powers of two.

Logits are to base 2, and so is V: the kernels see log2(e) V. Statistics of the softmax are ``[3, I, B]``: the largest
logit, log2 of the sum of 2^(logit - largest) and, in the backward, ``sum_j c dc``. The first two are apart because in
their sum a large logit would round the coupling away.
"""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
UNROLLED = tl.constexpr(5)  # iterations that `gradients` has side by side; more of them go round a loop


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
def _votes(
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
def _finite(top):
    """0 for the largest logit where every route is closed: the sum of the shares is then 0, and what it divides NaN."""
    return tl.where(top == float("-inf"), 0.0, top)


@triton.jit
def _softmax(logits, leak, JT: tl.constexpr, LEAKY: tl.constexpr):
    """Of JT tensors [JG, BB]: 2^(logits - top), the largest logit top [BB], and the sum of the first, [BB]. With LEAKY
    the logit ``leak`` of a further capsule counts too."""
    top = logits[0]
    for n in tl.static_range(1, JT):
        top = tl.maximum(top, logits[n])
    top = tl.max(top, axis=0)
    if LEAKY:
        top = tl.maximum(top, leak)
    total = tl.zeros_like(logits[0])
    shares = ()
    for n in tl.static_range(JT):
        shares = shares + (tl.exp2(logits[n] - _finite(top)[None, :]),)
        total += shares[n]
    total = tl.sum(total, axis=0)
    if LEAKY:
        total += tl.exp2(leak - _finite(top))
    return shares, top, total


@triton.jit
def _coupling(l, top, log):
    """2^(l - top - log), at most 1 also where l was found in another order than the largest logit; a NaN stays one."""
    return tl.exp2(tl.minimum(l - top[None, :] - log[None, :], 0.0, propagate_nan=tl.PropagateNan.ALL))


@triton.jit
def _merge(top1, log1, mean1, top2, log2, mean2):
    """The statistics [BB] of two sets of output capsules together."""
    top = tl.maximum(top1, top2)
    share1, share2 = tl.exp2(top1 - _finite(top) + log1), tl.exp2(top2 - _finite(top) + log2)
    # Where all routes of a set are closed its share is 0 and its mean NaN.
    mean = tl.where(share1 == 0, 0.0, share1 * mean1) + tl.where(share2 == 0, 0.0, share2 * mean2)
    return top, tl.log2(share1 + share2), mean / (share1 + share2)


@triton.jit(do_not_specialize=["B", "I", "slices"])
def sweep(
    poses,  # [B, I, D_in], or votes [B, I, J or 1, D_out]
    weight,  # [I, J, D_out, D_in], any of its strides 0; None: votes are given
    prior,  # [B or 1, I, J] float32, or None
    mask,  # [B, I] bool, or None
    V,  # [B, J, D_out] float32; None: the first iteration
    ds,  # [B, J, D_out] float32; None: the forward
    stats,  # [3, I, B] float32: read where there are several tiles and sums are wanted, else written; or None
    partial,  # [slices, B, J, D_out] float32; None: only the statistics are wanted
    B, I, slices, s_b, s_i, s_j: tl.constexpr, s_d: tl.constexpr,
    w_i, w_j: tl.constexpr, w_e: tl.constexpr, w_d: tl.constexpr, p_b, p_i, p_j: tl.constexpr, m_b, m_i,
    J: tl.constexpr, D_OUT: tl.constexpr, D_IN: tl.constexpr, D: tl.constexpr, K: tl.constexpr,
    BB: tl.constexpr, JG: tl.constexpr, JT: tl.constexpr, LEAKY: tl.constexpr,
    PRECISION: tl.constexpr, B_EXACT: tl.constexpr,
):  # fmt: skip
    """Over a slice of the input capsules, sum_i c u, or in the backward dV = sum_i c (dc - sum_j c dc) u.

    Where all output capsules fit in a tile the softmax is taken on the way, and its statistics are saved if ``stats``
    is given. Else a launch without ``partial`` goes through all tiles for the statistics, and a second one reads them.
    """
    VOTES: tl.constexpr = weight is None
    AGREES: tl.constexpr = V is not None
    BACKWARD: tl.constexpr = ds is not None
    PRIOR: tl.constexpr = prior is not None
    SUMS: tl.constexpr = partial is not None
    UNIFORM: tl.constexpr = not AGREES and not PRIOR and not BACKWARD
    TILES: tl.constexpr = (J + JG * JT - 1) // (JG * JT)
    EVEN: tl.constexpr = TILES * JG * JT == J
    READ: tl.constexpr = SUMS and TILES > 1 and not UNIFORM
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
            x_at = poses + b[None, :, None] * s_b + j * s_j + e * s_d
        else:
            x_at = poses + b[:, None] * s_b + d[None, :] * s_d
            w_at = weight + j * w_j + e * w_e + d[None, :, None] * w_d  # [JG, K, D]
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
                valid &= tl.load(mask + b * m_b + i * m_i, mask=b_ok, other=0) != 0
            x = None
            if not VOTES and D_IN <= K:
                x = tl.load(x_at + i * s_i, mask=valid[:, None] & (d < D_IN)[None, :], other=0.0)
            us, logits, dcs, new = (), (), (), ()
            for n in tl.static_range(JT):
                j_ok = j + n * JG < J
                if VOTES:
                    u_ok = valid[None, :, None] & (e < D_OUT) & j_ok
                    u = tl.load(x_at + i * s_i + n * JG * s_j, mask=u_ok, other=0.0).to(tl.float32)
                else:
                    u = _votes(
                        x, x_at + i * s_i, valid[:, None], w_at + i * w_i + n * JG * w_j, (e < D_OUT) & j_ok,
                        s_d, w_d, JG, BB, D_IN, D, K, PRECISION, B_EXACT,
                    )  # fmt: skip
                us = us + (accs[n] + u if UNIFORM else u,)
                if not UNIFORM:
                    l = tl.zeros((JG, BB), tl.float32)
                    if AGREES:
                        l = tl.sum(u * Vs[n], axis=2)
                    j_ok = tl.reshape(j_ok, (JG, 1))
                    if PRIOR:
                        p_at = prior + b[None, :] * p_b + i * p_i + (tl.reshape(j, (JG, 1)) + n * JG) * p_j
                        l += tl.load(p_at, mask=b_ok[None, :] & j_ok, other=0.0) * LOG2E
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
                if READ:
                    shares = ()
                    top = tl.load(top_at, mask=b_ok, other=0.0)
                    log = tl.load(log_at, mask=b_ok, other=0.0)
                    for n in tl.static_range(JT):
                        shares = shares + (_coupling(logits[n], top, log),)
                    scale = tl.full((1, BB), 1.0, tl.float32)
                    if BACKWARD:
                        mean = tl.load(mean_at, mask=b_ok, other=0.0)
                else:
                    leak = 0.0 if tile == first_tile else float("-inf")  # once for all tiles
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


@triton.jit
def _reorder(u, JG: tl.constexpr, BB: tl.constexpr, D: tl.constexpr):
    """u [JG, BB, D] with entry e = 8 a + 2 b + c of a vote in place 8 a + b + 4 c: a product over e then finds the
    result of another product in the registers where it needs it, instead of by shuffles."""
    return tl.reshape(tl.permute(tl.reshape(u, (JG, BB, D // 8, 4, 2)), (0, 1, 2, 4, 3)), (JG, BB, D))


@triton.jit
def _iteration(
    du, db, u, logit0, V_at, ds_at, ok, top_at, b_ok, rows,
    AGREES: tl.constexpr, DETACH: tl.constexpr, PRIOR: tl.constexpr,
):  # fmt: skip
    """du [JG, BB, D] and db [JG, BB] with what an iteration adds to them; V of the first one (not AGREES) is 0."""
    ds = tl.load(ds_at, mask=ok, other=0.0)
    l = logit0
    if AGREES:
        V = tl.load(V_at, mask=ok, other=0.0)
        l += tl.sum(u * V, axis=2)
    top, log = tl.load(top_at, mask=b_ok, other=0.0), tl.load(top_at + rows, mask=b_ok, other=0.0)
    c = _coupling(l, top, log)
    du += c[:, :, None] * ds
    if not DETACH and (AGREES or PRIOR):
        db_t = c * (tl.sum(u * ds, axis=2) - tl.load(top_at + 2 * rows, mask=b_ok, other=0.0)[None, :])
        db += db_t
        if AGREES:
            du += (db_t * LN2)[:, :, None] * V
    return du, db


@triton.jit(do_not_specialize=["B", "I", "parts"])
def gradients(
    poses,  # [B, I, D_in], or votes [B, I, J or 1, D_out]
    weight,  # [I, J, D_out, D_in], any of its strides 0; None: votes are given
    prior,  # [B or 1, I, J] float32, or None
    mask,  # [B, I] bool, or None
    V,  # [T, B, J, D_out] float32
    ds,  # [T, B, J, D_out] float32
    stats,  # [T, 3, I, B] float32
    d_poses,  # like poses, contiguous, or None where not wanted
    d_weight,  # [parts, I, J or 1, D_out, D_in] float32, or None
    d_prior,  # [B, I, J] or [parts, I, J] float32, or None
    B, I, parts, s_b, s_i, s_j: tl.constexpr, s_d: tl.constexpr,
    w_i, w_j: tl.constexpr, w_e: tl.constexpr, w_d: tl.constexpr, p_b, p_i, p_j: tl.constexpr, m_b, m_i,
    J: tl.constexpr, D_OUT: tl.constexpr, D_IN: tl.constexpr, D: tl.constexpr, K: tl.constexpr,
    BB: tl.constexpr, JG: tl.constexpr, JT: tl.constexpr, DETACH: tl.constexpr,
    T: tl.constexpr, SHARED: tl.constexpr, PER_SAMPLE: tl.constexpr, PRECISION: tl.constexpr, B_EXACT: tl.constexpr,
):  # fmt: skip
    """The gradients of one input capsule over a part of the batch, from all iterations at once.

    With the statistics at hand everything is local to one (b, i, j): du = sum_t c_t ds_t + db_t V_t, whose product
    with the matrices is d_poses and with the poses d_weight. SHARED: one matrix, or one vote, is for all output
    capsules, and its gradient a sum over them.
    """
    VOTES: tl.constexpr = weight is None
    PRIOR: tl.constexpr = prior is not None
    TILES: tl.constexpr = (J + JG * JT - 1) // (JG * JT)
    CHUNKS: tl.constexpr = 1 if VOTES else (D_IN + K - 1) // K
    # du is float32, whatever the poses are; eleven bits of it are enough for results in bfloat16, with its eight
    HALF: tl.constexpr = "rounded" if poses.dtype.element_ty == tl.bfloat16 else "float32"
    WIDE: tl.constexpr = HALF if PRECISION == "half" else PRECISION
    chunk = (tl.program_id(0) % CHUNKS).to(tl.int64)
    part = (tl.program_id(0) // CHUNKS % parts).to(tl.int64)
    i = (tl.program_id(0) // (CHUNKS * parts)).to(tl.int64)
    e, d = tl.arange(0, D)[None, None, :].to(tl.int64), tl.arange(0, K).to(tl.int64)
    g = tl.arange(0, JG)[:, None, None].to(tl.int64)
    dk = chunk * K + d
    rows = I.to(tl.int64) * B  # of one of the statistics
    size = B.to(tl.int64) * (J * D_OUT)  # of V and ds of one iteration
    r = tl.arange(0, D)[None, :, None].to(tl.int64)
    order = r // 8 * 8 + r % 4 * 2 + r % 8 // 4  # of the entries e in _reorder
    for tile in range(TILES):
        j = tile * (JG * JT) + g  # [JG, 1, 1]
        dws, dps = (), ()
        for n in tl.static_range(JT):
            if not VOTES and d_weight is not None and not (SHARED and n > 0):
                dws = dws + (tl.zeros((JG, D, K), tl.float32),)
            if d_prior is not None and not PER_SAMPLE:
                dps = dps + (tl.zeros((JG, BB), tl.float32),)
        for start in range(part * B // parts, (part + 1) * B // parts, BB):
            b = start + tl.arange(0, BB).to(tl.int64)
            b_ok = b < (part + 1) * B // parts
            valid = b_ok
            if mask is not None:
                valid &= tl.load(mask + b * m_b + i * m_i, mask=b_ok, other=0) != 0
            new_dws, new_dps = (), ()
            if VOTES:
                dx = tl.zeros((JG, BB, D), tl.float32)
            else:
                x_at = poses + b[:, None] * s_b + i * s_i + d[None, :] * s_d
                x = tl.load(x_at + chunk * K * s_d, mask=valid[:, None] & (dk < D_IN)[None, :], other=0.0)
                dx = tl.zeros((JG, BB, K), tl.float32)
            for n in tl.static_range(JT):
                jn = j + n * JG
                ok = b_ok[None, :, None] & (e < D_OUT) & (jn < J)  # [JG, BB, D]
                at = (b[None, :, None] * J + jn) * D_OUT + e
                if VOTES:
                    u_at = poses + b[None, :, None] * s_b + i * s_i + jn * s_j + e * s_d
                    u = tl.load(u_at, mask=ok & valid[None, :, None], other=0.0).to(tl.float32)
                else:
                    w_at = weight + i * w_i + jn * w_j + e * w_e + d[None, :, None] * w_d
                    u = _votes(
                        x, x_at, valid[:, None], w_at, (e < D_OUT) & (jn < J),
                        s_d, w_d, JG, BB, D_IN, D, K, PRECISION, B_EXACT,
                    )  # fmt: skip
                j2 = tl.reshape(jn, (JG, 1))
                ok2 = b_ok[None, :] & (j2 < J)  # [JG, BB]
                logit0 = tl.zeros((JG, BB), tl.float32)
                if PRIOR:
                    logit0 = tl.load(prior + b[None, :] * p_b + i * p_i + j2 * p_j, mask=ok2, other=0.0) * LOG2E
                db = tl.zeros((JG, BB), tl.float32)
                du = tl.zeros((JG, BB, D), tl.float32)
                if T <= UNROLLED:
                    for t in tl.static_range(T - 1 if DETACH else 0, T):
                        du, db = _iteration(
                            du, db, u, logit0, V + t * size + at, ds + t * size + at, ok,
                            stats + 3 * t * rows + i * B + b, b_ok, rows, t > 0, DETACH, d_prior is not None,
                        )  # fmt: skip
                else:
                    for t in range(T - 1 if DETACH else 0, T):
                        du, db = _iteration(
                            du, db, u, logit0, V + t * size + at, ds + t * size + at, ok,
                            stats + 3 * t * rows + i * B + b, b_ok, rows, True, DETACH, d_prior is not None,
                        )  # fmt: skip
                if d_prior is not None:
                    if PER_SAMPLE:
                        tl.store(d_prior + (b[None, :] * I + i) * J + j2, db, mask=ok2 & (chunk == 0))
                    else:
                        new_dps = new_dps + (dps[n] + tl.where(ok2, db, 0.0),)
                if VOTES:
                    du = tl.where(valid[None, :, None], du, 0.0)
                    if SHARED:
                        dx += tl.where(jn < J, du, 0.0)
                    elif d_poses is not None:
                        d_at = d_poses + ((b[None, :, None] * I + i) * J + jn) * D_OUT + e
                        tl.store(d_at, du.to(d_poses.dtype.element_ty), mask=ok)
                else:
                    if d_poses is not None:
                        w_ok = (order < D_OUT) & (jn < J) & (dk < D_IN)[None, None, :]
                        wk_at = weight + i * w_i + jn * w_j + order * w_e + dk[None, None, :] * w_d
                        dx += dot(_reorder(du, JG, BB, D), tl.load(wk_at, mask=w_ok, other=0.0), WIDE, B_EXACT)
                    if d_weight is not None:
                        du_t = tl.trans(du, 0, 2, 1)
                        xs = tl.broadcast_to(x[None, :, :], (JG, BB, K))
                        if SHARED:
                            dws = (dws[0] + dot(du_t, xs, WIDE, B_EXACT),)
                        else:
                            new_dws = new_dws + (dws[n] + dot(du_t, xs, WIDE, B_EXACT),)
            dps = new_dps
            if not SHARED:
                dws = new_dws
            if d_poses is not None and (not VOTES or SHARED):
                total = tl.where(valid[:, None], tl.sum(dx, axis=0), 0.0)
                if VOTES:
                    dx_at = d_poses + (b[:, None] * I + i) * D_OUT + tl.arange(0, D)[None, :]
                    dx_ok = b_ok[:, None] & (tl.arange(0, D) < D_OUT)[None, :]
                else:
                    dx_at = d_poses + (b[:, None] * I + i) * D_IN + dk[None, :]
                    dx_ok = b_ok[:, None] & (dk < D_IN)[None, :]
                if tile > 0:
                    total += tl.load(dx_at, mask=dx_ok, other=0.0).to(tl.float32)
                tl.store(dx_at, total.to(d_poses.dtype.element_ty), mask=dx_ok)
        if not VOTES and d_weight is not None:
            row = tl.arange(0, D)[:, None]
            dw_ok = (row < D_OUT) & (dk < D_IN)[None, :]
            if SHARED:
                dw_at = d_weight + ((part * I + i) * D_OUT + row) * D_IN + dk[None, :]
                total = tl.sum(dws[0], axis=0)
                if tile > 0:
                    total += tl.load(dw_at, mask=dw_ok, other=0.0)
                tl.store(dw_at, total, mask=dw_ok)
            else:
                for n in tl.static_range(JT):
                    dw_at = d_weight + ((part * I + i) * J + j + n * JG) * D_OUT * D_IN + row * D_IN + dk[None, :]
                    tl.store(dw_at, dws[n], mask=dw_ok & (j + n * JG < J))
        if d_prior is not None and not PER_SAMPLE:
            for n in tl.static_range(JT):
                jn = tl.reshape(j, (JG,)) + n * JG
                tl.store(d_prior + (part * I + i) * J + jn, tl.sum(dps[n], axis=1), mask=(jn < J) & (chunk == 0))
        tl.debug_barrier()  # the next tile adds to what other threads wrote
