"""The checks of a model that was watched; each returns what it found, with numbers."""

import re
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from fastcaps.convert.modules import detached_copy, floating_tensors, full_copy, map_floating
from fastcaps.doctor.finding import (
    BATCH_MATES,
    FINE,
    FINITE,
    INITIALISATION,
    INPUT_SQUASH,
    ITERATIONS,
    SCRAMBLING,
    SOFTMAX_AXIS,
    SQUASH_AXIS,
    SUSPICIOUS,
    UNKNOWN,
    WRONG,
    ZERO_CAPSULES,
    Finding,
)
from fastcaps.doctor.loss_checks import class_lengths
from fastcaps.doctor.watch import Call, Routing, Run, capsules_axis, is_inside, is_torch, layer_of
from fastcaps.losses import margin_loss

CHANGES = 1e-4  # relative: what rounding cannot explain in float32
ENLARGED = (10.0, 100.0, 1000.0)  # factors of the weights: with small ones the logits hardly matter
LARGE, LARGER = 1e3, 1e4  # factors of poses and weights after which squash gives length 1
SATURATED, SILENT = 0.98, 0.02  # lengths of all output capsules
STEPS, TRAINS = 40, 0.02  # Adam steps of the training probe, and by what share they must lower the loss
COUNTS = re.compile(r"routings?$|iter", re.IGNORECASE)  # num_routing, routings, n_iterations; not num_routes


def finite(output: Any) -> Finding:
    """Is there a NaN or an infinity in what the model returns?"""
    shares = [t.isfinite().double().mean().item() for t in floating_tensors(output) if t.numel()]
    if not shares:
        return Finding(FINITE, "", UNKNOWN, "the model returns no floating-point tensor")
    if min(shares) == 1:
        return Finding(FINITE, "", FINE, "no entry is NaN or infinite on this sample")
    text = f"{100 * (1 - min(shares)):.3g} % of an output's entries are NaN or infinite on this sample"
    return Finding(
        FINITE, "", WRONG, text, "look for it in the sample and in the parameters, then at the zero capsules"
    )


@torch.no_grad()
def batch_mates(run: Run, routings: list[Routing]) -> Finding:
    """Does the first sample's output change when all others become another one?"""
    if not all(t.isfinite().all() for t in floating_tensors(run.output)):
        return Finding(BATCH_MATES, "", UNKNOWN, "the model's output is not finite")
    try:
        other = Run.of(run.model, *_with_other_mates((run.args, run.kwargs), run.B))
    except Exception as error:
        text = f"the model does not take twice the last sample as the others: {_text(error)}"
        return Finding(BATCH_MATES, "", UNKNOWN, text)
    change = _first_sample_changes(run.output, other.output, run.B)
    if change is None:
        return Finding(BATCH_MATES, "", UNKNOWN, "the model returns nothing with the batch on an axis")
    fix = (
        "keep the routing logits per sample, [B, I, J]: do not average the agreement over the batch, and do not "
        "normalise over the batch in evaluation"
    )
    if change > CHANGES:
        text = f"a sample's output changes by {100 * change:.2g} % when its batch mates change"
        return Finding(BATCH_MATES, _where_mates_mix(run, other), WRONG, text, fix)
    for routing in routings:
        for factor in ENLARGED:
            alone = _layer_mates(routing.call, factor, run.B)
            if alone > CHANGES:
                text = f"with weights {factor:g} times as large a sample's output changes by {100 * alone:.2g} %"
                return Finding(BATCH_MATES, routing.call.path, WRONG, f"{text} when its batch mates change", fix)
    return Finding(BATCH_MATES, "", FINE, f"a sample's output changes by {change:.0e} when its batch mates change")


