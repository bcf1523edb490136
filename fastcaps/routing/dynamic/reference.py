"""Reference implementation of dynamic routing in plain PyTorch, forward and backward: what every kernel must equal.

Letters: B batch, I input capsules, J output capsules, D_in and D_out pose sizes, T iterations. Tensors have their
compute dtype (float32 or float64): ``api.py`` checks arguments and ``ops.py`` casts half types.
"""

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastcaps.functional import squash

# Entries that plain PyTorch holds where samples can be taken a few at a time: 16 MB in float32.
VOTES_AT_ONCE = 4_000_000


def masked(poses: Tensor, mask: Tensor | None) -> Tensor:
    """Poses ``[B, I, D_in]``, or votes ``[B, I, J, D_out]``, with 0 where ``mask`` ``[B, I]`` is False."""
    return poses if mask is None else poses.masked_fill(~mask.reshape(*mask.shape, *[1] * (poses.dim() - 2)), 0)


def masked_prior(prior: Tensor | None, mask: Tensor | None) -> Tensor | None:
    """A prior that broadcasts to ``[B, I, J]``, with 0 where ``mask`` ``[B, I]`` is False."""
    return prior if prior is None or mask is None else torch.where(mask[..., None], prior, 0.0)


def transform(poses: Tensor, weight: Tensor | None) -> Tensor:
    """The votes ``u[b, i, j] = weight[i, j] @ poses[b, i]``.

    Args:
        poses: ``[B, I, D_in]``, or the votes ``[B, I, J or 1, D_out]`` themselves where ``weight`` is None.
        weight: ``[I or 1, J or 1, D_out, D_in]``.

    Returns:
        ``[B, I, J or 1, D_out]``
    """
    if weight is None:
        return poses
    return torch.einsum("ijdk,bik->bijd", weight.expand(poses.shape[1], -1, -1, -1), poses)


def coupling(logits: Tensor, leaky: bool, may_close: bool = False) -> Tensor:
    """Softmax over the output capsules; with ``leaky`` a further logit of 0 takes a share that is dropped.

    Args:
        logits: ``[B or 1, I, J]``
        leaky: whether a vote may go to no output capsule.
        may_close: whether all logits of an input capsule may be -inf: its coefficients are then 0, and not NaN.

    Returns:
        ``[B or 1, I, J]``
    """
    if leaky:
        return torch.cat([logits, torch.zeros_like(logits[..., :1])], -1).softmax(-1)[..., :-1]
    if not may_close:
        return logits.softmax(-1)
    closed = (logits == -math.inf).all(-1, keepdim=True)
    # Both fills are needed: the inner one keeps NaN out of the derivatives.
    return logits.masked_fill(closed, 0.0).softmax(-1).masked_fill(closed, 0.0)


def output_capsules(poses: Tensor, weight: Tensor | None, prior: Tensor | None, bias: Tensor | None) -> int:
    """J: the largest of the votes', the prior's and the bias's J, each of which may be 1."""
    sizes = [poses.shape[2] if weight is None else weight.shape[1]]
    if prior is not None and prior.dim():
        sizes.append(prior.shape[-1])
    if bias is not None:
        sizes.append(bias.shape[0])
    return max(sizes)


def weighted_sum(c: Tensor, u: Tensor) -> Tensor:
    """``sum_i c u``: coupling ``[B or 1, I, J]`` and votes ``[B, I, J, D_out]`` to ``[B, J, D_out]``."""
    return torch.einsum("bij,bijd->bjd", c, u)


def agreement(u: Tensor, v: Tensor) -> Tensor:
    """``<u, v>``: votes ``[B, I, J, D_out]`` and outputs ``[B, J, D_out]`` to ``[B, I, J]``."""
    return torch.einsum("bijd,bjd->bij", u, v)


