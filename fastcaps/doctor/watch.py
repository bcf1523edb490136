"""Watched runs of a model: the calls of its modules, and the softmaxes taken in them."""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from fastcaps.convert import ConvertedCapsules
from fastcaps.convert.modules import floating_tensors
from fastcaps.layers import CapsuleLayer
from fastcaps.routing import dynamic_routing

KEPT_EXPONENTIALS = 4  # among the last so many a softmax that is written by hand looks for its numerator
SUMS_TO_ONE = 1e-3  # float16 included

aten = torch.ops.aten


@dataclass(frozen=True, eq=False)  # one is itself: tensors do not compare to one truth
class Softmax:
    """A softmax that was taken: its result, and over which axis."""

    axis: int
    result: Tensor


Alteration = Callable[[int, Softmax], Tensor]  # the how-manieth softmax and itself: what its result shall be instead


class SoftmaxWatch(TorchDispatchMode):
    """Records every softmax, and may alter its result.

    It stands below Python's functions, where each way to write a softmax comes to the same: with or without ``dim``,
    as a function, a method or a module. One written by hand is known by its exponentials, divided by their sum.
    """

    def __init__(self, alter: Alteration | None = None) -> None:
        super().__init__()
        self.softmaxes: list[Softmax] = []
        self.alter = alter
        self.exponentials: deque[Tensor] = deque(maxlen=KEPT_EXPONENTIALS)

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        axis = self._softmax_axis(function.overloadpacket, args, out)
        if axis is None:
            return out
        number, softmax = len(self.softmaxes), Softmax(axis, out.detach().clone())
        self.softmaxes.append(softmax)
        self.seen(softmax)
        if self.alter is None:
            return out
        altered = self.alter(number, softmax)
        if function.overloadpacket is aten.div:  # a gradient would still go through the exponentials
            with torch.autograd._unsafe_preserve_version_counter(args[0]):
                args[0].masked_fill_(altered == 0, 0)
        return out.copy_(altered)

    def seen(self, softmax: Softmax) -> None:
        """What else happens when a softmax is taken."""

    def _softmax_axis(self, packet: Any, args: Any, out: Any) -> int | None:
        """The axis of the softmax whose result this is; None where it is none."""
        if packet is aten._softmax:
            return int(args[1]) % out.dim() if out.dim() else None
        if packet in (aten.exp, aten.exp_):
            self.exponentials.append(out)
            return _normalised_axis(out)  # of logits from which their log-sum-exp was taken
        if packet in (aten.div, aten.div_) and isinstance(args[0], Tensor) and isinstance(args[1], Tensor):
            storage = args[0].untyped_storage().data_ptr()
            if any(storage == e.untyped_storage().data_ptr() for e in self.exponentials):
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


@dataclass(eq=False)
class Call:
    """One call of one module: its arguments, its output, and the softmaxes taken in it and in its submodules."""

    path: str
    module: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Any = None
    softmaxes: list[Softmax] = field(default_factory=list)

    @property
    def input(self) -> Tensor | None:
        """The first floating-point tensor among the arguments."""
        return next(iter(floating_tensors((self.args, self.kwargs))), None)


class Watch(SoftmaxWatch):
    """Records the calls of all modules of a model, too."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.calls: list[Call] = []
        self.stack: list[Call] = []
        self.paths = {module: path for path, module in model.named_modules()}

    def seen(self, softmax: Softmax) -> None:
        """It belongs to every call that is under way."""
        for call in self.stack:
            call.softmaxes.append(softmax)

    def run(self, args: Any, kwargs: Any) -> Any:
        """Call the model under watch; after an error the calls that it ended are still on the stack."""

        def before(module: nn.Module, args: Any, kwargs: Any) -> None:
            path = self.paths.get(module, "")
            call = Call(path, module, args, kwargs)
            self.calls.append(call)
            self.stack.append(call)

        def after(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            self.stack.pop().output = output

        hooks = [m.register_forward_pre_hook(before, with_kwargs=True) for m in self.paths]
        hooks += [m.register_forward_hook(after, with_kwargs=True) for m in self.paths]
        try:
            with self:
                return self.model(*args, **kwargs)
        finally:
            for hook in hooks:
                hook.remove()


@dataclass(frozen=True, eq=False)
class Run:
    """A call of a model, and what was seen in it.

    Attributes:
        model: the model.
        args: the positional arguments.
        kwargs: the keyword arguments.
        output: what it returned.
        calls: the calls of its modules, itself included, in the order in which they began.
    """

    model: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Any
    calls: list[Call]

    @classmethod
    def of(cls, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], seed: int = 0) -> "Run":
        """Call a model under watch; with the same seed it draws the same random numbers."""
        watch = Watch(model)
        torch.manual_seed(seed)
        output = watch.run(args, kwargs)
        return cls(model, args, kwargs, output, watch.calls)

    @property
    def B(self) -> int:
        """The number of samples."""
        return batch_size((self.args, self.kwargs))

    def around(self, call: Call) -> list[Call]:
        """The calls in which a call was made, the innermost first."""
        before = self.calls[: self.calls.index(call)]
        nearest: dict[str, Call] = {other.path: other for other in before if is_inside(call.path, other.path)}
        return sorted(nearest.values(), key=lambda other: -len(other.path))


def is_torch(module: nn.Module) -> bool:
    """Whether a module is one of PyTorch's own."""
    return type(module).__module__.startswith("torch.")


def is_inside(path: str, outer: str) -> bool:
    """Whether a module is a submodule of another one, by their paths."""
    return path != outer and path.startswith(f"{outer}." if outer else "")


def batch_size(value: Any) -> int:
    """The length of the first floating-point tensor that has an axis; 0 where there is none."""
    return next((len(t) for t in floating_tensors(value) if t.dim()), 0)


def batch_axis(t: Tensor, B: int) -> int | None:
    """The axis of the samples: the only one of that size, or else the first if it has that size."""
    if t.shape.count(B) == 1:
        return t.shape.index(B)
    return 0 if t.shape[:1] == (B,) else None


def routed_by_fastcaps(call: Call) -> bool:
    """Whether the op does it: there is nothing to look for in there."""
    module = call.module
    if isinstance(module, ConvertedCapsules):
        return module._fastcaps_plan.routing is dynamic_routing
    return isinstance(module, CapsuleLayer) and module.routing is dynamic_routing