def _where_mates_mix(run: Run, other: Run) -> str:
    """The path of an innermost module whose output for the first sample changes, while its input does not."""
    culprits = [
        a.path
        for a, b in zip(run.calls, other.calls, strict=False)  # what is called may depend on the samples
        if a.path == b.path
        and not is_torch(a.module)
        and (_first_sample_changes(a.output, b.output, run.B) or 0) > CHANGES
        and (_first_sample_changes(a.args, b.args, run.B) or 0) <= CHANGES
    ]
    inner = [path for path in culprits if not any(is_inside(other, path) for other in culprits)]
    return inner[0] if inner else ""


def _text(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0]


def _with_other_mates(value: Any, B: int) -> Any:
    """The first sample stays; the others become twice the last one. Labels stay what they are."""

    def others(t: Tensor) -> Tensor:
        return torch.cat([t[:1], 2 * t[-1:].expand(B - 1, *t.shape[1:])]) if t.shape[:1] == (B,) else t

    return map_floating(others, value)


def _layer_mates(call: Call, factor: float, B: int) -> float:
    """By how much a layer's output for the first sample changes with its batch mates, with weights made larger."""
    layer = _scaled_copy(call.module, factor)
    args, kwargs = _with_other_mates((call.args, call.kwargs), B)
    try:
        return _first_sample_changes(layer(*call.args, **call.kwargs), layer(*args, **kwargs), B) or 0.0
    except Exception:  # it cannot run alone
        return 0.0


def _first_sample_changes(before: Any, after: Any, B: int) -> float | None:
    """The largest relative change of the first sample over all tensors whose shape tells the batch.

    A model for one batch size only may have that size on another axis as well: then the first axis is the batch.
    """
    changes = []
    for a, b in zip(floating_tensors(before), floating_tensors(after), strict=False):
        if a.shape == b.shape and (a.shape[:1] == (B,) or a.shape.count(B) == 1):
            axis = a.shape.index(B)
            changes.append(_relative(a.select(axis, 0), b.select(axis, 0)))
    return max(changes, default=None)


def _relative(a: Tensor, b: Tensor) -> float:
    size = torch.linalg.vector_norm(a.double()).item()
    return torch.linalg.vector_norm((a - b).double()).item() / size if size else 0.0


def softmax_axis(routing: Routing) -> Finding:
    """Over which capsules does the coupling sum to 1?"""
    where, summed = routing.call.path, routing.softmax_size
    if routing.outputs is None and routing.inputs is None:
        text = f"it runs over an axis of {summed}; shapes do not tell what that is"
        return Finding(SOFTMAX_AXIS, where, UNKNOWN, text)
    if summed == routing.outputs:
        return Finding(SOFTMAX_AXIS, where, FINE, f"the coupling sums to 1 over {summed} output capsules")
    total = routing.couplings[-1].mean().item() * (routing.outputs or 1)
    return Finding(
        SOFTMAX_AXIS, where, WRONG,
        f"the coupling sums to 1 over the {summed} input capsules; over the {routing.outputs} output capsules it "
        f"sums to {total:.2g} on average",
        "softmax over the axis of the output capsules: an input capsule gives away 1 in all. With the right axis large "
        "initial weights saturate squash: use a deviation of 0.01 to 1 / sqrt(I)",
    )  # fmt: skip


def iterations(routing: Routing, calls: list[Call]) -> Finding:
    """How often the coupling is computed, beside what an attribute of the layer says."""
    where, done = routing.call.path, len(routing.couplings)
    if done == 1:
        return Finding(
            ITERATIONS, where, SUSPICIOUS, "the coupling is computed once: without learned logits it is uniform",
            "route 2 or 3 times, unless the uniform sum is meant",
        )  # fmt: skip
    modules = (layer_of(routing.call, calls).module, routing.call.module)
    attributes = {n: v for m in modules for n, v in vars(m).items() if COUNTS.search(n) and type(v) is int and v >= 0}
    if attributes and done not in attributes.values():
        name, value = next(iter(attributes.items()))
        return Finding(
            ITERATIONS, where, WRONG, f"{name} is {value}, but the coupling is computed {done} times",
            f"count the couplings: what others call {value} iterations is {name}={2 * value - done} here",
        )  # fmt: skip
    text = f"the coupling is computed {done} times" + ("" if attributes else "; no attribute says how often")
    return Finding(ITERATIONS, where, FINE, text)


