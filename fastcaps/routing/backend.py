"""Choice of the backend, and why another one cannot run."""

import functools
import importlib
import importlib.machinery
import os
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch

F = TypeVar("F", bound=Callable[..., object])

BACKENDS = ("native", "triton", "reference")  # fastest first, as measured (benchmarks/NOTES.md)

# Read once: a look at the environment in every call would cost a small layer more than its arithmetic.
ENVIRONMENT = os.environ.get("FASTCAPS_BACKEND") or None
INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"

TRITON = (3, 6)  # the oldest version that the kernels compile with
TRITON_D = 512  # entries of a vote, in registers
CUDA_D = 4096  # in shared memory

_REBUILD = "pip install --no-build-isolation --force-reinstall --no-deps . (in a checkout of fastcaps)"


class BackendUnavailable(RuntimeError, ValueError):
    """The named backend cannot run here, or not on such tensors; the message says why, and what would help.

    Example:
        >>> try:
        ...     choose_backend("native", torch.device("meta"))
        ... except BackendUnavailable as error:
        ...     print(error)
        backend 'native' cannot run on 'meta': the native kernels are for CPU and CUDA tensors, not for 'meta'; use
        backend='reference'
    """


def constant_when_traced(function: F) -> F:
    """``torch.compiler.assume_constant_result``, which would import Dynamo, and with it as much again as all of torch.

    Dynamo calls a function of this mark while it traces, and takes the result for a constant.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


_SOURCES = Path(__file__).resolve().parents[2]  # what lies beside the package


def _shadowed_installation() -> Path | None:
    """The folder of a compiled fastcaps that is not imported, as these sources come first on Python's path."""
    if not ((_SOURCES / "csrc").is_dir() and (_SOURCES / "setup.py").is_file()):
        return None
    for folder in map(Path, sys.path):
        compiled = any((folder / f"fastcaps/_C{suffix}").is_file() for suffix in importlib.machinery.EXTENSION_SUFFIXES)
        if compiled and folder.resolve() != _SOURCES:
            return folder
    return None


def _load_extension() -> tuple[str | None, str]:
    """Load the compiled ops: (how they were built, "") or (None, the reason and the cure)."""
    try:
        return importlib.import_module("fastcaps._C").__doc__, ""
    except ModuleNotFoundError:
        if (installed := _shadowed_installation()) is not None:
            return None, (
                f"Python found the uncompiled sources in {_SOURCES} before the installed package in {installed}. Run "
                f"from another folder, or compile the sources: pip install --no-build-isolation --editable {_SOURCES}"
            )
        return None, (
            "the compiled extension is missing: fastcaps was installed without a C++ compiler or Python's headers, or "
            "where torch was not visible to the build. Install a C++20 compiler (Debian: apt-get install g++ "
            f"python3-dev; macOS: xcode-select --install), then: {_REBUILD}"
        )
    except ImportError as error:
        return None, f"the compiled extension does not load ({error}). Build it again for this machine: {_REBUILD}"


EXTENSION_BUILD, _EXTENSION_ERROR = _load_extension()
_warned = False


@constant_when_traced
def _why_no_native_cuda(device: torch.device) -> str | None:
    return _look_for_native_cuda(device)


@functools.cache
def _look_for_native_cuda(device: torch.device) -> str | None:
    if "CUDA" not in (EXTENSION_BUILD or ""):
        return (
            "the compiled extension was built without CUDA kernels. With a CUDA toolkit (nvcc) in place: "
            f"FASTCAPS_CUDA=1 {_REBUILD}"
        )
    if not torch.cuda.is_available():
        return "PyTorch sees no CUDA device"
    index = torch.cuda.current_device() if device.index is None else device.index
    reason = importlib.import_module("fastcaps._C").why_no_cuda(index)
    return reason and f"{reason}; use backend='triton' or backend='reference'"


@constant_when_traced
def _why_no_triton(device: torch.device) -> str | None:
    return _look_for_triton(device)


