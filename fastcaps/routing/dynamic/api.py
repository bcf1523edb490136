"""Public functions dynamic_routing and route_votes: documentation, checks, choice of the backend."""

from typing import Any

import torch
from torch import Tensor

from fastcaps._checks import check_number
from fastcaps.functional import autocast_is_on, compute_dtype
from fastcaps.routing.backend import choose_backend, constant_when_traced
from fastcaps.routing.dynamic.arguments import Options, Tensors
from fastcaps.routing.dynamic.ops import route
from fastcaps.routing.dynamic.reference import output_capsules

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def dynamic_routing(
    poses: Tensor,
    weight: Tensor,
    *,
    num_iterations: int = 3,
    prior: Tensor | None = None,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    leaky: bool = False,
    detach: bool = False,
    eps: float = 0.0,
    backend: str | None = None,
) -> Tensor:
    r"""Transform poses into votes and route them by agreement (Sabour et al. 2017, procedure 1).

    .. math::
        u_{bij} = W_{ij} x_{bi}, \quad
        c_t = \mathrm{softmax}_J(b_t), \quad
        s_t = \textstyle\sum_i c_t u + \mathrm{bias}, \quad
        v_t = \mathrm{squash}(s_t), \quad
        b_{t+1} = b_t + \langle u, v_t \rangle

    with :math:`b_0` the prior; the result is :math:`v_{T-1}`. B is the batch, I the input capsules, J the output
    capsules, D_in and D_out their pose sizes, T the number of iterations.

    Args:
        poses: ``[B, I, D_in]``; float64, float32, bfloat16 or float16. B and I may be 0.
        weight: ``[I or 1, J or 1, D_out, D_in]``, dtype of ``poses``; a 1 shares the matrices over that axis.
        num_iterations: T, at least 1.
        prior: initial routing logits, broadcastable to ``[B, I, J]``; None is 0, ``-inf`` closes a route. An input
            capsule whose routes are all closed casts no vote and gets gradients of 0.
        bias: ``[J or 1, D_out]``, added to the weighted sum in every iteration.
        mask: ``[B, I]`` bool; False: this input capsule's pose and prior count as 0, whatever they hold, and get no
            gradient.
        leaky: the softmax runs over J + 1 capsules, the last with a logit of 0, and drops the last.
        detach: the coupling coefficients are constants for the gradient: only the last weighted sum is
            differentiated, and the prior gets none. The default is the full gradient.
        eps: as in :func:`fastcaps.squash`, for parity with published code only.
        backend: ``"triton"``, ``"native"``, ``"reference"``, or None for the fastest that can run here. On any of
            them, the reference computes forward-mode and second derivatives, gradients by ``torch.func`` or with
            ``create_graph=True``, ``torch.func`` inside ``torch.compile``, and what is exported to ONNX: with the votes
            in memory.

    Returns:
        ``[B, J, D_out]`` in the dtype of ``poses``. J is the largest of weight's, prior's and bias's. A weight shared
        over J with neither prior nor bias makes all output capsules equal.
        Half types are computed in float32 and rounded once; under autocast poses and weight are cast first.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: sizes or devices do not fit, or no backend has the name.
        BackendUnavailable: the named backend cannot run here, or not on such tensors.

    Example:
        >>> poses, weight = torch.randn(2, 6, 4), torch.randn(6, 3, 8, 4)
        >>> dynamic_routing(poses, weight, num_iterations=3).shape
        torch.Size([2, 3, 8])
    """
    options = Options(num_iterations, leaky, detach, eps)
    tensors = check_poses(Tensors(poses, weight, prior, bias, mask), options)
    return route(*_resolved(backend, tensors, options))