def _scaled_copy(module: nn.Module, factor: float) -> nn.Module:
    """A copy whose parameters are multiplied by a factor."""
    copied = detached_copy(module)
    with torch.no_grad():
        for parameter in copied.parameters():
            parameter.nan_to_num_().mul_(factor)  # 0 * NaN is NaN
    return copied


def _unit(lengths: Tensor) -> bool:
    """Whether these are lengths of squashed large vectors: none above 1, most of those that are not 0 near it."""
    there = lengths[lengths > 1e-3 * lengths.max()].float()
    return bool(there.numel()) and bool(there.max() < 1.01) and bool(there.median() > 0.98)


def _unit_axes(y: Tensor, B: int) -> list[int]:
    """The axes (other than the batch) along which vectors have length 1."""
    return [axis for axis in _axes(y, B) if _unit(torch.linalg.vector_norm(y, dim=axis))]


def _axes(y: Tensor, B: int) -> list[int]:
    """The axes other than the batch."""
    batch = y.shape.index(B) if B in y.shape else 0
    return [axis for axis in range(y.dim()) if axis != batch]


@torch.no_grad()
def squash_axis(routing: Routing, B: int) -> Finding:
    """With inputs scaled up, whatever squash takes the length of has length 1."""
    call = routing.call

    def large(t: Tensor) -> Tensor:
        return t * (LARGE / t.float().pow(2).mean().sqrt().clamp(min=1e-30)).to(t.dtype)

    args, kwargs = map_floating(large, (call.args, call.kwargs))
    try:
        y = next(iter(floating_tensors(_scaled_copy(call.module, LARGE)(*args, **kwargs))))
    except Exception as error:
        return Finding(SQUASH_AXIS, call.path, UNKNOWN, f"the layer cannot run alone: {error}")
    if not y.isfinite().all():
        return Finding(SQUASH_AXIS, call.path, UNKNOWN, "its output is not finite for large inputs")
    # Of two axes of that size the first holds the output capsules: J stands before D_out everywhere.
    capsules = next((axis for axis in _axes(y, B) if y.shape[axis] == routing.outputs), None)
    unit = [axis for axis in _unit_axes(y, B) if y.shape[axis] > 1]
    fix = "squash over the axis of the pose's entries, the last of [B, J, D_out]"
    if unit and unit != [capsules]:
        return Finding(SQUASH_AXIS, call.path, FINE, f"large poses get length 1 over an axis of {y.shape[unit[-1]]}")
    if unit:
        text = f"large outputs get length 1 over the axis of the {routing.outputs} output capsules"
        return Finding(SQUASH_AXIS, call.path, WRONG, text, fix)
    if _unit(y.abs()):
        text = f"single entries get length 1: squash takes the norm over an axis of size 1 (output {tuple(y.shape)})"
        return Finding(SQUASH_AXIS, call.path, WRONG, text, fix)
    return Finding(SQUASH_AXIS, call.path, SUSPICIOUS, "large outputs get length 1 over no axis", fix)


def primary_capsules(run: Run, layer: Call, I: int | None) -> Iterator[Finding]:
    """What comes into the first capsule layer: over which axis was it squashed, and from which places was it made?"""
    axis = capsules_axis(layer, I)
    squash = input_squash(run, layer, axis)
    yield squash
    if squash.verdict == WRONG:  # it mixes all places by itself
        yield Finding(SCRAMBLING, layer.path, UNKNOWN, "the squash of its poses mixes them all")
    else:
        yield scrambling(run, layer, axis)


