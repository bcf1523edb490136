"""Compiled ops of dynamic routing: derivatives, vmap, shapes for tracing, registration.

Letters are those of ``reference.py``. ``api.py`` checks the arguments and chooses the backend.
"""

import importlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fastcaps.functional import compute_dtype, without_autocast
from fastcaps.routing.backend import EXTENSION_BUILD, constant_when_traced
from fastcaps.routing.dynamic.arguments import DIFFERENTIABLE, Options, Tensors
from fastcaps.routing.dynamic.reference import dynamic_routing_reference, masked, masked_prior, output_capsules


def op(backend: str, direction: str) -> Any:
    """The op of a backend, "native" or "triton", for a direction, "forward" or "backward"."""
    return getattr(torch.ops.fastcaps, f"{backend}_dynamic_routing_{direction}").default


def run_op(backend: str, direction: str, *arguments: Any) -> Any:
    """What the op returns; memory that it does not get is PyTorch's own error, as of any other op."""
    try:
        return op(backend, direction)(*arguments)
    except RuntimeError:
        # The stable ABI, which the native ops are built against, lets no error of PyTorch's through: ask once more.
        if backend == "native" and (missing := importlib.import_module("fastcaps._C").bytes_not_allocated()):
            try:
                torch.empty(missing, dtype=torch.uint8, device=arguments[0].device)
            except RuntimeError as error:
                raise error from None
        raise


@constant_when_traced
def _exports_to_onnx() -> bool:
    return torch.onnx.is_in_onnx_export()


def route(backend: str, tensors: Tensors, options: Options) -> Tensor:
    """The output ``[B, J, D_out]``, in the dtype of the poses, by the cheapest way that keeps every derivative."""
    with without_autocast(tensors.poses.device.type):  # everything inside is float32 at least
        traced = torch.compiler.is_compiling() or torch.jit.is_tracing()
        transformed = torch._C._are_functorch_transforms_active()
        forward_mode = not traced and torch.autograd.forward_ad._current_level >= 0
        # Traced, torch.func would take the op for a constant in a second derivative, and ONNX does not know it.
        if backend == "reference" or forward_mode or (traced and (transformed or _exports_to_onnx())):
            return reference_output(tensors, options)
        tensors = _expanded(tensors)
        if traced:
            # The op alone, whose derivatives are registered: tracing an autograd.Function would cut a second
            # derivative off without a word.
            return op(backend, "forward")(*_widened(tensors), *options)[0]
        if transformed:
            return DynamicRouting.apply(backend, options, *tensors)[0]
        if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors):
            return EagerDynamicRouting.apply(backend, options, *tensors)
        return _forward(backend, tensors, options)[0]


def reference_output(tensors: Tensors, options: Options) -> Tensor:
    """The output ``[B, J, D_out]`` of the reference, in the dtype of the poses."""
    with without_autocast(tensors.poses.device.type):
        poses, weight, prior, bias, _ = upcast(tensors)
        out = dynamic_routing_reference(
            poses,
            weight,
            prior,
            bias,
            num_iterations=options.num_iterations,
            leaky=options.leaky,
            detach=options.detach,
            eps=options.eps,
        )
    return out.to(tensors.poses.dtype)


def upcast(tensors: Tensors) -> Tensors:
    """The tensors as the reference takes them: in their compute dtype, the mask applied to poses and prior."""
    poses, weight, prior, bias, mask = tensors
    dtype = compute_dtype(poses.dtype)
    weight, prior, bias = (x if x is None else x.to(dtype) for x in (weight, prior, bias))
    return Tensors(masked(poses, mask).to(dtype), weight, masked_prior(prior, mask), bias)


def _expanded(tensors: Tensors) -> Tensors:
    """Prior ``[I, J]`` or ``[B, I, J]`` and bias ``[J, D_out]``."""
    poses, weight, prior, bias, mask = tensors
    if prior is None and bias is None:
        return tensors
    (B, I), J = poses.shape[:2], output_capsules(poses, weight, prior, bias)
    dtype = compute_dtype(poses.dtype)  # autograd sums an expanded gradient back: not in a half type
    if prior is not None:
        shape = (B, I, J) if prior.dim() == 3 and prior.shape[0] != 1 else (I, J)
        if prior.shape != shape:
            prior = prior.to(dtype).reshape(prior.shape[-len(shape) :]).expand(shape)
    if bias is not None:
        bias = bias.to(dtype).expand(J, -1)
    return Tensors(poses, weight, prior, bias, mask)


