"""What is known to go wrong in capsule networks, looked for in one's own: evidence computed on the spot, and the fix.

Nothing here reads source code. A model is run, its modules are watched, and each suspicion is tried: does one sample's
output change with its batch mates, over which capsules do the coefficients sum to 1, from how many places of the
feature map is a capsule made, what happens to a zero capsule.
"""

import copy
import importlib.util
import inspect
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from fastcaps.losses import margin_loss
from fastcaps.verification import detached_copy

BATCH = (5, 7, 3, 11)  # samples: the first number that is no other size, so that the batch axis can be told
CHANGES = 1e-4  # relative: what rounding cannot explain in float32
SATURATED = 0.98  # length of all output capsules
STEPS, TRAINS = 40, 0.02  # Adam steps of the training probe, and by what share they must lower the loss
WRONG, SUSPICIOUS, FINE, UNKNOWN = "wrong", "suspicious", "fine", "not checked"


@dataclass(frozen=True)
class Finding:
    """One check of one place.

    Attributes:
        check: what was looked at.
        where: the path of the module; empty for the model itself.
        verdict: ``"wrong"``, ``"suspicious"``, ``"fine"`` or ``"not checked"``.
        evidence: what was computed.
        fix: what to do, or an empty string.
    """

    check: str
    where: str
    verdict: str
    evidence: str
    fix: str = ""

    def __str__(self) -> str:
        lines = [f"{self.verdict.upper():<11} {self.check}, {self.where or 'the model'}: {self.evidence}"]
        return "\n".join([*lines, *([f"{'':<11} fix: {self.fix}"] if self.fix else [])])


# ----------------------------------------------------------------------------------------------- watching a model run


@dataclass
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
        return next(iter(_tensors((self.args, self.kwargs))), None)


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
            holder = next((call for call in reversed(self.stack) if not _is_torch(call.module)), self.stack[0])
            if isinstance(dim, int):
                result = out.exp() if function.__name__ == "log_softmax" else out
                holder.softmaxes.append((dim % out.dim(), result.detach()))
        return out

    def run(self, *args: Any, **kwargs: Any) -> Any:
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


def _is_torch(module: nn.Module) -> bool:
    return type(module).__module__.startswith("torch.")


def _tensors(value: Any) -> list[Tensor]:
    leaves = torch.utils._pytree.tree_leaves(value)
    return [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.is_floating_point()]


@dataclass(frozen=True)
class Routing:
    """A module that routes, and what its shapes say.

    Attributes:
        call: one call of it.
        axis: the size of the axis that its coupling sums to 1 over.
        inputs: I, or None where shapes do not tell.
        outputs: J, or None.
    """

    call: Call
    axis: int
    inputs: int | None
    outputs: int | None


