"""The softmaxes that are taken while a model runs, however they are written."""

from collections import deque
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

KEPT_EXPONENTIALS = 4  # among the last so many a softmax that is written by hand looks for its numerator
SUMS_TO_ONE = 1e-3  # float16 included

aten = torch.ops.aten


class SoftmaxWatch(TorchDispatchMode):
    """Sees every softmax.

    It stands below Python's functions, where each way to write a softmax comes to the same: with or without ``dim``,
    as a function, a method or a module. One written by hand is known by its exponentials, divided by their sum.
    """

    def __init__(self) -> None:
        super().__init__()
        self._exponentials: deque[Tensor] = deque(maxlen=KEPT_EXPONENTIALS)

    def __exit__(self, *raised: Any) -> None:
        self._exponentials.clear()
        super().__exit__(*raised)

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        packet = function.overloadpacket
        axis = self._softmax_axis(packet, args, out)
        if axis is not None:
            self.seen(axis, out, args[0] if packet is aten.div else None)
        return out

    def seen(self, axis: int, result: Tensor, numerator: Tensor | None) -> None:
        """What happens when a softmax is taken.

        Args:
            axis: over which.
            result: what it gave; it may be changed in place.
            numerator: its exponentials, where it was written by hand and not in place.
        """
        raise NotImplementedError

    def _softmax_axis(self, packet: Any, args: Any, out: Any) -> int | None:
        """The axis of the softmax whose result this is; None where it is none."""
        if packet is aten._softmax:
            return int(args[1]) % out.dim() if out.dim() else None
        if packet in (aten.exp, aten.exp_):
            self._exponentials.append(out)
            return _normalised_axis(out)  # of logits from which their log-sum-exp was taken
        if packet in (aten.div, aten.div_) and isinstance(args[0], Tensor) and isinstance(args[1], Tensor):
            storage = args[0].untyped_storage().data_ptr()
            if any(storage == e.untyped_storage().data_ptr() for e in self._exponentials):
                return _normalised_axis(out, args[1])
        return None


def _normalised_axis(t: Tensor, sums: Tensor | None = None) -> int | None:
    """The one axis over which a tensor sums to 1; of several, the one that its sums lack. None: there is none."""
    axes = [
        axis
        for axis in range(t.dim())
        if t.shape[axis] > 1 and t.numel() and bool(((t.sum(axis) - 1).abs() < SUMS_TO_ONE).all())
    ]
    if sums is not None and len(axes) > 1:
        shape = (1,) * (t.dim() - sums.dim()) + tuple(sums.shape)
        axes = [axis for axis in axes if shape[axis] == 1]
    return axes[0] if len(axes) == 1 else None
