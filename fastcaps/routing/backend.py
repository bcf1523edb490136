"""Which implementation runs, and why another one cannot."""

import importlib
import os
import warnings

import torch

BACKENDS = ("triton", "native", "reference")  # fastest first

# Read once: a look at the environment in every call would cost a small layer more than its arithmetic.
ENVIRONMENT = os.environ.get("FASTCAPS_BACKEND") or None

_REBUILD = "pip install --no-build-isolation --force-reinstall --no-deps . (in a checkout of fastcaps)"


def _load_extension() -> tuple[str | None, str]:
    """Load the compiled ops: (how they were built, "") or (None, the reason and the cure)."""
    try:
        return importlib.import_module("fastcaps._C").__doc__, ""
    except ModuleNotFoundError:
        return None, (
            "the compiled extension is missing: fastcaps was installed without a C++ compiler or Python's headers, or "
            "where torch was not visible to the build. Install a C++20 compiler (Debian: apt-get install g++ "
            f"python3-dev; macOS: xcode-select --install), then: {_REBUILD}"
        )
    except ImportError as error:
        return None, f"the compiled extension does not load ({error}). Build it again for this machine: {_REBUILD}"


EXTENSION_BUILD, _EXTENSION_ERROR = _load_extension()
_warned = False


def why_unavailable(backend: str, device: torch.device | str) -> str | None:
    """Why a backend cannot run on a device and what would help, or None where it can.

    Args:
        backend: ``"triton"``, ``"native"`` or ``"reference"``.
        device: the device that the tensors are on.

    Returns:
        None, or a sentence for the user.

    Raises:
        ValueError: no backend has that name.

    Example:
        >>> why_unavailable("reference", "cpu") is None
        True
    """
    kind = torch.device(device).type
    if backend == "reference":
        return None
    if backend == "triton":
        return "fastcaps 0.1 has no Triton kernels yet; on CUDA tensors use backend='reference'"
    if backend == "native":
        if EXTENSION_BUILD is None:
            return _EXTENSION_ERROR
        if kind != "cpu":
            return f"fastcaps 0.1 has native kernels for CPU tensors only, not for '{kind}'; use backend='reference'"
        return None
    raise ValueError(f"backend must be one of {', '.join(map(repr, BACKENDS))} or None, got {backend!r}")


def choose_backend(backend: str | None, device: torch.device) -> str:
    """The backend that will run: the named one, or the fastest that can.

    Args:
        backend: a name, or None for the environment variable ``FASTCAPS_BACKEND`` (read at import) and, without it,
            the fastest backend that can run on ``device``.
        device: the device that the tensors are on.

    Returns:
        ``"triton"``, ``"native"`` or ``"reference"``.

    Raises:
        ValueError: no backend has that name, or the named one cannot run here. A named backend never falls back.

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
        reason = why_unavailable(named, device)
        if reason is not None:
            raise ValueError(f"{source} {named!r} cannot run on '{device}': {reason}")
        return named
    for name in BACKENDS:
        if why_unavailable(name, device) is None:
            break
    if name == "reference" and EXTENSION_BUILD is None and not _warned and not torch.compiler.is_compiling():
        _warned = True
        warnings.warn(f"fastcaps runs on its slow reference backend: {_EXTENSION_ERROR}", stacklevel=4)
    return name
