"""The compiled ops of dynamic routing as PyTorch sees them: derivatives, vmap, shapes for tracing, registration.

Tensors are as in ``reference.py``; checks and the choice of the backend are in ``api.py``.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fastcaps.functional import compute_dtype
from fastcaps.routing.backend import EXTENSION_BUILD
from fastcaps.routing.dynamic.reference import dynamic_routing_reference, masked, output_capsules


def upcast(dtype: torch.dtype, *tensors: Tensor | None) -> tuple[Any, ...]:
    """The tensors in ``dtype``; None stays None."""
    return tuple(x if x is None else x.to(dtype) for x in tensors)


def op(backend: str, direction: str) -> Any:
    """The op of a backend, "native" or "triton", for a direction, "forward" or "backward"."""
    return getattr(torch.ops.fastcaps, f"{backend}_dynamic_routing_{direction}").default


def compiled_dynamic_routing(
    backend: str,
    poses: Tensor,
    weight: Tensor | None,
    prior: Tensor | None,
    bias: Tensor | None,
    mask: Tensor | None,
    *options: Any,
) -> Tensor:
    """The output ``[B, J, D_out]`` of a backend's op, by the cheapest way that keeps every derivative.

    ``options`` are num_iterations, leaky, detach, eps and allow_tf32.
    """
    if torch.compiler.is_compiling():
        # A traced call is the op alone, whose derivatives are registered: tracing an autograd.Function would cut
        # a second derivative off without a word.
        prior, bias = upcast(compute_dtype(poses.dtype), prior, bias)
        return op(backend, "forward")(poses, weight, prior, bias, mask, *options)[0]
    if torch._C._are_functorch_transforms_active() or torch.autograd.forward_ad._current_level >= 0:
        return DynamicRouting.apply(backend, poses, weight, prior, bias, mask, *options)[0]
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (poses, weight, prior, bias)):
        return EagerDynamicRouting.apply(backend, poses, weight, prior, bias, mask, *options)
    return DynamicRouting.forward(backend, poses, weight, prior, bias, mask, *options)[0]


class DynamicRouting(torch.autograd.Function):
    """Connects the forward and backward ops, which read and write half types; prior and bias are at least float32."""

    @staticmethod
    def forward(
        backend: str,
        poses: Tensor,
        weight: Tensor | None,
        prior: Tensor | None,
        bias: Tensor | None,
        mask: Tensor | None,
        num_iterations: int,
        leaky: bool,
        detach: bool,
        eps: float,
        allow_tf32: bool,
    ) -> tuple[Tensor, Tensor]:
        """Output ``[B, J, D_out]`` in the dtype of ``poses``, and the weighted sums ``[T, B, J, D_out]``."""
        prior, bias = upcast(compute_dtype(poses.dtype), prior, bias)
        with torch._C._AutoDispatchBelowAutograd():  # the registered derivatives are for traced calls
            return op(backend, "forward")(
                poses, weight, prior, bias, mask, num_iterations, leaky, detach, eps, allow_tf32
            )

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        """Save the inputs and the sums."""
        ctx.backend = inputs[0]
        ctx.save_for_backward(*inputs[1:6], output[1])
        ctx.mark_non_differentiable(output[1])
        ctx.num_iterations, ctx.leaky, ctx.detach, ctx.eps, ctx.allow_tf32 = inputs[6:]

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        """By the op, or differentiably where a second derivative may be wanted."""
        if torch.is_grad_enabled():
            *inputs, mask, _ = ctx.saved_tensors
            return None, *_differentiable_backward(ctx, inputs, mask, grad, ctx.needs_input_grad[1:5]), *[None] * 6
        return None, *_compiled_backward(ctx, grad, ctx.needs_input_grad[1:5])

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[tuple[Tensor, Tensor], tuple[int, int]]:
        """Fold the mapped axis into the batch, which gives every sample poses, prior and mask of its own, no weight."""
        backend, poses, weight, prior, bias, mask, *options = args
        in_dims = in_dims[1:]
        if in_dims[1] is not None or in_dims[3] is not None:
            raise NotImplementedError(
                f"vmap over the weight or bias of dynamic_routing: the {backend} backend has one of each per call; "
                "pass backend='reference', or map over poses, prior and mask only"
            )
        N = info.batch_size

        def stack(x: Tensor, dim: int | None) -> Tensor:
            return x.expand(N, *x.shape) if dim is None else x.movedim(dim, 0)

        poses = stack(poses, in_dims[0])  # [N, B, ...]
        B = poses.shape[1]
        if prior is not None and (in_dims[2] is not None or prior.dim() == 3):
            prior = stack(prior, in_dims[2])  # [N, B, I, J] or [N, I, J]
            if prior.dim() == 3:
                prior = prior[:, None].expand(-1, B, -1, -1)
            prior = prior.flatten(0, 1)
        if mask is not None:
            mask = stack(mask, in_dims[4]).flatten(0, 1)
        out, sums = DynamicRouting.apply(backend, poses.flatten(0, 1), weight, prior, bias, mask, *options)
        return (out.unflatten(0, (N, B)), sums.unflatten(1, (N, B))), (0, 1)


class EagerDynamicRouting(torch.autograd.Function):
    """The same without torch.func: ``setup_context`` costs 20 us a call (benchmarks/call_overhead.py)."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> Tensor:
        """Output ``[B, J, D_out]``."""
        out, sums = DynamicRouting.forward(*args)
        ctx.backend = args[0]
        ctx.save_for_backward(*args[1:6], sums)
        ctx.num_iterations, ctx.leaky, ctx.detach, ctx.eps, ctx.allow_tf32 = args[6:]
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """As :meth:`DynamicRouting.backward`."""
        return DynamicRouting.backward(ctx, grad, grad)


