"""The checks of a model that was watched; each returns what it found, with numbers."""

import copy
import re
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from fastcaps.convert.comparison import detached_copy
from fastcaps.doctor.finding import FINE, SUSPICIOUS, UNKNOWN, WRONG, Finding
from fastcaps.doctor.loss_checks import class_lengths
from fastcaps.doctor.watch import Call, Routing, Watch, batch_size, is_torch, layer_of, tensors
from fastcaps.losses import margin_loss

CHANGES = 1e-4  # relative: what rounding cannot explain in float32
SATURATED = 0.98  # length of all output capsules
STEPS, TRAINS = 40, 0.02  # Adam steps of the training probe, and by what share they must lower the loss
PLACES = "capsules keep their place"


def finite(output: Any) -> Finding:
    """Is there a NaN or an infinity in what the model returns?"""
    check = "the output is finite"
    shares = [t.isfinite().double().mean().item() for t in tensors(output) if t.numel()]
    if not shares:
        return Finding(check, "", UNKNOWN, "the model returns no floating-point tensor")
    if min(shares) == 1:
        return Finding(check, "", FINE, "no entry is NaN or infinite on this sample")
    text = f"{100 * (1 - min(shares)):.3g} % of an output's entries are NaN or infinite on this sample"
    return Finding(check, "", WRONG, text, "look for it in the sample and in the parameters, then at the zero capsules")


@torch.no_grad()
def batch_mates(
    model: nn.Module, args: Any, kwargs: Any, output: Any, watch: Watch, routings: list[Routing]
) -> Finding:
    """Does the first sample's output change when all others become another one?"""
    second = Watch(model)
    check = "samples are independent"
    B = batch_size((args, kwargs))
    if not all(t.isfinite().all() for t in tensors(output)):
        return Finding(check, "", UNKNOWN, "the model's output is not finite")
    other_args, other_kwargs = _with_other_mates((args, kwargs), B)
    try:
        other = second.run(*other_args, **other_kwargs)
    except Exception as error:
        return Finding(
            check, "", UNKNOWN, f"the model does not take twice the last sample as the others: {_text(error)}"
        )
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
        for a, b in zip(watch.calls, second.calls, strict=False)  # what is called may depend on the samples
        if a.path == b.path and not is_torch(a.module) and (_first_sample_changes(a.output, b.output, B) or 0) > CHANGES
        and (_first_sample_changes(a.args, b.args, B) or 0) <= CHANGES
    ]  # fmt: skip
    inner = [path for path in culprits if not any(_inside(other, path) for other in culprits)]
    text = f"a sample's output changes by {100 * worst:.2g} % when its batch mates change"
    return Finding(check, inner[0] if inner else "", WRONG, text, fix)


def _text(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0]


def _inside(path: str, outer: str) -> bool:
    return path != outer and path.startswith(f"{outer}." if outer else "")


def _with_other_mates(value: Any, B: int) -> Any:
    """The first sample stays; the others become twice the last one. Labels stay what they are."""

    def others(t: Any) -> Any:
        if not isinstance(t, Tensor) or not t.is_floating_point() or t.shape[:1] != (B,):
            return t
        return torch.cat([t[:1], 2 * t[-1:].expand(B - 1, *t.shape[1:])])

    return torch.utils._pytree.tree_map(others, value)


def _layer_mates(call: Call, factor: float, B: int) -> float:
    """By how much a layer's output for the first sample changes with its batch mates, with weights made larger."""
    twin = _scaled(call.module, factor)
    args, kwargs = _with_other_mates((call.args, call.kwargs), B)
    try:
        return _first_sample_changes(twin(*call.args, **call.kwargs), twin(*args, **kwargs), B) or 0.0
    except Exception:  # it cannot run alone
        return 0.0


def _first_sample_changes(before: Any, after: Any, B: int) -> float | None:
    """The largest relative change of the first sample over all tensors whose shape tells the batch.

    A model for one batch size only may have that size on another axis as well: then the first axis is the batch.
    """
    changes = []
    for a, b in zip(tensors(before), tensors(after), strict=False):
        if a.shape == b.shape and (a.shape[:1] == (B,) or a.shape.count(B) == 1):
            axis = a.shape.index(B)
            changes.append(_relative(a.select(axis, 0), b.select(axis, 0)))
    return max(changes, default=None)


def _relative(a: Tensor, b: Tensor) -> float:
    size = torch.linalg.vector_norm(a.double()).item()
    return torch.linalg.vector_norm((a - b).double()).item() / size if size else 0.0


