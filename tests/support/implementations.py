"""The backends and devices that a process tests, and which tests run in the emulation and in the interpreter."""

import importlib.metadata
import inspect

import pytest
import torch
from support import emulated_cuda

from fastcaps.routing.backend import BACKENDS, INTERPRET, why_unavailable
from fastcaps.routing.dynamic import ops

# One process runs one set of kernels: the compiled ones, those for CUDA in their emulation, or Triton's interpreted.
MODE = "emulated" if emulated_cuda.WANTED else "interpreted" if INTERPRET else None
OF_MODE = {"emulated": ("native", "cpu"), "interpreted": ("triton", "cpu")}

if MODE == "emulated":  # the native kernels are those for CUDA, on CPU tensors
    ops.op = lambda backend, direction: getattr(emulated_cuda, direction)


def why_not_tested(backend: str, device: str) -> str | None:
    """Why a backend is not tested on a device here, or None where it is."""
    if MODE is not None and (backend, device) != OF_MODE[MODE]:
        return f"only the {MODE} kernels are tested"
    if MODE == "interpreted" and _version("triton") < (3, 7) and _version("numpy") >= (2, 4):
        return "the interpreter of Triton 3.6 does not work with numpy 2.4 or later"
    if device == "cuda" and not torch.cuda.is_available():
        return "no CUDA device"
    return why_unavailable(backend, device)


def _version(package: str) -> tuple[int, ...]:
    return tuple(int(n) for n in importlib.metadata.version(package).split(".")[:2])


IMPLEMENTATIONS = [(backend, device) for device in ("cpu", "cuda") for backend in BACKENDS]


def runs_in(mode: str, item: pytest.Item) -> bool:
    """Whether a test is marked for a mode, and is none of the cases that this is too slow for."""
    marker = item.get_closest_marker(f"runs_{mode}")
    parameters = dict(item.callspec.params) if isinstance(item, pytest.Function) and hasattr(item, "callspec") else {}
    if marker is None or "implementation" not in parameters:
        return False
    too_slow = marker.kwargs.get("unless")
    return too_slow is None or not too_slow(
        **{name: parameters[name] for name in inspect.signature(too_slow).parameters}
    )