def _compiled_backward(ctx: Any, grad: Tensor, needed: Sequence[bool]) -> tuple[Tensor | None, ...]:
    """The gradients of all arguments but the backend by its backward op; eager and traced calls share it."""
    *inputs, mask, sums = ctx.saved_tensors
    needed = [bool(need) for need in needed]
    grads = op(ctx.backend, "backward")(
        grad,
        *inputs[:2],
        *upcast(sums.dtype, *inputs[2:]),
        mask,
        sums,
        ctx.leaky,
        ctx.detach,
        ctx.eps,
        *needed,
        ctx.allow_tf32,
    )
    returned = (g.to(x.dtype) if need else None for g, x, need in zip(grads, inputs, needed, strict=True))
    return *returned, *[None] * 6


def _differentiable_backward(
    ctx: Any, inputs: Sequence[Tensor | None], mask: Tensor | None, grad: Tensor, needed: Sequence[bool]
) -> list[Tensor | None]:
    """The gradients as differentiable functions of inputs and grad: rebuild the reference and differentiate it."""
    wanted = [n for n in range(4) if needed[n]]

    def reference(*primals: Tensor) -> Tensor:
        full = list(inputs)
        for n, primal in zip(wanted, primals, strict=True):
            full[n] = primal
        poses = full[0]
        assert poses is not None
        with torch.autocast(poses.device.type, enabled=False):  # as in the forward
            out = dynamic_routing_reference(
                *upcast(compute_dtype(poses.dtype), masked(poses, mask), *full[1:]),
                num_iterations=ctx.num_iterations,
                leaky=ctx.leaky,
                detach=ctx.detach,
                eps=ctx.eps,
            )
        return out.to(poses.dtype)

    vjp = torch.func.vjp(reference, *(inputs[n] for n in wanted))[1]
    grads: list[Tensor | None] = [None] * 4
    for n, gradient in zip(wanted, vjp(grad), strict=True):
        grads[n] = gradient
    return grads


# ---------------------------------------------------------------------------------------------------- registration


def _forward_fake(
    poses: Tensor,
    weight: Tensor | None,
    prior: Tensor | None,
    bias: Tensor | None,
    mask: Tensor | None,
    num_iterations: int,
    leaky: bool,
    detach: bool,
    eps: float,
    allow_tf32: bool = False,
) -> tuple[Tensor, Tensor]:
    D_out = poses.shape[3] if weight is None else weight.shape[2]
    shape = (poses.shape[0], output_capsules(poses, weight, prior, bias), D_out)
    sums = poses.new_empty((num_iterations, *shape), dtype=compute_dtype(poses.dtype))
    return poses.new_empty(shape), sums


