"""The error budget that counts as exact, and selftest(), which checks every backend on this machine against it."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastcaps._deprecated import FormerTuple
from fastcaps.functional import compute_dtype
from fastcaps.routing import dynamic_routing
from fastcaps.routing.backend import BACKENDS, why_unavailable

PIECE = 1 << 16  # entries, about, that are compared at a time


def relative_error(value: Tensor, exact: Tensor) -> float:
    """``|value - exact| / |exact|`` in L2 over all entries and in float64; where ``exact`` is 0, 0 or infinity."""
    pairs = zip(_pieces(value), _pieces(exact), strict=True)
    norms = [torch.stack([(a.double() - b.double()).norm(), b.double().norm()]) for a, b in pairs]
    difference, size = (math.hypot(*column) for column in torch.stack(norms).T.tolist())
    return difference / size if size > 0 else 0.0 if difference == 0 else math.inf


def _pieces(t: Tensor) -> tuple[Tensor, ...]:
    """A tensor in views along its longest axis: in float64 a weight as a whole would take its memory several times."""
    t = torch.atleast_1d(t)
    longest = max(t.shape)
    return t.split(max(1, PIECE * longest // max(1, t.numel())), t.shape.index(longest))


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


@dataclass(frozen=True)
class SelftestRow(FormerTuple):
    """The worst tensor of one case of :func:`selftest`.

    Attributes:
        backend: ``"native"``, ``"triton"`` or ``"reference"``.
        device: ``"cpu"`` or ``"cuda"``.
        dtype: of the inputs, without ``torch.``.
        case: the options.
        tensor: ``"output"``, or the input whose gradient it is.
        error: relative L2 error against float64.
        budget: the largest error allowed, see :func:`error_budget`.
    """

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