@torch.no_grad()
def input_squash(run: Run, layer: Call, axis: int | None) -> Finding:
    """The same for the poses that come in: the weights of the convolutions are made large."""
    where = layer.path
    if axis is None:
        return Finding(INPUT_SQUASH, where, UNKNOWN, "shapes do not tell which axis of its input holds the capsules")
    model = full_copy(run.model)
    for path, module in model.named_modules():
        if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)) and not is_inside(path, where):
            for parameter in module.parameters():
                parameter.mul_(LARGER)
    x = next(call.input for call in Run.of(model, run.args, run.kwargs).calls if call.path == where)
    assert x is not None
    if not x.isfinite().all():
        return Finding(
            INPUT_SQUASH, where, UNKNOWN, "its poses are not finite where the convolutions have large weights"
        )
    unit = _unit_axes(x, run.B)
    if unit == [axis]:
        return Finding(
            INPUT_SQUASH, where, WRONG,
            f"large poses get length 1 over the {x.shape[axis]} capsules instead of over their entries",
            "squash the primary capsules over the entries of a pose",
        )  # fmt: skip
    if unit:
        return Finding(INPUT_SQUASH, where, FINE, f"large poses get length 1 over their {x.shape[unit[-1]]} entries")
    longest = torch.linalg.vector_norm(x, dim=-1).max().item()
    text = f"poses that should be squashed reach lengths of {longest:.2g}"
    return Finding(INPUT_SQUASH, where, SUSPICIOUS, text, "squash the primary capsules")


