"""Checks of arguments: numbers, sizes, dtypes, labels. Errors name the argument, what was wanted and what came."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def check_number(name: str, value: Any) -> None:
    """Raise unless ``value`` is a finite number that is not negative."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a float, got {value!r}")
    if not 0 <= value < math.inf:
        raise ValueError(f"{name} must be finite and not negative, got {value}")
    if isinstance(value, int) and value >= 2**63:  # which torch cannot take
        raise ValueError(f"{name} must be below 2^63 as an int, got {value}")


def check_int(name: str, value: Any, least: int) -> None:
    """Raise unless ``value`` is an int of at least ``least``."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int, got {value!r}")
    if not least <= value < 2**63:
        wanted = f"at least {least}" if value < least else "below 2^63"
        raise ValueError(f"{name} must be {wanted}, got {value}")


def check_positive(**sizes: Any) -> None:
    """Raise where a size is not an int of at least 1."""
    for name, size in sizes.items():
        check_int(name, size, 1)


def check_choice(name: str, value: Any, choices: Sequence[str]) -> None:
    """Raise unless ``value`` is one of ``choices``."""
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")


def check_floating(name: str, value: Any, shape: str = "") -> None:
    """Raise unless ``value`` is a floating-point tensor; the message has ``shape``, which is not checked."""
    if not isinstance(value, Tensor) or not value.is_floating_point():
        got = value.dtype if isinstance(value, Tensor) else type(value).__name__
        wanted = f"a floating-point tensor {shape}".rstrip()
        raise TypeError(f"{name} must be {wanted}, got {got}")


def check_like(name: str, value: Any, shape: str, parameter: Tensor) -> None:
    """Raise unless ``value`` is a tensor of the dtype of ``parameter``, or any floating-point one under autocast."""
    check_floating(name, value, shape)
    amp = not value.is_meta and torch.is_autocast_enabled(value.device.type)
    if value.dtype != parameter.dtype and not amp:
        raise TypeError(f"{name} must have the dtype of the parameters, {parameter.dtype}, got {value.dtype}")


def check_pair(name: str, value: Any, least: int) -> tuple[int, int]:
    """``(height, width)`` from such a pair or from one int for both; raise unless both are at least ``least``."""
    pair = value if isinstance(value, (tuple, list)) else (value, value)
    if len(pair) != 2 or any(isinstance(size, bool) or not isinstance(size, int) for size in pair):
        raise TypeError(f"{name} must be an int or a pair of ints (height, width), got {value!r}")
    if min(pair) < least:
        raise ValueError(f"{name} must be at least {least}, got {value}")
    for size in pair:
        check_int(name, size, least)
    return pair[0], pair[1]


def axes_hint(name: str, given: Sequence[int], wanted: Sequence[int | None]) -> str:
    """What to add to a message that a tensor of shape ``given`` is not ``[B, *wanted]``, where an axis is the reason.

    Args:
        name: of the tensor.
        given: its shape.
        wanted: ``(C, H, W)``; None fits any size.
    """

    def fits(shape: Sequence[int]) -> bool:
        return all(expected in (size, None) for size, expected in zip(shape, wanted, strict=True))

    if len(given) == 4 and fits((given[3], given[1], given[2])):
        return f"; are the channels last? {name}.movedim(3, 1) puts them first"
    if len(given) == 3:
        for axis in (2, 1, 0):
            if fits((*given[:axis], 1, *given[axis:])[1:]):
                return f"; {name}.unsqueeze({axis}) adds the missing axis"
    return ""


def check_labels(labels: Tensor, B: int, J: int, *, several: bool = False) -> None:
    """Raise unless ``labels`` are B class indices below J or, with ``several``, a bool ``[B, J]``.

    Values cannot be read, and are not checked, inside torch.compile, torch.func, a CUDA graph, or on the meta device.
    """
    also = ", or bool [B, J] for several classes in an image" if several else ", one class for each image"
    if not isinstance(labels, Tensor) or labels.dtype not in _LABEL_DTYPES[several]:
        got = labels.dtype if isinstance(labels, Tensor) else type(labels).__name__
        raise TypeError(f"labels must be an int64, int32 or uint8 tensor [B]{also}, got {got}")
    if labels.dtype == torch.bool:
        if labels.shape != (B, J):
            raise ValueError(f"bool labels must be [B, J] = [{B}, {J}], got {tuple(labels.shape)}")
        return
    if labels.shape != (B,):
        raise ValueError(f"labels must be [B] = [{B}]{also}, got {tuple(labels.shape)}")
    unread = labels.is_meta or torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()
    if unread or (labels.is_cuda and torch.cuda.is_current_stream_capturing()):
        return
    if B and not bool(((labels >= 0) & (labels < J)).all()):
        raise ValueError(f"labels must lie in 0 .. {J - 1}, got {labels.min().item()} .. {labels.max().item()}")


_INDICES = (torch.int64, torch.int32, torch.uint8)
_LABEL_DTYPES = {False: _INDICES, True: (*_INDICES, torch.bool)}  # by check_labels' ``several``