def _widened(tensors: Tensors) -> Tensors:
    """Prior and bias in float32 at least."""
    poses, weight, prior, bias, mask = tensors
    dtype = compute_dtype(poses.dtype)
    prior, bias = (x if x is None else x.to(dtype) for x in (prior, bias))
    return Tensors(poses, weight, prior, bias, mask)


# ----------------------------------------------------------------------------------------------- eager and torch.func


def _forward(backend: str, tensors: Tensors, options: Options) -> tuple[Tensor, Tensor]:
    """The output ``[B, J, D_out]``, in the dtype of the poses, and the weighted sums ``[T, B, J, D_out]``."""
    with torch._C._AutoDispatchBelowAutograd():  # the registered derivatives are for traced calls
        return run_op(backend, "forward", *_widened(tensors), *options)


def _save(ctx: Any, backend: str, tensors: Sequence[Tensor | None], options: Options, sums: Tensor) -> None:
    """Keep what the backward needs: the inputs and the sums, no votes."""
    ctx.backend, ctx.options = backend, options
    ctx.save_for_backward(*tensors, sums)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """The gradients of backend, options and the tensors: by the op, or differentiably for a second derivative."""
    *saved, sums = ctx.saved_tensors
    _, _, *needed = ctx.needs_input_grad
    tensors, wanted = Tensors(*saved), _names(needed)
    if torch.is_grad_enabled():
        found = _differentiable_gradients(tensors, ctx.options, grad, wanted)
    else:
        found = _op_gradients(ctx.backend, tensors, ctx.options, sums, grad, wanted)
    return None, None, *(found.get(name) for name in Tensors._fields)


class DynamicRouting(torch.autograd.Function):
    """Connects the forward and the backward op under the transforms of ``torch.func``, which want ``setup_context``."""

    @staticmethod
    def forward(backend: str, options: Options, *tensors: Any) -> tuple[Tensor, Tensor]:
        """The output ``[B, J, D_out]`` and the weighted sums ``[T, B, J, D_out]``."""
        return _forward(backend, Tensors(*tensors), options)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        """Save the inputs and the sums."""
        (backend, options, *tensors), (_, sums) = inputs, output
        ctx.mark_non_differentiable(sums)
        _save(ctx, backend, tensors, options, sums)

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        """The gradients of all arguments."""
        return _backward(ctx, grad)

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[Any, ...], backend: str, options: Options, *tensors: Any
    ) -> tuple[tuple[Tensor, Tensor], tuple[int, int]]:
        """Fold the mapped axis into the batch, which gives every sample poses, prior and mask of its own; a call for
        each weight or bias, where these are mapped."""
        _, _, *tensor_dims = in_dims
        dims, (poses, weight, prior, bias, mask), N = Tensors(*tensor_dims), Tensors(*tensors), info.batch_size
        if dims.weight is not None or dims.bias is not None:
            pairs = list(zip(tensors, tensor_dims, strict=True))
            calls = [
                DynamicRouting.apply(backend, options, *(x if dim is None else x.select(dim, n) for x, dim in pairs))
                for n in range(N)
            ]
            out, sums = (torch.stack(results) for results in zip(*calls, strict=True))
            return (out, sums), (0, 0)

        def stack(x: Tensor, dim: Any) -> Tensor:
            return x.expand(N, *x.shape) if dim is None else x.movedim(dim, 0)

        poses = stack(poses, dims.poses)  # [N, B, ...]
        B = poses.shape[1]
        if prior is not None and (dims.prior is not None or prior.dim() == 3):
            prior = stack(prior, dims.prior)  # [N, B, I, J] or [N, I, J]
            if prior.dim() == 3:
                prior = prior[:, None].expand(-1, B, -1, -1)
            prior = prior.flatten(0, 1)
        if mask is not None:
            mask = stack(mask, dims.mask).flatten(0, 1)
        out, sums = DynamicRouting.apply(backend, options, poses.flatten(0, 1), weight, prior, bias, mask)
        return (out.unflatten(0, (N, B)), sums.unflatten(1, (N, B))), (0, 1)


