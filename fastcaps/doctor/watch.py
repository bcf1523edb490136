"""Watched runs of a model: the calls of its modules, the softmaxes taken in them, and which of them route."""

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from fastcaps.convert import ConvertedCapsules
from fastcaps.convert.modules import floating_tensors
from fastcaps.layers import CapsuleLayer
from fastcaps.routing import dynamic_routing


@dataclass(eq=False)  # a call is itself: tensors do not compare to one truth
class Call:
    """One call of one module: its arguments, its output, and the softmaxes taken in it (not in its submodules)."""

    path: str
    module: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Any = None
    softmaxes: list[tuple[int, Tensor]] = field(default_factory=list)  # the axis, and the result

    @property
    def input(self) -> Tensor | None:
        """The first floating-point tensor among the arguments."""
        return next(iter(floating_tensors((self.args, self.kwargs))), None)


class _Watch(TorchFunctionMode):
    """Records the calls of all modules, and in which the softmaxes were taken."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.calls: list[Call] = []
        self.stack: list[Call] = []
        self.paths = {module: path for path, module in model.named_modules()}

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        if getattr(function, "__name__", "") in ("softmax", "log_softmax") and isinstance(out, Tensor) and self.stack:
            dim = (kwargs or {}).get("dim", args[1] if len(args) > 1 else None)
            holder = next((call for call in reversed(self.stack) if not is_torch(call.module)), self.stack[0])
            if isinstance(dim, int):
                result = out.exp() if function.__name__ == "log_softmax" else out
                holder.softmaxes.append((dim % out.dim(), result.detach()))
        return out

    def run(self, args: Any, kwargs: Any) -> Any:
        """Call the model (the first module) under watch."""

        def before(module: nn.Module, args: Any, kwargs: Any) -> None:
            call = Call(self.paths[module], module, args, kwargs)
            self.calls.append(call)
            self.stack.append(call)

        def after(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            self.stack.pop().output = output

        hooks = [m.register_forward_pre_hook(before, with_kwargs=True) for m in self.paths]
        hooks += [m.register_forward_hook(after, with_kwargs=True) for m in self.paths]
        try:
            with self:
                return next(iter(self.paths))(*args, **kwargs)
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
    def of(cls, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> "Run":
        """Call a model under watch."""
        watch = _Watch(model)
        output = watch.run(args, kwargs)
        return cls(model, args, kwargs, output, watch.calls)

    @property
    def B(self) -> int:
        """The number of samples."""
        return batch_size((self.args, self.kwargs))


def is_torch(module: nn.Module) -> bool:
    """Whether a module is one of PyTorch's own."""
    return type(module).__module__.startswith("torch.")


def is_inside(path: str, outer: str) -> bool:
    """Whether a module is a submodule of another one, by their paths."""
    return path != outer and path.startswith(f"{outer}." if outer else "")


def batch_size(value: Any) -> int:
    """The length of the first floating-point tensor that has an axis; 0 where there is none."""
    return next((len(t) for t in floating_tensors(value) if t.dim()), 0)


@dataclass(frozen=True)
class Routing:
    """A module that routes, and what its shapes say.

    Attributes:
        call: one call of it.
        softmax_size: how many capsules its coupling sums to 1 over.
        inputs: I, or None where shapes do not tell.
        outputs: J, or None.
    """

    call: Call
    softmax_size: int
    inputs: int | None
    outputs: int | None

    @property
    def couplings(self) -> list[Tensor]:
        """The coupling of each iteration."""
        return [c for axis, c in self.call.softmaxes if c.shape[axis] == self.softmax_size]


def find_routings(calls: list[Call], B: int) -> list[Routing]:
    """The modules that take a softmax over capsules: from shapes alone."""
    found = []
    for call in calls:
        x, y = call.input, next(iter(floating_tensors(call.output)), None)
        if x is None or y is None:
            continue
        for axis, c in call.softmaxes:
            n = c.shape[axis]
            before, after = _sizes(x, B), _sizes(y, B)
            capsules = [size for size in before if size != n and size > 1 and c.numel() % (size * n) == 0]
            if not (capsules or before.count(n) > 1) and not (n in before and after):
                continue
            if c.numel() < n * 2 or c.numel() == B * n:  # class scores: no axis of input capsules
                continue
            found.append(_routing(call, n, before, after, c, B))
            break
    return found


def _sizes(tensor: Tensor, B: int) -> list[int]:
    sizes = list(tensor.shape)
    if B in sizes:
        sizes.remove(B)
    return sizes


def _routing(call: Call, n: int, before: list[int], after: list[int], c: Tensor, B: int) -> Routing:
    """Which of the sizes is I and which is J: votes ``[B, I, J, D]`` to ``[B, J, D]``, or poses to poses."""
    other = c.numel() // n // (B if B in c.shape else 1)  # of the coupling's two axes of capsules
    votes = len(before) > 2 and other not in after  # else an axis of n may be that of the input capsules, too
    if n in after and (n not in before or votes):  # an axis of the output: the output capsules
        others = {c.numel() // n, c.numel() // n // B}
        inputs = next((size for size in before if size in others and size != n), None)
        return Routing(call, n, inputs, n)
    if n in before and n not in after:
        outputs = next((size for size in after if size > 1), None)  # J stands before D_out everywhere
        return Routing(call, n, n, outputs)
    return Routing(call, n, None, None)


def layer_of(routing: Call, calls: list[Call]) -> Call:
    """The call that takes poses, where a module of its own routes the votes."""
    around = [call for call in calls if is_inside(routing.path, call.path)]
    holders = [call for call in [*around, routing] if call.input is not None and call.input.dim() == 3]
    return holders[-1] if holders else routing


def input_capsules(call: Call) -> int | None:
    """I of a layer that fastcaps routes."""
    if isinstance(call.module, ConvertedCapsules):
        return call.module._fastcaps_plan.sizes(call.module).get("I")
    return call.module.in_capsules if isinstance(call.module, CapsuleLayer) else None


def capsules_axis(call: Call, I: int | None) -> int | None:
    """Which axis of a layer's input, of 3 axes, holds the capsules; None where shapes do not tell."""
    x = call.input
    if x is None or x.dim() != 3:
        return None
    if isinstance(call.module, CapsuleLayer):
        return 1
    if isinstance(call.module, ConvertedCapsules):
        axes = call.module._fastcaps_plan.axes.get("input")  # a function has none
        return None if axes is None else axes.names.index("I")
    found = [axis for axis in (1, 2) if x.shape[axis] == I]
    return found[0] if len(found) == 1 else None


def routed_by_fastcaps(call: Call) -> bool:
    """Whether the op does it: there is nothing to look for in there."""
    module = call.module
    if isinstance(module, ConvertedCapsules):
        return module._fastcaps_plan.routing is dynamic_routing
    return isinstance(module, CapsuleLayer) and module.routing is dynamic_routing
