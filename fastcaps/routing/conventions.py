"""Routing conventions of published capsule layers, mistakes included: for parity, and to recognise them.

The op knows none of this. Four conventions are wrong: a softmax over the input capsules (the shares that an input
capsule gives away no longer sum to 1), logits that are averaged over the batch (the output for one image depends on
the other images), and a squash over an axis of length 1 (which bends each entry instead of a pose's length) or over
the output capsules (which lets a pose become longer than 1).
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from fastcaps._checks import check_number
from fastcaps.functional import compute_dtype, squash, without_autocast
from fastcaps.routing.dynamic.reference import VOTES_AT_ONCE, Iteration, coupling, iterations, last_output, transform

CHOICES = {
    "softmax": ("outputs", "inputs"),
    "logits": ("sample", "batch"),
    "squash": ("norm", "elementwise", "outputs"),
}

EFFECTS = {
    ("softmax", "inputs"): "the softmax runs over the input capsules, so the shares of an input capsule do not sum to "
    "1: inputs compete for an output capsule instead of deciding between output capsules",
    ("logits", "batch"): "the routing logits are averaged over the batch, so the output for one sample depends on the "
    "others",
    ("squash", "elementwise"): "squash takes the norm over an axis of length 1, so it bends each entry instead of a "
    "pose's length",
    ("squash", "outputs"): "squash takes the norm over the output capsules instead of over a pose, so capsules share "
    "their lengths and a pose may be longer than 1",
}


class Routed(NamedTuple):
    """What :func:`plain_routing` returns: poses ``[B, J, D_out]``, the last coupling ``[B, I, J]`` and weighted sum."""

    poses: Tensor
    coupling: Tensor
    sums: Tensor


@dataclass(frozen=True)
class Convention:
    """How a layer deviates from procedure 1; called like :func:`fastcaps.dynamic_routing`, with memory that is bounded.

    As ``CapsuleLayer(..., routing=Convention(softmax="inputs"))`` it makes a layer that routes so.

    Attributes:
        softmax: over which capsules the coupling sums to 1: ``"outputs"`` (the paper), or ``"inputs"``.
        logits: one set for each ``"sample"`` (the paper), or the average over the ``"batch"``.
        squash: of the ``"norm"`` of a pose (the paper), ``"elementwise"``, or of the norm over the ``"outputs"``.
        norm_eps: added to the norm that squash divides by.

    Raises:
        ValueError: a choice is unknown.

    Example:
        >>> Convention(softmax="inputs")(torch.randn(2, 6, 4), torch.randn(6, 3, 8, 4), num_iterations=3).shape
        torch.Size([2, 3, 8])
    """

    softmax: str = "outputs"
    logits: str = "sample"
    squash: str = "norm"
    norm_eps: float = 0.0

    def __post_init__(self) -> None:
        for name, choices in CHOICES.items():
            if getattr(self, name) not in choices:
                wanted = " or ".join(map(repr, choices))
                raise ValueError(f"{name} must be {wanted}, got {getattr(self, name)!r}")
        check_number("norm_eps", self.norm_eps)

    @property
    def effects(self) -> list[str]:
        """What is wrong with it, in words."""
        chosen = [(name, getattr(self, name)) for name in CHOICES]
        return [EFFECTS[choice] for choice in chosen if choice in EFFECTS]

    def __call__(
        self,
        poses: Tensor,
        weight: Tensor | None,
        *,
        num_iterations: int = 3,
        prior: Tensor | None = None,
        bias: Tensor | None = None,
        leaky: bool = False,
        detach: bool = False,
        eps: float = 0.0,
    ) -> Tensor:
        """Poses ``[B, I, D_in]`` and weight ``[I or 1, J, D_out, D_in]`` to ``[B, J, D_out]``; prior ``[I, J]``.

        Without a weight the poses are the votes, ``[B, I, J, D_out]``.
        """
        dtype = compute_dtype(poses.dtype)
        with without_autocast(poses.device.type):
            x = poses.to(dtype)
            W = None if weight is None else weight.to(dtype).expand(poses.shape[1], -1, -1, -1)
            b, a = (None if t is None else t.to(dtype) for t in (prior, bias))

            def part(x: Tensor) -> Tensor:
                v = plain_routing(x, W, b, a, num_iterations, self, leaky=leaky, detach=detach, eps=eps)
                return v.poses

            if self.logits == "batch" and W is None:
                v = part(x)
            elif self.logits == "batch":
                assert W is not None
                logits = x.new_zeros(W.shape[:2]) if b is None else b
                steps = iterations(
                    _Factors(x, W), logits, a, num_iterations, leaky=leaky, detach=detach, eps=eps,
                    may_close=b is not None, coupling=self.coupling, squash=self.squashed, weighted_sum=_sum_of_factors,
                    agreement=_mean_agreement,
                )  # fmt: skip
                v = last_output(steps)
            else:  # samples are independent: a few at a time, computed again in the backward
                votes = math.prod(x.shape[1:]) if W is None else W[..., 0].numel()
                chunk = max(1, VOTES_AT_ONCE // max(1, votes))
                v = torch.cat([checkpoint(part, few, use_reentrant=False) for few in x.split(chunk)])
        return v.to(poses.dtype)

    def coupling(self, logits: Tensor, leaky: bool, may_close: bool = False) -> Tensor:
        """``[..., I, J]``, summing to 1 over J or over I, or to 0 where all logits of the sum are -inf."""
        if self.softmax == "outputs":
            return coupling(logits, leaky, may_close)
        return coupling(logits.mT, leaky, may_close).mT

    def squashed(self, s: Tensor, eps: float) -> Tensor:
        """``[..., D_out]``, of the length that the convention gives it."""
        if self.squash == "elementwise":
            return replace(self, squash="norm").squashed(s[..., None], eps)[..., 0]
        if self.squash == "outputs":
            return replace(self, squash="norm").squashed(s.mT, eps).mT
        if self.norm_eps:
            n = (s * s).sum(-1, keepdim=True).sqrt()
            return s * (n * n / (1 + n * n) / (n + self.norm_eps))
        return squash(s, eps=eps)


class _Factors(NamedTuple):
    """Votes ``weight @ poses`` that are never computed: logits ``[I, J]`` of the whole batch need none."""

    poses: Tensor  # [B, I, D_in]
    weight: Tensor  # [I, J, D_out, D_in]

    def detach(self) -> "_Factors":
        """The same as constants."""
        return _Factors(self.poses.detach(), self.weight.detach())


def _sum_of_factors(c: Tensor, factors: _Factors) -> Tensor:
    """``sum_i c W x`` as one product of matrices, c being ``[I, J]``."""
    x, W = factors
    (B, I, D_in), (J, D_out) = x.shape, W.shape[1:3]
    matrix = (c[..., None, None] * W).permute(0, 3, 1, 2).reshape(I * D_in, J * D_out)
    return (x.reshape(B, I * D_in) @ matrix).view(B, J, D_out)


def _mean_agreement(factors: _Factors, v: Tensor) -> Tensor:
    """The mean over the batch of ``<W x, v>``, ``[I, J]``: ``<W, mean of v x^T>``."""
    x, W = factors
    (B, I, D_in), (J, D_out) = x.shape, W.shape[1:3]
    mean = (x.reshape(B, I * D_in).mT @ v.reshape(B, J * D_out)).view(I, D_in, J, D_out) / max(B, 1)
    return torch.einsum("ijdk,ikjd->ij", W, mean)


def plain_routing(
    poses: Tensor,
    weight: Tensor | None,
    prior: Tensor | None,
    bias: Tensor | None,
    num_iterations: int,
    convention: Convention,
    *,
    leaky: bool = False,
    detach: bool = False,
    eps: float = 0.0,
) -> Routed:
    """Any convention with the votes in memory: the twin that a layer is compared with, step by step as published.

    Args:
        poses: ``[B, I, D_in]``; without a weight the votes, ``[B, I, J, D_out]``.
        weight: ``[I or 1, J, D_out, D_in]``, or None.
        prior: ``[I, J]`` or None.
        bias: ``[J, D_out]`` or None.
        num_iterations: T.
        convention: what deviates from the paper.
        leaky: as in :func:`fastcaps.dynamic_routing`.
        detach: as there.
        eps: as there.
    """
    for step in plain_iterations(
        poses, weight, prior, bias, num_iterations, convention, leaky=leaky, detach=detach, eps=eps
    ):
        last = step
    return Routed(last.v, last.c, last.s)


def plain_iterations(
    poses: Tensor,
    weight: Tensor | None,
    prior: Tensor | None,
    bias: Tensor | None,
    num_iterations: int,
    convention: Convention,
    *,
    leaky: bool = False,
    detach: bool = False,
    eps: float = 0.0,
) -> Iterator[Iteration]:
    """The iterations of :func:`plain_routing`, which takes the same; the values of one are those of a run that ends."""

    def agreement(u: Tensor, v: Tensor) -> Tensor:
        each = (u * v[:, None]).sum(-1)
        return each.mean(0, keepdim=True) if convention.logits == "batch" else each

    u = transform(poses, weight)  # [B, I, J, D_out]
    logits = (u.new_zeros(()) if prior is None else prior).expand(u.shape[:-1])
    return iterations(
        u, logits, bias, num_iterations, leaky=leaky, detach=detach, eps=eps, may_close=prior is not None,
        coupling=convention.coupling, weighted_sum=lambda c, u: (c[..., None] * u).sum(1),
        squash=convention.squashed, agreement=agreement,
    )  # fmt: skip