def softmax_axis(routing: Routing) -> Finding:
    """Over which capsules does the coupling sum to 1?"""
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


def iterations(routing: Routing, calls: list[Call]) -> Finding:
    """How often the coupling is computed, beside what an attribute of the layer says."""
    check, where = "number of iterations", routing.call.path
    done = sum(1 for _, c in routing.call.softmaxes if routing.axis in c.shape)
    modules = (layer_of(routing.call, calls).module, routing.call.module)
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


def copied(model: nn.Module) -> nn.Module:
    """A copy to change, also of a model that holds tensors with a history, which deepcopy refuses."""
    try:
        return copy.deepcopy(model)
    except RuntimeError:
        twin = detached_copy(model, next(iter(model.parameters()), torch.empty(0)).dtype)
        for ours, theirs in zip(twin.parameters(), model.parameters(), strict=True):
            ours.requires_grad_(theirs.requires_grad)
        return twin


def _scaled(module: nn.Module, factor: float) -> nn.Module:
    twin = detached_copy(module, next(iter(module.parameters()), torch.empty(0)).dtype)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.nan_to_num_().mul_(factor)  # 0 * NaN is NaN
    return twin


def _unit(lengths: Tensor) -> bool:
    """Whether these are lengths of squashed large vectors: none above 1, most of those that are not 0 near it."""
    there = lengths[lengths > 1e-3 * lengths.max()].float()
    return bool(there.numel()) and bool(there.max() < 1.01) and bool(there.median() > 0.98)


def _unit_axes(y: Tensor, B: int) -> list[int]:
    """The axes (other than the batch) along which vectors have length 1."""
    batch = list(y.shape).index(B) if B in y.shape else 0
    return [axis for axis in range(y.dim()) if axis != batch and _unit(torch.linalg.vector_norm(y, dim=axis))]


@torch.no_grad()
def squash_axis(routing: Routing, B: int) -> Finding:
    """With inputs scaled up, whatever squash takes the length of has length 1."""
    check, call = "squash over a pose", routing.call

    def large(t: Any) -> Any:
        if not isinstance(t, Tensor) or not t.is_floating_point():
            return t
        return t * (1e3 / t.float().pow(2).mean().sqrt().clamp(min=1e-30)).to(t.dtype)

    args, kwargs = torch.utils._pytree.tree_map(large, (call.args, call.kwargs))
    try:
        y = next(iter(tensors(_scaled(call.module, 1e3)(*args, **kwargs))))
    except Exception as error:
        return Finding(check, call.path, UNKNOWN, f"the layer cannot run alone: {error}")
    if not y.isfinite().all():
        return Finding(check, call.path, UNKNOWN, "its output is not finite for large inputs")
    sizes = [y.shape[axis] for axis in _unit_axes(y, B)]
    real = [size for size in sizes if size > 1]
    fix = "squash over the axis of the pose's entries, the last of [B, J, D_out]"
    if real and real != [routing.outputs]:
        return Finding(check, call.path, FINE, f"large poses get length 1 over an axis of {real[-1]}")
    if real:
        text = f"large outputs get length 1 over the axis of the {real[0]} output capsules"
        return Finding(check, call.path, WRONG, text, fix)
    if _unit(y.abs()):
        text = f"single entries get length 1: squash takes the norm over an axis of size 1 (output {tuple(y.shape)})"
        return Finding(check, call.path, WRONG, text, fix)
    return Finding(check, call.path, SUSPICIOUS, "large outputs get length 1 over no axis", fix)


def primary_capsules(
    model: nn.Module, args: Any, kwargs: Any, calls: list[Call], layer: Call, I: int | None, B: int
) -> Iterator[Finding]:
    """What comes into the first capsule layer: over which axis was it squashed, and from which places was it made?"""
    squash = input_squash(model, args, kwargs, layer, I, B)
    yield squash
    if squash.verdict == WRONG:  # it mixes all places by itself
        yield Finding(PLACES, layer.path, UNKNOWN, "the squash of its poses mixes them all")
    else:
        yield places(calls, layer, B, I)


