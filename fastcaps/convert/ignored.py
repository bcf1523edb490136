"""Other values of an argument that a recipe ignores: with them it shows whether the layer ignores it."""

from typing import Any

import torch
from torch import Tensor


def other_values(value: Any) -> list[Any]:
    """Values of the same kind, however nested; none where no other is known: of a string, a device or an object.

    Example:
        >>> other_values((2, True))
        [(3, False), (1, False), (7, False)]
    """
    leaves, structure = torch.utils._pytree.tree_flatten(value)
    options = [_others(leaf) for leaf in leaves]
    return [
        torch.utils._pytree.tree_unflatten(
            [others[min(n, len(others) - 1)] if others else leaf for leaf, others in zip(leaves, options, strict=True)],
            structure,
        )
        for n in range(max(map(len, options), default=0))
    ]


def _others(value: Any) -> list[Any]:
    if isinstance(value, bool):
        return [not value]
    if isinstance(value, (int, float)):
        return [value + 1, value - 1, 2 * value + 3]
    return [_other_entries(value)] if isinstance(value, Tensor) else []


def _other_entries(t: Tensor) -> Tensor:
    """Random numbers; of indices 0 and 1, which are in range most often."""
    if t.is_floating_point():
        return torch.randn(t.shape, generator=torch.Generator().manual_seed(0)).to(t)
    return ~t if t.dtype == torch.bool else (t == 0).to(t.dtype)
