"""Is everything ready to run? selftest() proves the numbers on this machine, warmup() loads what a shape needs."""

import copy
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastcaps.functional import compute_dtype
from fastcaps.layers import CapsuleLayer, require_positive
from fastcaps.routing import dynamic_routing
from fastcaps.routing.backend import BACKENDS, why_unavailable


def relative_error(value: Tensor, exact: Tensor) -> float:
    """``|value - exact| / |exact|`` in L2 over all entries and in float64; where ``exact`` is 0, 0 or infinity."""
    difference = (value.double() - exact.double()).norm().item()
    size = exact.double().norm().item()
    return difference / size if size > 0 else 0.0 if difference == 0 else math.inf


def error_budget(dtype: torch.dtype, reference_error: float, gradient: bool) -> float:
    """The largest relative error that counts as exact, against float64 on the same rounded inputs.

    float32 and float64: twice (gradients: three times) the error of plain PyTorch in the same dtype plus 16 eps. Half
    types are computed in float32 and rounded once, which costs at most eps / 2 and typically 0.2 eps: eps / 2.
    """
    eps = torch.finfo(dtype).eps
    factor = 3 if gradient else 2
    if compute_dtype(dtype) == dtype:
        return factor * reference_error + 16 * eps
    return eps / 2


class SelftestRow(NamedTuple):
    """The worst tensor of one case: its relative error against float64 and the budget that it must keep."""

    backend: str
    device: str
    dtype: str
    case: str
    tensor: str
    error: float
    budget: float


_CASES: dict[str, dict[str, Any]] = {
    "full gradient": {},
    "detach, bias": {"detach": True, "bias": True},
    "leaky, prior, 5 iterations": {"leaky": True, "prior": True, "num_iterations": 5},
}


def selftest() -> list[SelftestRow]:
    """Compare every backend that can run here, on every device, with float64: outputs and gradients, in seconds.

    The inputs are large enough for the coupling to be decided, as a wrong routing hides behind small ones.

    Returns:
        One :class:`SelftestRow` per backend, device, dtype and case.

    Raises:
        RuntimeError: an error is above its budget; the message lists the rows.

    Example:
        >>> all(row.error <= row.budget for row in selftest())
        True
    """
    with torch.inference_mode(False), torch.enable_grad():
        rows = _selftest_rows()
    bad = [row for row in rows if not row.error <= row.budget]
    if bad:
        raise RuntimeError("fastcaps computes wrong numbers on this machine:\n" + "\n".join(map(str, bad)))
    return rows


def _selftest_rows() -> list[SelftestRow]:
    rows = []
    for device in ["cpu"] + (["cuda"] if torch.cuda.is_available() else []):
        for backend in BACKENDS:
            if why_unavailable(backend, device) is not None:
                continue
            for dtype in (torch.float32, torch.bfloat16):
                rows += [_selftest_case(backend, device, dtype, name) for name in _CASES]
    return rows


def _selftest_case(backend: str, device: str, dtype: torch.dtype, name: str) -> SelftestRow:
    generator = torch.Generator().manual_seed(0)
    options = dict(_CASES[name])
    J, D_out = 10, 16
    shapes = {"poses": (9, 50, 8), "weight": (50, J, D_out, 8), "grad": (9, J, D_out)}
    shapes |= {key: shape for key, shape in (("prior", (50, J)), ("bias", (J, D_out))) if options.pop(key, False)}
    inputs = {key: torch.randn(shape, generator=generator).to(device, dtype) for key, shape in shapes.items()}

    def run(backend: str, dtype: torch.dtype) -> dict[str, Tensor]:
        x: dict[str, Any] = {key: value.to(dtype).requires_grad_(key != "grad") for key, value in inputs.items()}
        grad = x.pop("grad")
        out = dynamic_routing(**x, **options, backend=backend)
        return {"output": out.detach()} | dict(zip(x, torch.autograd.grad(out, list(x.values()), grad), strict=True))

    exact, reference, result = run("reference", torch.float64), run("reference", dtype), run(backend, dtype)
    rows = []
    for tensor, value in exact.items():
        budget = error_budget(dtype, relative_error(reference[tensor], value), gradient=tensor != "output")
        error = relative_error(result[tensor], value)
        rows.append(SelftestRow(backend, device, str(dtype).removeprefix("torch."), name, tensor, error, budget))
    return max(rows, key=lambda row: math.inf if math.isnan(row.error) else row.error / row.budget)


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
    require_positive(batch_size=batch_size)
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
    require_positive(B=B, I=I, J=J, D_in=D_in, D_out=D_out)
    like = {"dtype": dtype, "device": device or ("cuda" if torch.cuda.is_available() else "cpu")}
    _run_both_ways(functools.partial(dynamic_routing, **options), [(B, I, D_in), (I, J, D_out, D_in)], [], like)


def _run_both_ways(
    routing: Callable[..., Tensor], shapes: list[tuple[int, ...]], parameters: list[nn.Parameter], like: dict[str, Any]
) -> None:
    """Forward and backward on zeros of these shapes; no ``grad`` is written."""
    with torch.inference_mode(False), torch.enable_grad():
        inputs = [torch.zeros(shape, requires_grad=True, **like) for shape in shapes]
        torch.autograd.grad(routing(*inputs).sum(), [*inputs, *parameters], allow_unused=True)
