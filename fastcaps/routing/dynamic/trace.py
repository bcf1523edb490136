"""Record of what routing does in every iteration: in plain PyTorch, without gradient, a few samples at a time."""

from dataclasses import dataclass
from itertools import islice

import torch
from torch import Tensor

from fastcaps.functional import without_autocast
from fastcaps.routing.dynamic.api import check_poses
from fastcaps.routing.dynamic.arguments import Options, Tensors
from fastcaps.routing.dynamic.ops import upcast
from fastcaps.routing.dynamic.reference import VOTES_AT_ONCE, iterations, output_capsules, transform


@dataclass(frozen=True)
class RoutingTrace:
    """What :func:`routing_trace` returns; T iterations, B samples, I input and J output capsules.

    Attributes:
        poses: ``[B, J, D_out]``, the output of the last iteration.
        coupling: ``[T, B, I, J]``, the coupling coefficients c_t.
        entropy: ``[T, B, I]``, the entropy of c_t over the output capsules in nats: log J is no decision at all,
            0 a vote that goes to one capsule only.
        agreement: ``[T, B, I, J]``, the scalar product <u, v_t> that iteration t adds to the logits.
        change: ``[T, B, J]``, the length of v_t - v_{t-1} (with v_{-1} = 0): near 0 once routing has converged.
    """

    poses: Tensor
    coupling: Tensor
    entropy: Tensor
    agreement: Tensor
    change: Tensor


@torch.no_grad()
def routing_trace(
    poses: Tensor,
    weight: Tensor,
    *,
    num_iterations: int = 3,
    prior: Tensor | None = None,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    leaky: bool = False,
    eps: float = 0.0,
) -> RoutingTrace:
    """Run :func:`fastcaps.dynamic_routing` and record what happens in every iteration.

    Args:
        poses: ``[B, I, D_in]``; float64, float32, bfloat16 or float16.
        weight: ``[I or 1, J or 1, D_out, D_in]``, dtype of ``poses``.
        num_iterations: T, at least 1.
        prior: initial routing logits, broadcastable to ``[B, I, J]``.
        bias: ``[J or 1, D_out]``.
        mask: ``[B, I]`` bool; a masked capsule's coupling is recorded too, that of a pose and a prior of 0.
        leaky: as in :func:`fastcaps.dynamic_routing`; the recorded shares then sum to less than 1.
        eps: as in :func:`fastcaps.squash`.

    Returns:
        A :class:`RoutingTrace`, in float64 for float64 inputs and in float32 for all others, without gradient.
        Beside its own tensors it needs the votes of a few samples only.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: sizes or devices do not fit.

    Example:
        >>> trace = routing_trace(torch.randn(2, 6, 4), torch.randn(6, 3, 8, 4), num_iterations=5)
        >>> trace.coupling.shape, trace.change.shape
        (torch.Size([5, 2, 6, 3]), torch.Size([5, 2, 3]))
    """
    options = Options(num_iterations, leaky, False, eps)
    tensors = check_poses(Tensors(poses, weight, prior, bias, mask), options)
    with without_autocast(poses.device.type):
        return _trace(upcast(tensors), options)


def _trace(tensors: Tensors, options: Options) -> RoutingTrace:
    poses, weight, prior, bias, _ = tensors
    T, leaky, _, eps, _ = options
    assert weight is not None
    B, I = poses.shape[:2]
    J, D_out = output_capsules(poses, weight, prior, bias), weight.shape[2]
    logits = (poses.new_zeros(()) if prior is None else prior).expand(B, I, J)
    out, change = poses.new_empty(B, J, D_out), poses.new_empty(T, B, J)
    coupling, agreement = poses.new_empty(T, B, I, J), poses.new_empty(T, B, I, J)
    step = max(1, VOTES_AT_ONCE // max(1, I * J * D_out))
    for first in range(0, B, step):
        rows = slice(first, first + step)
        u = transform(poses[rows], weight).expand(-1, -1, J, -1)  # [b, I, J, D_out]
        v = u.new_zeros(u.shape[0], J, D_out)
        # One more iteration than is looked at: the last one of all has no agreement.
        steps = iterations(u, logits[rows], bias, T + 1, leaky=leaky, eps=eps, may_close=prior is not None)
        for t, iteration in enumerate(islice(steps, T)):
            previous, v = v, iteration.v
            assert iteration.agreement is not None
            coupling[t, rows], agreement[t, rows] = iteration.c, iteration.agreement
            change[t, rows] = (v - previous).norm(dim=-1)
        out[rows] = v
    return RoutingTrace(out, coupling, torch.special.entr(coupling).sum(-1), agreement, change)