class EagerDynamicRouting(torch.autograd.Function):
    """What runs outside of torch.func: without ``setup_context``, which takes time (benchmarks/call_overhead.py)."""

    @staticmethod
    def forward(ctx: Any, backend: str, options: Options, *tensors: Any) -> Tensor:
        """The output ``[B, J, D_out]``."""
        out, sums = _forward(backend, Tensors(*tensors), options)
        _save(ctx, backend, tensors, options, sums)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """The gradients of all arguments."""
        return _backward(ctx, grad)


# ---------------------------------------------------------------------------------------------------------- gradients


def _names(needed: Sequence[bool]) -> list[str]:
    """Which of the differentiable tensors have ``needed`` set; the mask behind them never has."""
    return [name for name, need in zip(DIFFERENTIABLE, needed, strict=False) if need]


def _op_gradients(
    backend: str, tensors: Tensors, options: Options, sums: Tensor, grad: Tensor, wanted: Sequence[str]
) -> dict[str, Tensor]:
    """The wanted gradients by the backward op, in the dtypes of their tensors."""
    gradients = run_op(
        backend,
        "backward",
        grad,
        *_widened(tensors),
        sums,
        options.leaky,
        options.detach,
        options.eps,
        *(name in wanted for name in DIFFERENTIABLE),
        options.allow_tf32,
    )
    found = zip(DIFFERENTIABLE, gradients, strict=True)
    return {name: gradient.to(getattr(tensors, name).dtype) for name, gradient in found if name in wanted}


def _differentiable_gradients(
    tensors: Tensors, options: Options, grad: Tensor, wanted: Sequence[str]
) -> dict[str, Tensor]:
    """The wanted gradients as differentiable functions of tensors and grad: those of the reference."""

    def output(*inputs: Tensor) -> Tensor:
        return reference_output(tensors._replace(**dict(zip(wanted, inputs, strict=True))), options)

    vjp = torch.func.vjp(output, *(getattr(tensors, name) for name in wanted))[1]
    return dict(zip(wanted, vjp(grad), strict=True))


# ------------------------------------------------------------------------------------------------------- registration


def _forward_arguments(
    poses: Tensor,
    weight: Tensor | None,
    prior: Tensor | None,
    bias: Tensor | None,
    mask: Tensor | None,
    *options: Any,
) -> tuple[Tensors, Options]:
    """The arguments of a forward op; a trailing one that has its default may be missing."""
    return Tensors(poses, weight, prior, bias, mask), Options(*options)


def _backward_arguments(
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
    need_poses: bool,
    need_weight: bool,
    need_prior: bool,
    need_bias: bool,
    allow_tf32: bool = False,
) -> tuple[Tensors, Options, Tensor, Tensor, list[str]]:
    """The arguments of a backward op: tensors, options, sums, grad, and which gradients are wanted."""
    tensors = Tensors(poses, weight, prior, bias, mask)
    needed = zip(DIFFERENTIABLE, (need_poses, need_weight, need_prior, need_bias), strict=True)
    wanted = [name for name, need in needed if need and getattr(tensors, name) is not None]
    return tensors, Options(sums.shape[0], leaky, detach, eps, allow_tf32), sums, grad, wanted


def _forward_fake(*arguments: Any) -> tuple[Tensor, Tensor]:
    (poses, weight, prior, bias, _), options = _forward_arguments(*arguments)
    D_out = poses.shape[3] if weight is None else weight.shape[2]
    shape = (poses.shape[0], output_capsules(poses, weight, prior, bias), D_out)
    sums = poses.new_empty((options.num_iterations, *shape), dtype=compute_dtype(poses.dtype))
    return poses.new_empty(shape), sums


def _backward_fake(*arguments: Any) -> tuple[Tensor, ...]:
    """A gradient per tensor, in its shape; of size 0 where it is not wanted or there is no such tensor."""
    tensors, _, _, grad, wanted = _backward_arguments(*arguments)
    inputs = {name: getattr(tensors, name) for name in wanted}
    return tuple(
        inputs[name].new_empty(inputs[name].shape) if name in inputs else grad.new_empty(0) for name in DIFFERENTIABLE
    )