def _routings(calls: list[Call], B: int) -> list[Routing]:
    """The modules that take a softmax over capsules: from shapes alone."""
    found = []
    for call in calls:
        x, y = call.input, next(iter(_tensors(call.output)), None)
        if x is None or y is None:
            continue
        for dim, c in call.softmaxes:
            n = c.shape[dim]
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
    if n in after and (n not in before or len(before) > 2):  # an axis of the output: the output capsules
        others = {c.numel() // n, c.numel() // n // B}
        inputs = next((size for size in before if size in others and size != n), None)
        return Routing(call, n, inputs, n)
    if n in before and n not in after:
        outputs = next((size for size in after if size > 1), None)  # J stands before D_out everywhere
        return Routing(call, n, n, outputs)
    return Routing(call, n, None, None)


# --------------------------------------------------------------------------------------------------------- the checks


def examine(
    model: nn.Module,
    sample: Any,
    *,
    margin: Callable[..., Tensor] | None = None,
    reconstruction: Callable[..., Tensor] | None = None,
) -> list[Finding]:
    """Look for the known mistakes in a capsule model.

    Args:
        model: the model. It is run and copied, not changed.
        sample: what it is called with: a tensor, a tuple of positional arguments, or a dict of keyword arguments; at
            least 5 samples on the first axis of each tensor.
        margin: its classification loss, a function of lengths ``[B, J]`` and labels, indices or one-hot; or None.
        reconstruction: its reconstruction loss, a function of two batches of images; or None.

    Returns:
        A :class:`Finding` for every check, also for those that found nothing wrong.

    Raises:
        ValueError: the model cannot run on the sample, or there are too few samples.

    Example:
        >>> import fastcaps
        >>> findings = examine(fastcaps.CapsNet((1, 8, 8), 10, kernel_size=3), torch.rand(5, 1, 8, 8))
        >>> [finding.check for finding in findings if finding.verdict == "wrong"]
        []
    """
    args, kwargs = (
        (sample, {}) if isinstance(sample, tuple) else ((), sample) if isinstance(sample, Mapping) else ((sample,), {})
    )
    tensors = _tensors((args, kwargs))
    if not tensors or min(len(t) for t in tensors) < BATCH[0]:
        raise ValueError(f"the sample must hold at least {BATCH[0]} samples, got {[tuple(t.shape) for t in tensors]}")
    training = {module: module.training for module in model.modules()}
    try:
        model.eval()
        with torch.random.fork_rng(list(range(torch.cuda.device_count()))), torch.enable_grad():
            torch.manual_seed(0)
            return list(_checks(model, args, dict(kwargs), len(tensors[0]), margin, reconstruction))
    finally:
        for module, mode in training.items():
            module.training = mode


def _checks(
    model: nn.Module,
    args: Any,
    kwargs: dict[str, Any],
    B: int,
    margin: Callable[..., Tensor] | None,
    reconstruction: Callable[..., Tensor] | None,
) -> Iterator[Finding]:
    watch = _Watch(model)
    try:
        output = watch.run(*args, **kwargs)
    except Exception as error:
        raise ValueError(f"the model cannot run on the sample: {type(error).__name__}: {error}") from error
    fused = [call for call in watch.calls if _routed_by_fastcaps(call)]
    routings = _routings([call for call in watch.calls if call not in fused], B)
    for call in fused:
        yield Finding("routing", call.path, FINE, "fastcaps routes it, as in the paper and tested against float64")
    if not routings and not fused:
        yield Finding("routing", "", SUSPICIOUS, "no module takes a softmax over capsules: nothing routes here")
    yield _batch_mates(model, args, kwargs, output, watch, routings)
    for routing in routings:
        yield _softmax_axis(routing)
        yield _iterations(routing, watch.calls)
        yield _squash_axis(routing, B)
        layer = _layer_of(routing.call, watch.calls)
        squash = _input_squash(model, args, kwargs, layer, routing.inputs, B)
        yield squash
        if squash.verdict == WRONG:  # it mixes all places by itself
            yield Finding(PLACES, layer.path, UNKNOWN, "the squash of its poses mixes them all")
        else:
            yield _places(watch.calls, layer, B, routing.inputs)
    for call in fused:
        yield _places(watch.calls, call, B, None)
    yield from _zero_capsules(watch.calls)
    yield _initialisation(model, args, kwargs, output, B)
    yield from _losses(output, B, margin, reconstruction)


def _routed_by_fastcaps(call: Call) -> bool:
    from fastcaps.convert import ConvertedCapsules
    from fastcaps.layers import CapsuleLayer
    from fastcaps.routing import dynamic_routing

    module = call.module
    if isinstance(module, ConvertedCapsules):
        return module._fastcaps_plan.routing is dynamic_routing
    return isinstance(module, CapsuleLayer) and module.routing is dynamic_routing


def _layer_of(routing: Call, calls: list[Call]) -> Call:
    """The call that takes poses, where a module of its own routes the votes."""
    around = [c for c in calls if routing.path.startswith(f"{c.path}." if c.path else "") and c is not routing]
    holders = [c for c in [*around, routing] if c.input is not None and c.input.dim() == 3]
    return holders[-1] if holders else routing


def _relative(a: Tensor, b: Tensor) -> float:
    size = torch.linalg.vector_norm(a.double()).item()
    return torch.linalg.vector_norm((a - b).double()).item() / size if size else 0.0


@torch.no_grad()
def _batch_mates(
    model: nn.Module, args: Any, kwargs: Any, output: Any, watch: _Watch, routings: list[Routing]
) -> Finding:
    """Does the first sample's output change when all others become another one?"""
    second = _Watch(model)
    other_args, other_kwargs = _with_other_mates((args, kwargs))
    other = second.run(*other_args, **other_kwargs)
    check = "samples are independent"
    B = len(_tensors((args, kwargs))[0])
    worst = _first_sample_changes(output, other, B)
    if worst is None:
        return Finding(check, "", UNKNOWN, "the model returns nothing with the batch on an axis")
    fix = (
        "keep the routing logits per sample, [B, I, J]: do not average the agreement over the batch, and do not "
        "normalise over the batch in evaluation"
    )
    if worst <= CHANGES:
        for routing in routings:  # with small weights the logits hardly matter, so larger ones are tried as well
            for factor in (10.0, 100.0, 1000.0):
                alone = _layer_mates(routing.call, factor, B)
                if alone > CHANGES:
                    text = f"with weights {factor:g} times as large a sample's output changes by {100 * alone:.2g} %"
                    return Finding(check, routing.call.path, WRONG, f"{text} when its batch mates change", fix)
        return Finding(check, "", FINE, f"a sample's output changes by {worst:.0e} when its batch mates change")
    culprits = [
        a.path
        for a, b in zip(watch.calls, second.calls, strict=True)
        if not _is_torch(a.module) and (_first_sample_changes(a.output, b.output, B) or 0) > CHANGES
        and (_first_sample_changes(a.args, b.args, B) or 0) <= CHANGES
    ]  # fmt: skip
    inner = [path for path in culprits if not any(_inside(other, path) for other in culprits)]
    text = f"a sample's output changes by {100 * worst:.2g} % when its batch mates change"
    return Finding(check, inner[0] if inner else "", WRONG, text, fix)


def _inside(path: str, outer: str) -> bool:
    return path != outer and path.startswith(f"{outer}." if outer else "")


def _with_other_mates(value: Any) -> Any:
    """The first sample stays; the others become twice the last one."""

    def others(t: Any) -> Any:
        return torch.cat([t[:1], 2 * t[-1:].expand(len(t) - 1, *t.shape[1:])]) if isinstance(t, Tensor) else t

    return torch.utils._pytree.tree_map(others, value)


def _layer_mates(call: Call, factor: float, B: int) -> float:
    """By how much a layer's output for the first sample changes with its batch mates, with weights made larger."""
    twin = _scaled(call.module, factor)
    args, kwargs = _with_other_mates((call.args, call.kwargs))
    try:
        return _first_sample_changes(twin(*call.args, **call.kwargs), twin(*args, **kwargs), B) or 0.0
    except Exception:  # it cannot run alone
        return 0.0


def _first_sample_changes(before: Any, after: Any, B: int) -> float | None:
    """The largest relative change of the first sample over all tensors that have the batch on one axis."""
    changes = []
    for a, b in zip(_tensors(before), _tensors(after), strict=False):
        if a.shape == b.shape and list(a.shape).count(B) == 1:
            axis = list(a.shape).index(B)
            changes.append(_relative(a.select(axis, 0), b.select(axis, 0)))
    return max(changes, default=None)


def _softmax_axis(routing: Routing) -> Finding:
    check, where = "softmax over the output capsules", routing.call.path
    _, c = routing.call.softmaxes[-1]
    if routing.outputs is None and routing.inputs is None:
        return Finding(
            check, where, UNKNOWN, f"it runs over an axis of {routing.axis}; shapes do not tell what that is"
        )
    if routing.axis == routing.outputs:
        return Finding(check, where, FINE, f"the coupling sums to 1 over {routing.axis} output capsules")
    total = c.mean().item() * (routing.outputs or 1)
    return Finding(
        check, where, WRONG,
        f"the coupling sums to 1 over the {routing.axis} input capsules; over the {routing.outputs} output capsules it "
        f"sums to {total:.2g} on average",
        "softmax over the axis of the output capsules: an input capsule gives away 1 in all. With the right axis large "
        "initial weights saturate squash: use a deviation of 0.01 to 1 / sqrt(I)",
    )  # fmt: skip


COUNTS = re.compile(r"routings?$|iter", re.IGNORECASE)  # num_routing, routings, n_iterations; not num_routes


def _iterations(routing: Routing, calls: list[Call]) -> Finding:
    """How often the coupling is computed, beside what an attribute of the layer says."""
    check, where = "number of iterations", routing.call.path
    done = sum(1 for _, c in routing.call.softmaxes if routing.axis in c.shape)
    modules = (_layer_of(routing.call, calls).module, routing.call.module)
    said = {n: v for m in modules for n, v in vars(m).items() if COUNTS.search(n) and type(v) is int and v >= 0}
    if done == 1:
        return Finding(
            check, where, SUSPICIOUS, "the coupling is computed once: without learned logits it is uniform",
            "route 2 or 3 times, unless the uniform sum is meant",
        )  # fmt: skip
    wrong = {name: value for name, value in said.items() if value != done}
    if wrong and len(wrong) == len(said):
        name, value = next(iter(wrong.items()))
        return Finding(
            check, where, WRONG, f"{name} is {value}, but the coupling is computed {done} times",
            f"count the couplings: what others call {value} iterations is {name}={2 * value - done} here",
        )  # fmt: skip
    return Finding(
        check, where, FINE, f"the coupling is computed {done} times" + ("" if said else "; no attribute says how often")
    )


def _scaled(module: nn.Module, factor: float) -> nn.Module:
    twin = detached_copy(module, next(iter(module.parameters()), torch.empty(0)).dtype)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.mul_(factor)
    return twin


@torch.no_grad()
def _unit_axes(y: Tensor, B: int) -> list[int]:
    """The axes (other than the batch) along which nearly all vectors have length 1."""
    batch = list(y.shape).index(B) if B in y.shape else 0
    found = []
    for axis in range(y.dim()):
        lengths = torch.linalg.vector_norm(y, dim=axis)
        if axis != batch and ((lengths - 1).abs() < 0.02).float().mean() > 0.9:
            found.append(axis)
    return found


@torch.no_grad()
def _squash_axis(routing: Routing, B: int) -> Finding:
    """With inputs scaled up, whatever squash takes the length of has length 1."""
    check, call = "squash over a pose", routing.call

    def large(t: Any) -> Any:
        return 1e3 * t if isinstance(t, Tensor) and t.is_floating_point() else t

    args, kwargs = torch.utils._pytree.tree_map(large, (call.args, call.kwargs))
    try:
        y = next(iter(_tensors(_scaled(call.module, 1e3)(*args, **kwargs))))
    except Exception as error:
        return Finding(check, call.path, UNKNOWN, f"the layer cannot run alone: {error}")
    sizes = [y.shape[axis] for axis in _unit_axes(y, B)]
    real = [size for size in sizes if size > 1]
    fix = "squash over the axis of the pose's entries, the last of [B, J, D_out]"
    if real and real != [routing.outputs]:
        return Finding(check, call.path, FINE, f"large poses get length 1 over an axis of {real[-1]}")
    if real:
        text = f"large outputs get length 1 over the axis of the {real[0]} output capsules"
        return Finding(check, call.path, WRONG, text, fix)
    if ((y.abs() - 1).abs() < 0.02).float().mean() > 0.9:
        text = f"single entries get length 1: squash takes the norm over an axis of size 1 (output {tuple(y.shape)})"
        return Finding(check, call.path, WRONG, text, fix)
    return Finding(check, call.path, SUSPICIOUS, "large outputs get length 1 over no axis", fix)


@torch.no_grad()
def _input_squash(model: nn.Module, args: Any, kwargs: Any, layer: Call, I: int | None, B: int) -> Finding:
    """The same for the poses that come in: the weights of the convolutions are made large."""
    check, where = "squash of the input poses", layer.path
    if I is None or layer.input is None or layer.input.dim() != 3:
        return Finding(check, where, UNKNOWN, "shapes do not tell which axis of its input holds the capsules")
    twin = copy.deepcopy(model)
    for path, module in twin.named_modules():
        if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)) and not path.startswith(f"{where}."):
            for parameter in module.parameters():
                parameter.mul_(100)
    watch = _Watch(twin)
    watch.run(*args, **kwargs)
    x = next(call.input for call in watch.calls if call.path == where)
    assert x is not None
    sizes = [x.shape[axis] for axis in _unit_axes(x, B)]
    if sizes == [I]:
        return Finding(
            check, where, WRONG, f"large poses get length 1 over the {I} capsules instead of over their entries",
            "squash the primary capsules over the entries of a pose",
        )  # fmt: skip
    if sizes:
        return Finding(check, where, FINE, f"large poses get length 1 over their {sizes[-1]} entries")
    longest = torch.linalg.vector_norm(x, dim=-1).max().item()
    text = f"poses that should be squashed reach lengths of {longest:.2g}"
    return Finding(check, where, SUSPICIOUS, text, "squash the primary capsules")