class Iteration(NamedTuple):
    """What an iteration of procedure 1 computes.

    Attributes:
        c: ``[B or 1, I, J]``, the coupling coefficients; of the first iteration as many as there are logits.
        s: ``[B, J, D_out]``, the weighted sum of the votes, plus the bias.
        v: ``[B, J, D_out]``, the squashed sum.
        agreement: ``[B, I, J]``, what the next logits gain; None in the last iteration, which has no next.
    """

    c: Tensor
    s: Tensor
    v: Tensor
    agreement: Tensor | None


def iterations(
    votes: Any,
    logits: Tensor,
    bias: Tensor | None,
    num_iterations: int,
    *,
    leaky: bool = False,
    detach: bool = False,
    eps: float = 0.0,
    may_close: bool = False,
    coupling: Callable[..., Tensor] = coupling,
    weighted_sum: Callable[[Tensor, Any], Tensor] = weighted_sum,
    squash: Callable[..., Tensor] = squash,
    agreement: Callable[[Any, Tensor], Tensor] = agreement,
) -> Iterator[Iteration]:
    """Procedure 1 of Sabour et al. (2017), iteration by iteration.

    Args:
        votes: ``[B, I, J, D_out]``, or whatever ``weighted_sum`` and ``agreement`` take for it; has ``detach()``.
        logits: ``[B or 1, I, J]``, those of the first iteration.
        bias: ``[J or 1, D_out]``, added to the weighted sum in every iteration, or None.
        num_iterations: T.
        leaky: route over J + 1 capsules and drop the last.
        detach: the coupling coefficients are constants for the gradient.
        eps: as in ``squash``.
        may_close: as in ``coupling``; only a prior closes routes.
        coupling: from ``(logits, leaky, may_close)`` to c.
        weighted_sum: from ``(c, votes)`` to s without its bias.
        squash: from ``(s, eps=eps)`` to v.
        agreement: from ``(votes, v)`` to what the logits gain.

    Yields:
        T times an :class:`Iteration`.
    """
    routed, logits = (votes.detach(), logits.detach()) if detach else (votes, logits)  # all that the coupling sees
    for t in range(num_iterations):
        last = t == num_iterations - 1
        c = coupling(logits, leaky, may_close)
        s = weighted_sum(c, votes if last else routed)
        if bias is not None:
            s = s + (bias.detach() if detach and not last else bias)
        v = squash(s, eps=eps)
        gain = None if last else agreement(routed, v)
        yield Iteration(c, s, v, gain)
        if gain is not None:
            logits = logits + gain
        del c, gain  # not kept in memory beside those of the next iteration


def last_output(steps: Iterator[Iteration]) -> Tensor:
    """v of the last iteration; what an iteration computed is let go before the next one begins."""
    for step in steps:
        v = step.v
        del step
    return v


def dynamic_routing_reference(
    poses: Tensor,
    weight: Tensor | None,
    prior: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    num_iterations: int = 3,
    leaky: bool = False,
    detach: bool = False,
    eps: float = 0.0,
) -> Tensor:
    """Procedure 1 of Sabour et al. (2017), differentiable any number of times.

    Args:
        poses: ``[B, I, D_in]``, or the votes ``[B, I, J or 1, D_out]`` where ``weight`` is None.
        weight: ``[I or 1, J or 1, D_out, D_in]``, or None.
        prior: initial routing logits, broadcastable to ``[B, I, J]``; an input capsule with -inf alone casts no vote.
        bias: ``[J or 1, D_out]``, added to the weighted sum in every iteration.
        num_iterations: T.
        leaky: route over J + 1 capsules and drop the last.
        detach: coupling coefficients are constants for the gradient.
        eps: as in ``squash``.

    Returns:
        ``[B, J, D_out]``
    """
    I, J = poses.shape[1], output_capsules(poses, weight, prior, bias)
    u = transform(poses, weight).expand(-1, -1, J, -1)  # [B, I, J, D_out]
    first = u.new_zeros(()) if prior is None else prior
    logits = first.expand(-1 if first.dim() == 3 else 1, I, J)  # [B or 1, I, J]
    steps = iterations(
        u, logits, bias, num_iterations, leaky=leaky, detach=detach, eps=eps, may_close=prior is not None
    )
    return last_output(steps)