def route_votes(
    votes: Tensor,
    *,
    num_iterations: int = 3,
    prior: Tensor | None = None,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    leaky: bool = False,
    detach: bool = False,
    eps: float = 0.0,
    backend: str | None = None,
) -> Tensor:
    """Route votes that are already there: :func:`dynamic_routing` without the transformation.

    Args:
        votes: ``[B, I, J or 1, D_out]``; float64, float32, bfloat16 or float16. B and I may be 0.
        num_iterations: T, at least 1.
        prior: as in :func:`dynamic_routing`.
        bias: ``[J or 1, D_out]``.
        mask: ``[B, I]`` bool; False: votes and prior of this input capsule count as 0.
        leaky: as in :func:`dynamic_routing`.
        detach: as in :func:`dynamic_routing`.
        eps: as in :func:`fastcaps.squash`.
        backend: as in :func:`dynamic_routing`.

    Returns:
        ``[B, J, D_out]`` in the dtype of ``votes``.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: sizes or devices do not fit, or no backend has the name.
        BackendUnavailable: the named backend cannot run here, or not on such tensors.

    Example:
        >>> route_votes(torch.randn(2, 6, 3, 8), num_iterations=2).shape
        torch.Size([2, 3, 8])
    """
    options = Options(num_iterations, leaky, detach, eps)
    tensors = _check_votes(Tensors(votes, None, prior, bias, mask), options)
    return route(*_resolved(backend, tensors, options))


# ---------------------------------------------------------------------------------------------------------- checks


def _check_tensor(name: str, value: Any, wanted: str, rank: int | None) -> Tensor:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor {wanted}, got {type(value).__name__}")
    if value.dtype not in DTYPES:
        raise TypeError(f"{name} must be float64, float32, bfloat16 or float16, got {value.dtype}")
    if rank is not None and value.dim() != rank:
        raise ValueError(f"{name} must be {wanted}, got {value.dim()} dimensions: {tuple(value.shape)}")
    return value


def check_poses(tensors: Tensors, options: Options) -> Tensors:
    """Check the arguments of dynamic_routing; the same tensors, poses and weight cast by autocast."""
    poses = _check_tensor("poses", tensors.poses, "[B, I, D_in]", 3)
    weight = _check_tensor("weight", tensors.weight, "[I or 1, J or 1, D_out, D_in]", 4)
    _check_options(options)
    poses, weight = _autocast(poses), _autocast(weight)
    _check_like("weight", weight, poses)
    I, D_in = poses.shape[1:]
    shape = tuple(weight.shape)
    if D_in == 0 or 0 in shape[1:]:
        raise ValueError(f"J, D_out and D_in must be at least 1, got weight {shape} and poses {tuple(poses.shape)}")
    if shape[0] not in (1, I):
        raise ValueError(
            f"weight must have I = {I} or 1 matrices on axis 0 for poses {tuple(poses.shape)}, got {shape}"
        )
    if shape[3] != D_in:
        raise ValueError(f"weight must have D_in = {D_in} on its last axis, as poses have, got {shape}")
    tensors = Tensors(poses, weight, tensors.prior, tensors.bias, tensors.mask)
    _check_extras(tensors, D_out=shape[2])
    return tensors


def _check_votes(tensors: Tensors, options: Options) -> Tensors:
    """Check the arguments of route_votes; the same tensors, the votes cast by autocast."""
    votes = _check_tensor("votes", tensors.poses, "[B, I, J or 1, D_out]", 4)
    _check_options(options)
    votes = _autocast(votes)
    if 0 in votes.shape[2:]:
        raise ValueError(f"J and D_out must be at least 1, got votes {tuple(votes.shape)}")
    tensors = Tensors(votes, None, tensors.prior, tensors.bias, tensors.mask)
    _check_extras(tensors, D_out=votes.shape[3])
    return tensors


def _check_options(options: Options) -> None:
    num_iterations, leaky, detach, eps, _ = options
    if isinstance(num_iterations, bool) or not isinstance(num_iterations, int):
        raise TypeError(f"num_iterations must be an int, got {num_iterations!r} ({type(num_iterations).__name__})")
    if num_iterations < 1:
        raise ValueError(f"num_iterations must be at least 1, got {num_iterations}")
    for name, value in (("leaky", leaky), ("detach", detach)):
        if not isinstance(value, bool):
            raise TypeError(f"{name} must be True or False, got {value!r}")
    check_number("eps", eps)


def _check_like(name: str, value: Tensor, poses: Tensor) -> None:
    if value.device != poses.device:
        raise ValueError(f"{name} must be on the device of the poses or votes, {poses.device}, got {value.device}")
    # Under autocast the poses change their dtype; a prior or bias may stay float32.
    amp = name in ("prior", "bias") and value.dtype == torch.float32 and autocast_is_on(poses.device.type)
    if value.dtype != poses.dtype and not amp:
        raise TypeError(f"{name} must have the dtype of the poses or votes, {poses.dtype}, got {value.dtype}")