PLACES = "capsules keep their place"


def _places(calls: list[Call], target: Call, B: int, I: int | None) -> Finding:
    """From how many places of the feature map is one capsule made?"""
    check, where = PLACES, target.path
    x, order = target.input, calls.index(target)
    convolutions = [c for c in calls[:order] if isinstance(c.module, nn.Conv2d) and isinstance(c.output, Tensor)]
    if x is None or x.grad_fn is None or x.dim() != 3 or not convolutions:
        return Finding(check, where, UNKNOWN, "no convolution leads to its poses")
    last = [c.output for c in convolutions if c.args and c.args[0] is convolutions[-1].args[0]]
    last = [t for t in last if t.requires_grad]
    if x.shape[0] != B or not last:
        return Finding(check, where, UNKNOWN, "the batch is not on the first axis of its poses")
    poses = x.mT if x.shape[2] == I != x.shape[1] else x  # [B, I, D_in]
    most = 0
    for i in {0, poses.shape[1] // 2, poses.shape[1] - 1}:
        grads = torch.autograd.grad(poses[0, i].pow(2).sum(), last, retain_graph=True, allow_unused=True)
        touched = sum(g[0].ne(0).any(0).long() for g in grads if g is not None)
        most = max(most, int((torch.as_tensor(touched) > 0).sum()))
    if most <= 1:
        return Finding(check, where, FINE, "each capsule is made from one place of the feature map")
    H, W = last[0].shape[2:]
    return Finding(
        check, where, WRONG, f"one capsule is made from {most} places of the {H} x {W} feature map",
        "do not view [B, types * dim, H, W] as [B, -1, dim]: unflatten the channels into (types, dim), move dim to the "
        "end, then flatten (fastcaps.PrimaryCapsules does)",
    )  # fmt: skip


def _zero_capsules(calls: list[Call]) -> Iterator[Finding]:
    """Zero inputs and zero parameters: the innermost modules that give NaN, forward or backward."""
    bad: dict[str, str] = {}
    tried = set()
    for call in sorted(calls, key=lambda call: -call.path.count(".") - bool(call.path)):
        prefix = f"{call.path}." if call.path else ""
        if _is_torch(call.module) or call.module in tried or any(path.startswith(prefix) for path in bad):
            continue
        tried.add(call.module)
        twin = _scaled(call.module, 0.0)

        def zero(t: Any) -> Any:
            return torch.zeros_like(t).requires_grad_() if isinstance(t, Tensor) and t.is_floating_point() else t

        args, kwargs = torch.utils._pytree.tree_map(zero, (call.args, call.kwargs))
        try:
            y = [t for t in _tensors(twin(*args, **kwargs)) if t.requires_grad]
            if not all(t.isfinite().all() for t in y):
                bad[call.path] = "the output is NaN"
                continue
            leaves = [*_tensors((args, kwargs)), *twin.parameters()]
            grads = torch.autograd.grad([t.sum() for t in y], leaves, allow_unused=True) if y else ()
        except Exception:  # a module that cannot run on zeros alone tells nothing
            continue
        if not all(g.isfinite().all() for g in grads if g is not None):
            bad[call.path] = "the output is finite, the gradient is NaN"
    for path, text in bad.items():
        yield Finding(
            "zero capsules", path, WRONG, f"with zero inputs and parameters {text}",
            "compute squash as s * n / (1 + n^2), and n without the infinite slope of sqrt at 0 (fastcaps.squash does)",
        )  # fmt: skip
    if not bad:
        yield Finding("zero capsules", "", FINE, "with zero inputs and parameters all outputs and gradients are finite")


def _lengths(output: Any, B: int) -> tuple[Tensor, bool] | None:
    """``[B, J]`` lengths of what looks most like class capsules, and whether they were made from poses here."""
    for t in _tensors(output):
        t = t.squeeze()
        if t.dim() == 3 and B in t.shape[:2]:
            return torch.linalg.vector_norm(t if t.shape[0] == B else t.transpose(0, 1), dim=-1), True
    for t in _tensors(output):
        if t.dim() == 2 and t.shape[0] == B:
            return t, False
    return None


def _initialisation(model: nn.Module, args: Any, kwargs: Any, output: Any, B: int) -> Finding:
    """Are all output capsules saturated or silent, and does a short training on the sample lower the margin loss?"""
    check = "it trains from here"
    found = _lengths(output, B)
    if found is None or not any(p.requires_grad for p in model.parameters()):
        return Finding(check, "", UNKNOWN, "no output [B, J, D_out] or [B, J] was found")
    lengths = found[0].detach()
    labels = torch.arange(B, device=lengths.device) % lengths.shape[1]
    twin = copy.deepcopy(model).train()
    optimizer = torch.optim.Adam([p for p in twin.parameters() if p.requires_grad], lr=1e-3)
    losses = []
    for _ in range(STEPS + 1):
        now = _lengths(twin(*args, **kwargs), B)
        assert now is not None
        loss = margin_loss(now[0], labels)
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    text = (
        f"lengths {lengths.min():.2g} to {lengths.max():.2g}, mean {lengths.mean():.2g}; {STEPS} steps of Adam on the "
        f"sample take the margin loss from {losses[0]:.3g} to {losses[-1]:.3g}"
    )
    fix = "initialise the matrices with a deviation of 0.01 to 1 / sqrt(I), and check the squash"
    if not losses[-1] <= (1 - TRAINS) * losses[0]:
        return Finding(check, "", WRONG, text, fix)
    if lengths.min() > SATURATED:
        return Finding(check, "", SUSPICIOUS, f"all output capsules are saturated: {text}", fix)
    return Finding(check, "", FINE, text)


def _losses(
    output: Any, B: int, margin: Callable[..., Tensor] | None, reconstruction: Callable[..., Tensor] | None
) -> Iterator[Finding]:
    found = _lengths(output, B)
    scores = next((t for t in _tensors(output) if t.dim() == 2 and t.shape[0] == B), None)
    if scores is not None and (scores.sum(1) - 1).abs().max() < 1e-4:
        yield Finding(
            "class scores are lengths", "", SUSPICIOUS, "the class scores of each sample sum to 1, as after a softmax",
            "give the margin loss the lengths: its bounds 0.9 and 0.1 are for them, not for probabilities that compete",
        )  # fmt: skip
    if margin is not None and found is not None:
        yield _margin(margin, found[0].shape[1], found[0].dtype)
    if reconstruction is not None:
        yield _reconstruction(reconstruction)


def _margin(loss: Callable[..., Tensor], J: int, dtype: torch.dtype) -> Finding:
    """The loss at some lengths beside the paper's: which constant lies between them, if one does?"""
    check = "margin loss"
    generator = torch.Generator().manual_seed(0)
    ratios = []
    for B in (4, 8):
        for _ in range(3):
            lengths = torch.rand(B, J, generator=generator, dtype=torch.float64).to(dtype)
            labels = torch.randint(J, (B,), generator=generator)
            wanted = margin_loss(lengths, labels).item()
            try:
                value = loss(lengths, labels)
            except Exception:  # it may want them one-hot
                value = loss(lengths, torch.nn.functional.one_hot(labels, J).to(dtype))
            if value.numel() != 1:
                return Finding(
                    check,
                    "",
                    WRONG,
                    f"it returns {tuple(value.shape)}, no scalar",
                    "reduce it: sum over classes, mean over samples",
                )
            ratios.append((B, value.item() / wanted))
    small, large = ([r for b, r in ratios if b == B] for B in (4, 8))
    spread = max(max(part) / min(part) for part in (small, large)) - 1 if min(r for _, r in ratios) > 0 else 1.0
    sum_, mean = "summed over the samples", "averaged over the classes"
    if spread > 1e-3:
        least, most = min(small + large), max(small + large)
        text = f"it is not a multiple of the paper's: the ratio goes from {least:.3g} to {most:.3g}"
        fix = "sum_k T_k max(0, 0.9 - |v_k|)^2 + 0.5 (1 - T_k) max(0, |v_k| - 0.1)^2, both squared (fastcaps.losses)"
        return Finding(check, "", WRONG, text, fix)
    for B, ratio in ((4, small[0]), (8, large[0])):
        notes = {1.0: "", B: sum_, 1 / J: mean, B / J: f"{sum_} and {mean}"}
        closest = min(notes, key=lambda r: abs(r - ratio))
        if abs(closest - ratio) > 1e-3 * closest:
            return Finding(
                check,
                "",
                SUSPICIOUS,
                f"it is {ratio:.4g} times the paper's",
                "the weight of the reconstruction is meant for the paper's",
            )
    if not notes[closest]:
        return Finding(check, "", FINE, "it is the paper's: summed over the classes, averaged over the samples")
    return Finding(
        check, "", WRONG, f"it is {ratio:.3g} times the paper's at {B} samples and {J} classes: {notes[closest]}",
        "sum over the classes and average over the samples, else the reconstruction weighs too much or too little",
    )  # fmt: skip


def _reconstruction(loss: Callable[..., Tensor]) -> Finding:
    check = "reconstruction loss"
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.rand(4, 1, 28, 28, generator=generator) for _ in range(2))
    summed = (a - b).pow(2).flatten(1).sum(1).mean().item()
    try:
        value = loss(a, b)
    except Exception:
        value = loss(a.flatten(1), b.flatten(1))
    ratio = float(value) / summed
    names = {1.0: "", 1 / 784: "averaged over the pixels", 4.0: "summed over the samples"}
    for scale in (1.0, 0.0005):
        for factor, name in names.items():
            if abs(ratio - factor * scale) < 1e-3 * factor * scale:
                weight = "" if scale == 1 else ", times 0.0005"
                if not name:
                    return Finding(
                        check, "", FINE, f"it is the paper's: summed over the pixels, averaged over the samples{weight}"
                    )
                text = f"it is {ratio:.3g} times the paper's sum over the pixels: {name}{weight}"
                fix = "sum over the pixels and average over the samples, or multiply 0.0005 by the number of pixels"
                return Finding(check, "", WRONG, text, fix)
    return Finding(check, "", SUSPICIOUS, f"it is {ratio:.3g} times the summed squared error", "check its weight")