def squash_backward(s: Tensor, dv: Tensor, eps: float) -> Tensor:
    """The gradient with respect to ``s`` when that of ``squash(s)`` is ``dv``; both ``[..., D_out]``."""
    q = (s * s).sum(-1, keepdim=True)
    n = torch.sqrt(q)
    # dv plus a multiple of its part along s; in terms of the direction e nothing overflows before q does.
    e = s / torch.where(q == 0, 1.0, n)
    if eps > 0:
        scale = q / (1 + q) / torch.sqrt(q + eps)
        along = 2 / (1 + q) - q / (q + eps)
    else:
        scale = n / (1 + q)
        along = (1 - q) / (1 + q)
    return scale * (dv + along * (e * dv).sum(-1, keepdim=True) * e)


def dynamic_routing_backward_reference(
    grad: Tensor,
    poses: Tensor,
    weight: Tensor | None,
    prior: Tensor | None,
    bias: Tensor | None,
    sums: Tensor,
    *,
    leaky: bool,
    detach: bool,
    eps: float,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """The backward from the weighted sums alone, as the kernels do it: votes and coupling are computed again.

    As logits are sums of agreements, ``logits_t = prior + <u, V_t>`` with ``V_t = v_0 + ... + v_{t-1}``, the only
    thing that iterations pass back to each other is ``dV_t [B, J, D_out]``.

    Args:
        grad: ``[B, J, D_out]``, the gradient of the output.
        poses: ``[B, I, D_in]``, or the votes ``[B, I, J or 1, D_out]`` where ``weight`` is None.
        weight: ``[I or 1, J or 1, D_out, D_in]``, or None.
        prior: ``[I, J]`` or ``[B, I, J]``, or None.
        bias: ``[J, D_out]``, or None.
        sums: ``[T, B, J, D_out]``, ``s_t`` of every iteration.
        leaky: as in the forward.
        detach: as in the forward.
        eps: as in the forward.

    Returns:
        The gradients of poses (or votes), weight, prior and bias, in the shapes of these.
    """
    T, J = sums.shape[0], sums.shape[2]
    u = transform(poses, weight).expand(-1, -1, J, -1)  # [B, I, J, D_out]
    V = squash(sums, eps=eps).cumsum(0)  # V[t - 1] is the V_t of the formulas
    du, d_bias, dV = torch.zeros_like(u), torch.zeros_like(sums[0]), torch.zeros_like(sums[0])
    d_prior = torch.zeros_like(u[..., 0])  # [B, I, J]
    for t in reversed(range(T)):
        ds = squash_backward(sums[t], grad if t == T - 1 else dV, eps)
        logits = d_prior.new_zeros(()) if prior is None else prior
        if t > 0:
            logits = logits + agreement(u, V[t - 1])
        c = coupling(logits.expand(d_prior.shape), leaky, may_close=prior is not None)
        du += c[..., None] * ds[:, None]
        d_bias += ds
        if detach:
            break
        dc = agreement(u, ds)
        db = c * (dc - (c * dc).sum(-1, keepdim=True))
        d_prior += db
        if t > 0:
            du += db[..., None] * V[t - 1][:, None]
            dV += weighted_sum(db, u)
    d_weight = None
    if weight is None:
        d_poses = du.sum_to_size(poses.shape)
    else:
        full = weight.expand(poses.shape[1], J, -1, -1)
        d_poses = torch.einsum("ijdk,bijd->bik", full, du)
        d_weight = torch.einsum("bijd,bik->ijdk", du, poses).sum_to_size(weight.shape)
    return (
        d_poses,
        d_weight,
        None if prior is None else d_prior.sum_to_size(prior.shape),
        None if bias is None else d_bias.sum(0),
    )
