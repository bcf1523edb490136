"""Elementary functions of capsule networks: squash and length."""

import contextlib
from contextlib import AbstractContextManager

import torch
from torch import Tensor

from fastcaps._checks import check_floating, check_number

__all__ = ["length", "squash"]


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype that everything between input and output is computed in: float32 for half types, else their own."""
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype


def autocast_is_on(device_type: str) -> bool:
    """Whether autocast is on for tensors of a device type; there is none to ask about for ``"meta"``."""
    return device_type != "meta" and torch.is_autocast_enabled(device_type)


def without_autocast(device_type: str) -> AbstractContextManager[object]:
    """A context in which tensors of a device type keep their dtype; free where autocast is off anyway."""
    return torch.autocast(device_type, enabled=False) if autocast_is_on(device_type) else contextlib.nullcontext()


def _norm(s: Tensor, dim: int) -> Tensor:
    """``|s|`` over ``dim`` (kept, size 1), whose first and second derivatives at ``s = 0`` are 0 instead of NaN."""
    n2 = (s * s).sum(dim, keepdim=True)
    zero = n2 == 0
    # Both wheres are needed: the inner one keeps the infinite slope of sqrt at 0 out of the backward.
    return torch.where(zero, 0.0, torch.sqrt(torch.where(zero, 1.0, n2)))


def squash(s: Tensor, dim: int = -1, eps: float = 0.0) -> Tensor:
    r"""Shrink vectors to a length below 1 and keep their direction (Sabour et al. 2017, equation 1).

    .. math:: v = \frac{n^2}{1 + n^2} \, \frac{s}{n}, \qquad n = |s|

    It is computed as ``s * n / (1 + n^2)``, which needs no division by ``n``: value and gradient of a zero vector
    are exactly 0, never NaN. Lengths may reach 1e10 in float32 (and half types) and 1e70 in float64; far
    beyond, squares overflow.

    Args:
        s: vectors along ``dim``, any shape; floating point. Half types are computed in float32 and rounded once.
        dim: the axis that holds a vector's entries.
        eps: if positive, ``s * n^2 / ((1 + n^2) sqrt(n^2 + eps))``, for parity with published code only.

    Returns:
        A tensor of the shape and dtype of ``s``.

    Raises:
        TypeError: ``s`` is not a floating-point tensor, or ``eps`` is not a number.
        ValueError: ``eps`` is negative or not finite.

    Example:
        >>> squash(torch.tensor([3.0, 4.0]))  # length 5 becomes 25 / 26
        tensor([0.5769, 0.7692])
    """
    check_floating("s", s)
    check_number("eps", eps)
    x = s.to(compute_dtype(s.dtype))
    if eps > 0:
        n2 = (x * x).sum(dim, keepdim=True)
        v = x * (n2 / (1 + n2) / torch.sqrt(n2 + eps))
    else:
        n = _norm(x, dim)
        v = x * (n / (1 + n * n))
    return v.to(s.dtype)


def length(poses: Tensor, dim: int = -1) -> Tensor:
    """The activation of each capsule: the length of its pose (Sabour et al. 2017, section 2).

    Args:
        poses: vectors along ``dim``, any shape; floating point.
        dim: the axis that holds a pose's entries.

    Returns:
        The shape of ``poses`` without ``dim``, same dtype. The gradient of a zero vector is 0.

    Raises:
        TypeError: ``poses`` is not a floating-point tensor.

    Example:
        >>> length(torch.tensor([[3.0, 4.0], [0.0, 0.0]]))
        tensor([5., 0.])
    """
    check_floating("poses", poses)
    return _norm(poses.to(compute_dtype(poses.dtype)), dim).squeeze(dim).to(poses.dtype)