def check_prior(prior: Any, B: int, I: int, J: int) -> None:
    """Raise unless ``prior`` is a floating-point tensor that broadcasts to ``[B, I, J]``."""
    _check_tensor("prior", prior, "broadcastable to [B, I, J]", None)
    wanted = (B, I, J)[3 - prior.dim() :] if prior.dim() <= 3 else None
    if wanted is None or any(n not in (1, m) for n, m in zip(prior.shape, wanted, strict=True)):
        raise ValueError(
            f"prior must broadcast to [B, I, J] = [{B}, {I}, {J}], each of its axes that or 1, got {tuple(prior.shape)}"
        )


def _check_extras(tensors: Tensors, D_out: int) -> None:
    """Check prior, bias and mask against poses and weight, or votes."""
    poses, weight, prior, bias, mask = tensors
    B, I = poses.shape[:2]
    if bias is not None:
        _check_tensor("bias", bias, "[J or 1, D_out]", 2)
        _check_like("bias", bias, poses)
    if prior is not None:
        _check_tensor("prior", prior, "broadcastable to [B, I, J]", None)
        _check_like("prior", prior, poses)
    J = output_capsules(poses, weight, prior, bias)
    J_votes = poses.shape[2] if weight is None else weight.shape[1]
    if J_votes not in (1, J):
        name = "votes" if weight is None else "weight"
        raise ValueError(f"{name} must have J = {J} or 1 output capsules, as prior or bias have, got {J_votes}")
    if bias is not None and (bias.shape[0] not in (1, J) or bias.shape[1] != D_out):
        raise ValueError(f"bias must be [J = {J} or 1, D_out = {D_out}], got {tuple(bias.shape)}")
    if prior is not None:
        check_prior(prior, B, I, J)
    if mask is not None:
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
            got = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
            raise TypeError(f"mask must be a bool tensor [B, I], got {got}")
        if tuple(mask.shape) != (B, I):
            raise ValueError(f"mask must be [B, I] = [{B}, {I}], got {tuple(mask.shape)}")
        if mask.device != poses.device:
            raise ValueError(f"mask must be on the device of the poses or votes, {poses.device}, got {mask.device}")


def _autocast(tensor: Tensor) -> Tensor:
    """What autocast does to the inputs of a matrix product; like it, leaves float64 alone."""
    kind = tensor.device.type
    if tensor.dtype == torch.float64 or not autocast_is_on(kind):
        return tensor
    return tensor.to(torch.get_autocast_dtype(kind))


# ------------------------------------------------------------------------------------------------------- execution


def _resolved(backend: str | None, tensors: Tensors, options: Options) -> tuple[str, Tensors, Options]:
    """The backend that runs, and what it is given."""
    poses, weight, prior, bias, mask = tensors
    num_iterations, leaky, detach, eps, _ = options
    # What is summed over the input capsules: votes, or poses where one matrix is for all of them.
    shared = weight is not None and weight.shape[0] == 1 and poses.shape[1] > 1
    D = poses.shape[-1] if weight is None or shared else weight.shape[2]
    chosen = choose_backend(backend, poses.device, poses.dtype, D)
    if detach and prior is not None:
        prior = prior.detach()  # constant coupling: nothing reaches the prior
    if eps:  # no smaller one survives a cast to this dtype
        eps = max(float(eps), torch.finfo(compute_dtype(poses.dtype)).tiny)
    options = Options(num_iterations, leaky, detach, eps, allows_tf32(poses))
    return chosen, Tensors(poses, weight, prior, bias, mask), options


def allows_tf32(poses: Tensor) -> bool:
    """Whether PyTorch's settings allow matrix products of these to be rounded to tf32."""
    return poses.device.type == "cuda" and poses.dtype == torch.float32 and _tf32_is_on()


@constant_when_traced  # a change of the setting is one of those that make a traced call stale
def _tf32_is_on() -> bool:
    return torch.backends.cuda.matmul.fp32_precision == "tf32"
