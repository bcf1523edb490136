"""Triton kernel of the gradients of poses, weight and prior; letters and conventions are those of ``sweeps.py``."""

import triton
import triton.language as tl

from fastcaps.routing.dynamic.triton.sweeps import coupling, dot, prior_of_two, votes

LN2 = tl.constexpr(0.6931471805599453)
UNROLLED = tl.constexpr(5)  # iterations that stand side by side; more of them go round a loop


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
    c = coupling(l, top, log)
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
    B, I, parts, s, w, p, m,
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
                valid &= tl.load(mask + b * m.b + i * m.i, mask=b_ok, other=0) != 0
            new_dws, new_dps = (), ()
            if VOTES:
                dx = tl.zeros((JG, BB, D), tl.float32)
            else:
                x_at = poses + b[:, None] * s.b + i * s.i + d[None, :] * s.d
                x = tl.load(x_at + chunk * K * s.d, mask=valid[:, None] & (dk < D_IN)[None, :], other=0.0)
                dx = tl.zeros((JG, BB, K), tl.float32)
            for n in tl.static_range(JT):
                jn = j + n * JG
                ok = b_ok[None, :, None] & (e < D_OUT) & (jn < J)  # [JG, BB, D]
                at = (b[None, :, None] * J + jn) * D_OUT + e
                if VOTES:
                    u_at = poses + b[None, :, None] * s.b + i * s.i + jn * s.j + e * s.d
                    u = tl.load(u_at, mask=ok & valid[None, :, None], other=0.0).to(tl.float32)
                else:
                    w_at = weight + i * w.i + jn * w.j + e * w.e + d[None, :, None] * w.d
                    u = votes(
                        x, x_at, valid[:, None], w_at, (e < D_OUT) & (jn < J),
                        s.d, w.d, JG, BB, D_IN, D, K, PRECISION, B_EXACT,
                    )  # fmt: skip
                j2 = tl.reshape(jn, (JG, 1))
                ok2 = b_ok[None, :] & (j2 < J)  # [JG, BB]
                logit0 = tl.zeros((JG, BB), tl.float32)
                if PRIOR:
                    p_at = prior + b[None, :] * p.b + i * p.i + j2 * p.j
                    logit0 = prior_of_two(tl.load(p_at, mask=ok2 & valid[None, :], other=0.0))
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
                    db = tl.where(ok2 & valid[None, :], db, 0.0)
                    if PER_SAMPLE:
                        tl.store(d_prior + (b[None, :] * I + i) * J + j2, db, mask=ok2 & (chunk == 0))
                    else:
                        new_dps = new_dps + (dps[n] + db,)
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
                        wk_at = weight + i * w.i + jn * w.j + order * w.e + dk[None, None, :] * w.d
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
