"""Watched runs of a model: the calls of its modules, and the softmaxes taken in them."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from fastcaps.convert import ConvertedCapsules
from fastcaps.convert.modules import floating_tensors, seed_generators
from fastcaps.convert.softmaxes import SoftmaxWatch
from fastcaps.layers import CapsuleLayer
from fastcaps.routing import dynamic_routing


@dataclass(frozen=True, eq=False)  # one is itself: tensors do not compare to one truth
class Softmax:
    """A softmax that was taken: its result, and over which axis."""

    axis: int
    result: Tensor


Alteration = Callable[[int, Softmax], Tensor]  # the how-manieth softmax and itself: what its result shall be instead


class RecordedSoftmaxes(SoftmaxWatch):
    """Records every softmax, and may alter its result."""

    def __init__(self, alter: Alteration | None = None) -> None:
        super().__init__()
        self.softmaxes: list[Softmax] = []
        self.alter = alter

    def seen(self, axis: int, result: Tensor, numerator: Tensor | None) -> None:
        """Record it, as it was before it is altered."""
        number, softmax = len(self.softmaxes), Softmax(axis, result.detach().clone())
        self.softmaxes.append(softmax)
        if self.alter is None:
            return
        altered = self.alter(number, softmax)
        if numerator is not None:  # a gradient would still go through the exponentials
            with torch.autograd._unsafe_preserve_version_counter(numerator):
                numerator.masked_fill_(altered == 0, 0)
        result.copy_(altered)


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


class Watch(RecordedSoftmaxes):
    """Records the calls of all modules of a model, too."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.calls: list[Call] = []
        self.stack: list[Call] = []
        self.paths = {module: path for path, module in model.named_modules()}

    def seen(self, axis: int, result: Tensor, numerator: Tensor | None) -> None:
        """It belongs to every call that is under way."""
        super().seen(axis, result, numerator)
        for call in self.stack:
            call.softmaxes.append(self.softmaxes[-1])

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
        seed_generators(seed)
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
