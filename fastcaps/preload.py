"""The warmup: code and memory that a model or a shape needs, loaded before its first use."""

import copy
import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastcaps._checks import check_positive
from fastcaps.layers import CapsuleLayer
from fastcaps.routing import dynamic_routing


def warmup(
    target: nn.Module | Sequence[int],
    *,
    batch_size: int = 1,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    **options: Any,
) -> None:
    """Load everything that a model or a shape needs, by running its routing forward and backward once on zeros.

    A kernel's first use loads its code, which a capturing CUDA stream forbids: call this before a capture.

    Args:
        target: a module, whose :class:`CapsuleLayer` parts are run; or sizes ``(B, I, J, D_in, D_out)``.
        batch_size: B for a module.
        dtype: of the tensors; None: that of the module's parameters, or torch's default.
        device: of the tensors; None: that of the module's parameters, or CUDA if there is one.
        **options: of :func:`dynamic_routing`, for sizes: ``num_iterations``, ``backend``, ...

    Raises:
        TypeError: ``target`` is neither a module nor five sizes, or there are options for a module.
        ValueError: a module without a :class:`CapsuleLayer`, or a size below 1.

    Example:
        >>> warmup((128, 1152, 10, 8, 16), device="cpu", num_iterations=1)
    """
    check_positive(batch_size=batch_size)
    if isinstance(target, nn.Module):
        if options:
            raise TypeError(f"warmup: a module has its own options; not wanted: {', '.join(sorted(options))}")
        layers = [module for module in target.modules() if isinstance(module, CapsuleLayer)]
        if not layers:
            raise ValueError("warmup: the module holds no CapsuleLayer")
        for layer in layers:
            like: dict[str, Any] = {"dtype": dtype or layer.weight.dtype, "device": device or layer.weight.device}
            if like["dtype"] != layer.weight.dtype:  # as autocast will
                layer = copy.deepcopy(layer).to(like["dtype"])
            sizes = batch_size, layer.in_capsules, layer.in_dim
            _run_both_ways(layer, [sizes], [p for p in layer.parameters() if p.requires_grad], like)
        return
    if not isinstance(target, Sequence) or isinstance(target, str) or len(target) != 5:
        raise TypeError(f"warmup wants a module or sizes (B, I, J, D_in, D_out), got {target!r}")
    B, I, J, D_in, D_out = target
    check_positive(B=B, I=I, J=J, D_in=D_in, D_out=D_out)
    like = {"dtype": dtype, "device": device or ("cuda" if torch.cuda.is_available() else "cpu")}
    _run_both_ways(functools.partial(dynamic_routing, **options), [(B, I, D_in), (I, J, D_out, D_in)], [], like)


def _run_both_ways(
    routing: Callable[..., Tensor], shapes: list[tuple[int, ...]], parameters: list[nn.Parameter], like: dict[str, Any]
) -> None:
    """Forward and backward on zeros of these shapes; no ``grad`` is written."""
    with torch.inference_mode(False), torch.enable_grad():
        inputs = [torch.zeros(shape, requires_grad=True, **like) for shape in shapes]
        torch.autograd.grad(routing(*inputs).sum(), [*inputs, *parameters], allow_unused=True)