def _register(backend: str) -> None:
    """Shapes for tracing and derivatives, for a backend whose schemas are there."""
    forward, backward = (f"fastcaps::{backend}_dynamic_routing_{direction}" for direction in ("forward", "backward"))
    forward_names, backward_names = (
        [argument.name for argument in op(backend, direction)._schema.arguments] for direction in _SCHEMAS
    )

    def forward_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        (tensors, options), (_, sums) = _forward_arguments(*inputs), output
        ctx.mark_non_differentiable(sums)
        _save(ctx, backend, tensors, options, sums)

    def forward_backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        *saved, sums = ctx.saved_tensors
        found = _op_gradients(backend, Tensors(*saved), ctx.options, sums, grad, _names(ctx.needs_input_grad))
        return tuple(found.get(name) for name in forward_names)

    def backward_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        tensors, ctx.options, _, grad, ctx.wanted = _backward_arguments(*inputs)
        ctx.save_for_backward(*tensors, grad)

    def backward_backward(ctx: Any, *seconds: Tensor) -> tuple[Tensor | None, ...]:
        """The second derivative of a traced call: the reference differentiated twice."""
        *saved, grad = ctx.saved_tensors
        tensors, wanted = Tensors(*saved), ctx.wanted

        def gradients(grad: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
            at = tensors._replace(**dict(zip(wanted, inputs, strict=True)))
            return tuple(_differentiable_gradients(at, ctx.options, grad, wanted).values())

        vjp = torch.func.vjp(gradients, grad, *(getattr(tensors, name) for name in wanted))[1]
        second = dict(zip(DIFFERENTIABLE, seconds, strict=True))
        found = dict(zip(("grad", *wanted), vjp(tuple(second[name] for name in wanted)), strict=True))
        return tuple(found.get(name) for name in backward_names)

    torch.library.register_fake(forward, _forward_fake)
    torch.library.register_fake(backward, _backward_fake)
    torch.library.register_autograd(forward, forward_backward, setup_context=forward_setup)
    torch.library.register_autograd(backward, backward_backward, setup_context=backward_setup)


def _triton_forward(*arguments: Any) -> tuple[Tensor, ...]:
    from fastcaps.routing.dynamic.triton import launch

    return _launched(launch.forward, *_forward_arguments(*arguments))


def _triton_backward(*arguments: Any) -> tuple[Tensor, ...]:
    from fastcaps.routing.dynamic.triton import launch

    return _launched(launch.backward, *_backward_arguments(*arguments))


def _launched(launch: Callable[..., tuple[Tensor, ...]], tensors: Tensors, *arguments: Any) -> tuple[Tensor, ...]:
    """Launch Triton kernels on the device of their tensors."""
    device = tensors.poses.device
    if device.type != "cuda":  # the interpreter
        return launch(tensors, *arguments)
    with torch.cuda.device(device):
        capturing = torch.cuda.is_current_stream_capturing()
        try:
            return launch(tensors, *arguments)
        except Exception as error:
            if capturing:
                raise RuntimeError(
                    "dynamic_routing failed in a CUDA graph capture. A capture forbids to load kernels: call "
                    "fastcaps.warmup with these sizes, dtype and options before it"
                ) from error
            raise


_SCHEMAS = {  # those of the native ops, in csrc/ops.cpp
    "forward": "(Tensor poses, Tensor? weight, Tensor? prior, Tensor? bias, Tensor? mask, int num_iterations, "
    "bool leaky, bool detach, float eps, bool allow_tf32=False) -> (Tensor out, Tensor sums)",
    "backward": "(Tensor grad, Tensor poses, Tensor? weight, Tensor? prior, Tensor? bias, Tensor? mask, Tensor sums, "
    "bool leaky, bool detach, float eps, bool need_poses, bool need_weight, bool need_prior, bool need_bias, "
    "bool allow_tf32=False) -> (Tensor d_poses, Tensor d_weight, Tensor d_prior, Tensor d_bias)",
}
_LIBRARY = torch.library.Library("fastcaps", "FRAGMENT")
for _direction, _run in (("forward", _triton_forward), ("backward", _triton_backward)):
    _LIBRARY.define(f"triton_dynamic_routing_{_direction}{_SCHEMAS[_direction]}")
    for _key in ("CUDA", "CPU"):  # on CPU tensors in Triton's interpreter only
        _LIBRARY.impl(f"triton_dynamic_routing_{_direction}", _run, _key)
_register("triton")
if EXTENSION_BUILD is not None:
    _register("native")