# --------------------------------------------------------------------------------------------------- from the command


def load_target(target: str) -> dict[str, Any]:
    """``model.py:build`` as arguments of :func:`examine`; ``build()`` gives a model, (model, sample), or a dict.

    Raises:
        ValueError: there is no such file or function, or it returns something else.
    """
    file, _, name = target.rpartition(":")
    if not Path(file).is_file():
        raise ValueError(f"there is no file {file!r} (wanted: FILE.py:FUNCTION, or a checkpoint)")
    build = getattr(_imported(Path(file)), name, None)
    if not callable(build):
        raise ValueError(f"{file} has no function {name!r}")
    built = build()
    if isinstance(built, nn.Module):
        return {"model": built}
    if isinstance(built, tuple) and len(built) == 2 and isinstance(built[0], nn.Module):
        return {"model": built[0], "sample": built[1]}
    known = list(inspect.signature(examine).parameters)
    if isinstance(built, Mapping) and isinstance(built.get("model"), nn.Module) and set(built) <= set(known):
        return dict(built)
    raise ValueError(f"{name}() must return a module, (module, sample), or a dict with {', '.join(known)}")


def _imported(file: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(file.stem, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(file.parent.resolve()))
    sys.modules[file.stem] = module
    spec.loader.exec_module(module)
    return module


def random_sample(model: nn.Module, image_shape: Sequence[int] | None) -> Tensor:
    """Random images in [0, 1] for a model: of the given shape, or else of the first of 28x28 and 32x32 that it takes.

    Raises:
        ValueError: it takes none.
    """
    shapes = [tuple(image_shape)] if image_shape else [(1, 28, 28), (3, 32, 32), (1, 32, 32), (3, 28, 28)]
    first = next(iter(model.parameters()), torch.empty(0))
    sizes = {n for p in model.parameters() for n in p.shape}
    B = next((n for n in BATCH if n not in sizes), BATCH[0])
    errors = []
    for shape in shapes:
        generator = torch.Generator().manual_seed(0)
        sample = torch.rand(B, *shape, generator=generator).to(first)
        try:
            with torch.no_grad():
                copy.deepcopy(model).eval()(sample)
            return sample
        except Exception as error:
            errors.append(f"{shape}: {type(error).__name__}: {error}")
    raise ValueError("the model takes none of these images; give --image-shape C H W. " + "; ".join(errors))


def examine_checkpoint(path: Path, image_shape: Sequence[int] | None) -> tuple[str, list[Finding]]:
    """Whose network a checkpoint is, and what is known and found to be wrong with it.

    Args:
        path: a file of :meth:`fastcaps.CapsNet.save`, or a state dict of one of the networks that ``fastcaps convert``
            knows.
        image_shape: ``(C, H, W)``, where the checkpoint does not tell.

    Raises:
        ValueError: it is neither.
    """
    from fastcaps.checkpoints import NETWORKS, convert_checkpoint, read_state_dict
    from fastcaps.models import CapsNet
    from fastcaps.recipes import RECIPES

    if path.suffix == ".safetensors":
        try:
            network = CapsNet.load(path)
            return "a fastcaps.CapsNet", examine(network, random_sample(network, network.image_shape))
        except ValueError:
            pass  # somebody else's safetensors file
    state, reasons = read_state_dict(path), []
    for name, whose in NETWORKS.items():
        try:
            network = convert_checkpoint(state, name, image_shape=image_shape, fix=whose.not_kept is not None)
        except ValueError as error:
            reasons.append(f"{name}: {error}")
            continue
        recipe = next(r for r in RECIPES if r.name == name)
        findings = examine(network, random_sample(network, network.image_shape))
        if not recipe.eps and not recipe.norm_eps:
            s = torch.zeros(2)
            value = (s * s).sum() / (1 + (s * s).sum()) * s / (s * s).sum().sqrt()
            text = f"its squash divides by the norm alone: at 0 that is {value[0].item()}"
            findings.append(Finding("zero capsules", "", WRONG, text, "fastcaps.CapsNet computes 0 there"))
        if recipe.offset:
            text = f"with iterations = 3 it computes the coupling {network.capsules.num_iterations} times"
            findings.append(Finding("number of iterations", "", WRONG, text, "count the couplings"))
        if whose.not_kept:
            text = f"{whose.not_kept}; its logits are averaged over the batch (known of this network, not computed)"
            findings.append(
                Finding("squash of the input poses", "", WRONG, text, "convert it with --fix, and train it on")
            )
        return f"the network of {name}", findings
    raise ValueError(f"{str(path)!r} is of no network that is known:\n" + "\n".join(reasons))