@torch.no_grad()
def input_squash(model: nn.Module, args: Any, kwargs: Any, layer: Call, I: int | None, B: int) -> Finding:
    """The same for the poses that come in: the weights of the convolutions are made large."""
    check, where = "squash of the input poses", layer.path
    if I is None or layer.input is None or layer.input.dim() != 3:
        return Finding(check, where, UNKNOWN, "shapes do not tell which axis of its input holds the capsules")
    twin = copied(model)
    for path, module in twin.named_modules():
        if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)) and not path.startswith(f"{where}."):
            for parameter in module.parameters():
                parameter.mul_(1e4)
    watch = Watch(twin)
    watch.run(*args, **kwargs)
    x = next(call.input for call in watch.calls if call.path == where)
    assert x is not None
    if not x.isfinite().all():
        return Finding(check, where, UNKNOWN, "its poses are not finite where the convolutions have large weights")
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


def places(calls: list[Call], target: Call, B: int, I: int | None) -> Finding:
    """From how many places of the feature map is one capsule made?"""
    check, where = PLACES, target.path
    x, order = target.input, calls.index(target)
    convolutions = [c for c in calls[:order] if isinstance(c.module, nn.Conv2d) and isinstance(c.output, Tensor)]
    if x is None or x.grad_fn is None or x.dim() != 3 or not convolutions:
        return Finding(check, where, UNKNOWN, "no convolution leads to its poses, or no gradient")
    if not x.isfinite().all():
        return Finding(check, where, UNKNOWN, "its poses are not finite")
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
    text = f"one capsule is made from {most} places of the {last[0].shape[2]} x {last[0].shape[3]} feature map"
    if most > poses.shape[2]:  # a view gives a pose of D_in entries at most D_in places
        return Finding(check, where, UNKNOWN, f"{text}: something between mixes them, as attention does")
    return Finding(
        check, where, WRONG, text,
        "do not view [B, types * dim, H, W] as [B, -1, dim]: unflatten the channels into (types, dim), move dim to the "
        "end, then flatten (fastcaps.PrimaryCapsules does)",
    )  # fmt: skip


def zero_capsules(calls: list[Call]) -> Iterator[Finding]:
    """Zero inputs and zero parameters: the innermost modules that give NaN, forward or backward."""
    bad: dict[str, str] = {}
    tried = set()
    for call in sorted(calls, key=lambda call: -call.path.count(".") - bool(call.path)):
        prefix = f"{call.path}." if call.path else ""
        if is_torch(call.module) or call.module in tried or any(path.startswith(prefix) for path in bad):
            continue
        tried.add(call.module)
        twin = _scaled(call.module, 0.0)

        def zero(t: Any) -> Any:
            return torch.zeros_like(t).requires_grad_() if isinstance(t, Tensor) and t.is_floating_point() else t

        args, kwargs = torch.utils._pytree.tree_map(zero, (call.args, call.kwargs))
        try:
            y = [t for t in tensors(twin(*args, **kwargs)) if t.requires_grad]
            if not all(t.isfinite().all() for t in y):
                bad[call.path] = "the output is NaN"
                continue
            leaves = [*tensors((args, kwargs)), *twin.parameters()]
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


def _trained(twin: nn.Module, args: Any, kwargs: Any, B: int, labels: Tensor) -> list[float]:
    """The margin loss before each step of Adam, and after the last."""
    optimizer = torch.optim.Adam([p for p in twin.parameters() if p.requires_grad], lr=1e-3)
    losses = []
    for _ in range(STEPS + 1):
        now = class_lengths(twin(*args, **kwargs), B)
        if now is None or not now[0].requires_grad:
            raise ValueError("in training its output is another one, or carries no gradient")
        loss = margin_loss(now[0], labels)
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return losses


def initialisation(model: nn.Module, args: Any, kwargs: Any, output: Any, B: int) -> Finding:
    """Are all output capsules saturated or silent, and does a short training on the sample lower the margin loss?"""
    check = "it trains from here"
    found = class_lengths(output, B)
    if found is None:
        return Finding(check, "", UNKNOWN, "no output [B, J, D_out] or [B, J] was found")
    if not found[0].isfinite().all():
        return Finding(check, "", UNKNOWN, "the model's output is not finite")
    if not any(p.requires_grad for p in model.parameters()):
        return Finding(check, "", UNKNOWN, "no parameter requires a gradient")
    lengths = found[0].detach()
    labels = torch.arange(B, device=lengths.device) % lengths.shape[1]
    try:
        losses = _trained(copied(model).train(), args, kwargs, B, labels)
    except Exception as error:  # in training it may want labels, or keep a graph from step to step
        return Finding(check, "", UNKNOWN, f"it does not train on the sample alone: {_text(error)}")
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