@functools.cache
def _look_for_triton(device: torch.device) -> str | None:
    """Triton is imported here first, when a CUDA tensor is routed."""
    if torch.version.hip is not None:
        return "the Triton kernels are for NVIDIA GPUs; use backend='reference'"
    cure = f"pip install 'triton>={TRITON[0]}.{TRITON[1]}', or use backend='reference'"
    try:
        import triton
    except ImportError as error:
        return f"Triton cannot be imported ({error}): {cure}"
    if tuple(int(n) for n in triton.__version__.split(".")[:2]) < TRITON:
        return f"Triton {triton.__version__} is too old: {cure}"
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 0):
        name = torch.cuda.get_device_name(device)
        return f"the Triton kernels need compute capability 8.0 (Ampere), {name} has less; use backend='reference'"
    return None


def why_unavailable(
    backend: str, device: torch.device | str, dtype: torch.dtype | None = None, D: int = 1
) -> str | None:
    """Why a backend cannot run on a device and what would help, or None where it can.

    Args:
        backend: ``"triton"``, ``"native"`` or ``"reference"``.
        device: the device that the tensors are on.
        dtype: that of the poses or votes; None: any that the backend has.
        D: entries of what is summed over the input capsules: D_out, or D_in where they share one matrix.

    Returns:
        None, or a sentence for the user.

    Raises:
        ValueError: no backend has that name.

    Example:
        >>> why_unavailable("reference", "cpu") is None
        True
    """
    device = torch.device(device)
    if backend == "reference":
        return None
    if backend == "triton":
        if device.type != "cuda" and not (device.type == "cpu" and INTERPRET):
            return (
                f"the Triton kernels are for CUDA tensors, not for '{device.type}' (with TRITON_INTERPRET=1 in the "
                "environment they are interpreted on the CPU, very slowly); use backend='reference' or None"
            )
        if dtype == torch.float64:
            return "the Triton kernels compute in float32; for float64 use backend='native' or backend='reference'"
        if D > TRITON_D:
            limit = f"the Triton kernels take vectors of up to {TRITON_D} entries, got {D}"
            return f"{limit}; use backend='native' or backend='reference'"
        return _why_no_triton(device)
    if backend == "native":
        if EXTENSION_BUILD is None:
            return _EXTENSION_ERROR
        if device.type == "cuda":
            if D > CUDA_D:
                return f"the CUDA kernels take vectors of up to {CUDA_D} entries, got {D}; use backend='reference'"
            return _why_no_native_cuda(device)
        if device.type != "cpu":
            return f"the native kernels are for CPU and CUDA tensors, not for '{device.type}'; use backend='reference'"
        return None
    raise ValueError(f"backend must be one of {', '.join(map(repr, BACKENDS))} or None, got {backend!r}")


def choose_backend(backend: str | None, device: torch.device, dtype: torch.dtype | None = None, D: int = 1) -> str:
    """The backend that will run: the named one, or the fastest that can.

    Args:
        backend: a name, or None for the environment variable ``FASTCAPS_BACKEND`` (read at import) and, without it,
            the fastest backend that can run on ``device``.
        device: the device that the tensors are on.
        dtype: as in :func:`why_unavailable`.
        D: as in :func:`why_unavailable`.

    Returns:
        ``"triton"``, ``"native"`` or ``"reference"``.

    Raises:
        ValueError: no backend has that name.
        BackendUnavailable: the named backend cannot run here: it never falls back.

    Example:
        >>> choose_backend("reference", torch.device("cpu"))
        'reference'
    """
    global _warned
    source = "backend" if backend is not None else "FASTCAPS_BACKEND"
    named = backend if backend is not None else ENVIRONMENT
    if named is not None:
        if named not in BACKENDS:
            raise ValueError(f"{source} must be one of {', '.join(map(repr, BACKENDS))}, got {named!r}")
        reason = why_unavailable(named, device, dtype, D)
        if reason is not None:
            raise BackendUnavailable(f"{source} {named!r} cannot run on '{device}': {reason}")
        return named
    # Nobody wants the interpreter without having asked for it, and an exported program finds no Triton where it runs.
    skipped = "triton" if device.type == "cpu" or torch.compiler.is_exporting() else None
    for name in BACKENDS:
        if name != skipped and why_unavailable(name, device, dtype, D) is None:
            break
    if name == "reference" and not _warned and not torch.compiler.is_compiling():
        reason = _EXTENSION_ERROR if device.type != "cuda" else _why_no_native_cuda(device) or _why_no_triton(device)
        if reason:
            _warned = True
            warnings.warn(f"fastcaps runs on its slow reference backend: {reason}", stacklevel=4)
    return name