def scrambling(run: Run, layer: Call, axis: int | None) -> Finding:
    """From how many places of the feature map is one capsule made?"""
    where, x = layer.path, layer.input
    before = run.calls[: run.calls.index(layer)]
    convolutions = [c for c in before if isinstance(c.module, nn.Conv2d) and isinstance(c.output, Tensor)]
    if x is None or x.grad_fn is None or x.dim() != 3 or not convolutions:
        return Finding(SCRAMBLING, where, UNKNOWN, "no convolution leads to its poses, or no gradient")
    if not x.isfinite().all():
        return Finding(SCRAMBLING, where, UNKNOWN, "its poses are not finite")
    maps = [c.output for c in convolutions if c.input is convolutions[-1].input and c.output.requires_grad]
    if x.shape[0] != run.B or not maps:
        return Finding(SCRAMBLING, where, UNKNOWN, "the batch is not on the first axis of its poses")
    poses = x.mT if axis == 2 else x  # [B, I, D_in]
    most = max(_places(poses[0, i], maps) for i in {0, poses.shape[1] // 2, poses.shape[1] - 1})
    if most <= 1:
        return Finding(SCRAMBLING, where, FINE, "each capsule is made from one place of the feature map")
    text = f"one capsule is made from {most} places of the {maps[0].shape[2]} x {maps[0].shape[3]} feature map"
    if most > poses.shape[2]:  # a view gives a pose of D_in entries at most D_in places
        return Finding(SCRAMBLING, where, UNKNOWN, f"{text}: something between mixes them, as attention does")
    return Finding(
        SCRAMBLING, where, WRONG, text,
        "do not view [B, types * dim, H, W] as [B, -1, dim]: unflatten the channels into (types, dim), move dim to the "
        "end, then flatten (fastcaps.PrimaryCapsules does)",
    )  # fmt: skip


def _places(pose: Tensor, maps: list[Tensor]) -> int:
    """From how many places of the first sample's feature maps ``[B, C, H, W]`` a pose is made."""
    grads = torch.autograd.grad(pose.pow(2).sum(), maps, retain_graph=True, allow_unused=True)
    touched = sum(g[0].ne(0).any(0).long() for g in grads if g is not None)
    return int((torch.as_tensor(touched) > 0).sum())


def zero_capsules(calls: list[Call]) -> Iterator[Finding]:
    """Zero inputs and zero parameters: the innermost modules that give NaN, forward or backward."""
    bad: dict[str, str] = {}
    tried = set()
    for call in sorted(calls, key=lambda call: -call.path.count(".") - bool(call.path)):
        if is_torch(call.module) or call.module in tried or any(is_inside(path, call.path) for path in bad):
            continue
        tried.add(call.module)
        mistake = _mistake_at_zero(call)
        if mistake is not None:
            bad[call.path] = mistake
    for path, text in bad.items():
        yield Finding(
            ZERO_CAPSULES, path, WRONG, f"with zero inputs and parameters {text}",
            "compute squash as s * n / (1 + n^2), and n without the infinite slope of sqrt at 0 (fastcaps.squash does)",
        )  # fmt: skip
    if not bad:
        yield Finding(ZERO_CAPSULES, "", FINE, "with zero inputs and parameters all outputs and gradients are finite")


def _mistake_at_zero(call: Call) -> str | None:
    """Where a module gives NaN for zero inputs and parameters, in words; None where it does not."""
    module = _scaled_copy(call.module, 0.0)
    arguments = map_floating(lambda t: torch.zeros_like(t).requires_grad_(), (call.args, call.kwargs))
    args, kwargs = arguments
    try:
        y = [t for t in floating_tensors(module(*args, **kwargs)) if t.requires_grad]
        if not all(t.isfinite().all() for t in y):
            return "the output is NaN"
        leaves = [*floating_tensors(arguments), *module.parameters()]
        grads = torch.autograd.grad([t.sum() for t in y], leaves, allow_unused=True) if y else ()
    except Exception:  # a module that cannot run on zeros alone tells nothing
        return None
    finite = all(g.isfinite().all() for g in grads if g is not None)
    return None if finite else "the output is finite, the gradient is NaN"


def _train(model: nn.Module, run: Run, labels: Tensor) -> list[float]:
    """The margin loss before each step of Adam, and after the last."""
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    losses = []
    for _ in range(STEPS + 1):
        now = class_lengths(model(*run.args, **run.kwargs), run.B)
        if now is None or not now[0].requires_grad:
            raise ValueError("in training its output is another one, or carries no gradient")
        loss = margin_loss(now[0], labels)
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return losses


def initialisation(run: Run) -> Finding:
    """Are all output capsules saturated or silent, and does a short training on the sample lower the margin loss?"""
    found = class_lengths(run.output, run.B)
    if found is None:
        return Finding(INITIALISATION, "", UNKNOWN, "no output [B, J, D_out] or [B, J] was found")
    if not found[0].isfinite().all():
        return Finding(INITIALISATION, "", UNKNOWN, "the model's output is not finite")
    if not any(p.requires_grad for p in run.model.parameters()):
        return Finding(INITIALISATION, "", UNKNOWN, "no parameter requires a gradient")
    lengths = found[0].detach()
    labels = torch.arange(run.B, device=lengths.device) % lengths.shape[1]
    try:
        losses = _train(full_copy(run.model).train(), run, labels)
    except Exception as error:  # in training it may want labels, or keep a graph from step to step
        return Finding(INITIALISATION, "", UNKNOWN, f"it does not train on the sample alone: {_text(error)}")
    text = (
        f"lengths {lengths.min():.2g} to {lengths.max():.2g}, mean {lengths.mean():.2g}; {STEPS} steps of Adam on the "
        f"sample take the margin loss from {losses[0]:.3g} to {losses[-1]:.3g}"
    )
    if lengths.max() < SILENT:
        fix = "learn a bias [J, D_out] of norm 1/3: alone it gives each capsule length 0.1, however many there are"
    else:
        fix = "initialise the matrices with a deviation of sqrt(J / (I D_out)) at most, and check the squash"
    if not losses[-1] <= (1 - TRAINS) * losses[0]:
        return Finding(INITIALISATION, "", WRONG, text, fix)
    if lengths.min() > SATURATED:
        return Finding(INITIALISATION, "", SUSPICIOUS, f"all output capsules are saturated: {text}", fix)
    return Finding(INITIALISATION, "", FINE, text)