def _backward_fake(
    grad: Tensor,
    poses: Tensor,
    weight: Tensor | None,
    prior: Tensor | None,
    bias: Tensor | None,
    mask: Tensor | None,
    sums: Tensor,
    leaky: bool,
    detach: bool,
    eps: float,
    *needed: bool,
) -> tuple[Tensor, ...]:
    """A gradient per input, in its shape; of size 0 where it is not needed or there is no such input."""
    inputs = (poses, weight, prior, bias)
    return tuple(
        x.new_empty(x.shape) if x is not None and need else grad.new_empty(0)
        for x, need in zip(inputs, needed[:4], strict=True)  # behind them: allow_tf32
    )


def _backward_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs[:6])
    ctx.num_iterations = inputs[6].shape[0]
    ctx.leaky, ctx.detach, ctx.eps = inputs[7:10]
    ctx.needed = inputs[10:14]


def _backward_backward(ctx: Any, *seconds: Tensor) -> tuple[Tensor | None, ...]:
    """The second derivative of a traced call: the reference differentiated twice."""
    grad, *inputs, mask = ctx.saved_tensors
    needed = [need and x is not None for need, x in zip(ctx.needed, inputs, strict=True)]
    wanted = [n for n in range(4) if needed[n]]

    def gradients(grad: Tensor, *primals: Tensor) -> tuple[Tensor | None, ...]:
        full = list(inputs)
        for n, primal in zip(wanted, primals, strict=True):
            full[n] = primal
        found = _differentiable_backward(ctx, full, mask, grad, needed)
        return tuple(found[n] for n in wanted)

    vjp = torch.func.vjp(gradients, grad, *(inputs[n] for n in wanted))[1]
    d_grad, *d_inputs = vjp(tuple(seconds[n] for n in wanted))
    result: list[Tensor | None] = [None] * 4
    for n, gradient in zip(wanted, d_inputs, strict=True):
        result[n] = gradient
    return d_grad, *result, *([None] * 10)


def _register(backend: str) -> None:
    """Shapes for tracing and derivatives, for a backend whose schemas are there."""

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        DynamicRouting.setup_context(ctx, (backend, *inputs), output)

    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        return _compiled_backward(ctx, grad, ctx.needs_input_grad[:4])

    names = [f"fastcaps::{backend}_dynamic_routing_{direction}" for direction in ("forward", "backward")]
    torch.library.register_fake(names[0], _forward_fake)
    torch.library.register_fake(names[1], _backward_fake)
    torch.library.register_autograd(names[0], backward, setup_context=setup_context)
    torch.library.register_autograd(names[1], _backward_backward, setup_context=_backward_setup)


def _triton(direction: str) -> Callable[..., tuple[Tensor, ...]]:
    """A Triton op, whose kernels are imported with its first call."""

    def call(*arguments: Any) -> tuple[Tensor, ...]:
        from fastcaps.routing.dynamic.triton import launch

        device = arguments[0].device
        if device.type != "cuda":  # the interpreter
            return getattr(launch, direction)(*arguments)
        with torch.cuda.device(device):
            capturing = torch.cuda.is_current_stream_capturing()
            try:
                return getattr(launch, direction)(*arguments)
            except Exception as error:
                if capturing:
                    raise RuntimeError(
                        "dynamic_routing failed in a CUDA graph capture. A capture forbids to load kernels: call "
                        "fastcaps.warmup with these sizes, dtype and options before it"
                    ) from error
                raise

    return call


_SCHEMAS = {  # those of the native ops, in csrc/ops.cpp
    "forward": "(Tensor poses, Tensor? weight, Tensor? prior, Tensor? bias, Tensor? mask, int num_iterations, "
    "bool leaky, bool detach, float eps, bool allow_tf32=False) -> (Tensor out, Tensor sums)",
    "backward": "(Tensor grad, Tensor poses, Tensor? weight, Tensor? prior, Tensor? bias, Tensor? mask, Tensor sums, "
    "bool leaky, bool detach, float eps, bool need_poses, bool need_weight, bool need_prior, bool need_bias, "
    "bool allow_tf32=False) -> (Tensor d_poses, Tensor d_weight, Tensor d_prior, Tensor d_bias)",
}
_LIBRARY = torch.library.Library("fastcaps", "FRAGMENT")
for _direction, _schema in _SCHEMAS.items():
    _LIBRARY.define(f"triton_dynamic_routing_{_direction}{_schema}")
    for _key in ("CUDA", "CPU"):  # on CPU tensors in Triton's interpreter only
        _LIBRARY.impl(f"triton_dynamic_routing_{_direction}", _triton(_direction), _key)
_register("triton")
if EXTENSION_BUILD is not None:
    _register("native")
