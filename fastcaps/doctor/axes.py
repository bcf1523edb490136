"""Which axis is which: found by experiment, as sizes say nothing where two axes have the same.

A coupling is altered in one place, and the output shows what that place stands for. If one output capsule changes
alone, it is an axis of output capsules; if all change, of input capsules; if one sample does, of the batch. If an entry
of each pose changes and the others are rescaled with it, squash takes the norm along that axis. An input capsule whose
coupling is closed has no influence: the entries without a gradient are its pose.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from fastcaps.convert import ConvertedCapsules
from fastcaps.convert.converted import restore_layer
from fastcaps.convert.modules import detached_copy, floating_tensors, full_copy, map_floating
from fastcaps.doctor.trials import (
    ENTRIES,
    INPUTS,
    OUTPUTS,
    Response,
    Trial,
    Tried,
    changed,
    closed,
    differ,
    follows_outputs,
    is_mask,
    noisy,
    response_to,
    single_axes,
)
from fastcaps.doctor.watch import Call, Run, Softmax, batch_axis, is_torch, routed_by_fastcaps


@dataclass(frozen=True, eq=False)
class Layer:
    """A capsule layer, and which axes of its tensors are what.

    Attributes:
        call: the call.
        output: the position of the output that holds the output capsules.
        capsules: its axis of output capsules; None where several axes may be that.
        poses: where the poses come in, or None where that was not found.
    """

    call: Call
    output: int
    capsules: int | None
    poses: "Poses | None"

    @property
    def number(self) -> int | None:
        """J, or None where the output does not tell."""
        if self.capsules is None:
            return None
        return floating_tensors(self.call.output)[self.output].shape[self.capsules]


@dataclass(frozen=True, eq=False)
class Routing(Layer):
    """A layer that routes, or pays attention.

    Attributes:
        passes: the couplings that had an effect on the output.
        roles: what each axis of the last coupling stands for, of those with more than one entry.
        squashed_together: whether one output capsule rescales all others.
        by_agreement: whether couplings come from outputs of earlier passes, or from nothing that comes in.
        constant_start: whether the first of these couplings depends on nothing that comes in.
        follows_a_sum: whether it comes from outputs of a pass before it, which has no softmax.
        last: the last coupling of a trial, where poses are random.
    """

    passes: list[Softmax]
    roles: dict[int, str]
    squashed_together: bool
    by_agreement: bool
    constant_start: bool
    follows_a_sum: bool
    last: Softmax


@dataclass(frozen=True, eq=False)
class Poses:
    """The call that takes poses, and which axes of its first tensor are what."""

    call: Call
    capsules: tuple[int, ...]
    entries: tuple[int, ...]

    def canonical(self, x: Tensor | None = None) -> Tensor:
        """These poses, or others like them, as ``[B, I, D_in]``."""
        x = self.call.input if x is None else x
        assert x is not None
        rest = [axis for axis in range(x.dim()) if axis not in (*self.capsules, *self.entries)]
        x = x.permute(*rest, *self.capsules, *self.entries)
        return x.flatten(len(rest), len(rest) + len(self.capsules) - 1).flatten(len(rest) + 1).flatten(0, len(rest) - 1)


# ------------------------------------------------------------------------------------------------------------- routings


def find_routings(run: Run) -> list[Routing]:
    """The calls that weigh input capsules for output capsules by softmaxes; of a module called again, the first."""
    found: list[Routing] = []
    explained = {s for call in run.calls if routed_by_fastcaps(call) for s in call.softmaxes}
    innermost_first = sorted(run.calls, key=lambda call: -call.path.count(".") - bool(call.path))
    for call in innermost_first:
        numbers = [n for n, s in enumerate(call.softmaxes) if s not in explained]
        if is_torch(call.module) or not numbers:
            continue
        again = any(call.module is other.call.module for other in found)
        routing = None if again else _routing(run, call, numbers)
        if routing is not None:
            found.append(routing)
        if again or routing is not None:
            explained |= set(call.softmaxes)
    return sorted(found, key=lambda routing: run.calls.index(routing.call))


def _routing(run: Run, call: Call, numbers: list[int]) -> Routing | None:
    """How a call routes by some of its softmaxes, by agreement if one does; None where it does not."""
    found: list[Routing] = []
    try:
        trial = Trial(call)
        before = trial.run()
        if len(before.softmaxes) != len(call.softmaxes) or differ(before.outputs, trial.run().outputs):
            return None
        for loop in _loops(before, numbers, run.B):
            routing = _routing_of_loop(run, trial, before, loop)
            if routing is not None:
                found.append(routing)
    except Exception:  # it cannot run alone, or not on random poses
        pass
    # A gate on the outputs of a loop follows these, too: the loop itself comes first.
    found.sort(key=lambda routing: (not routing.by_agreement, routing.follows_a_sum))
    return found[0] if found else None


def _loops(tried: Tried, numbers: list[int], B: int) -> list[list[int]]:
    """Softmaxes with as many entries, or with that for each sample; the loop that ends last first."""
    loops: dict[int, list[int]] = {}
    for n in numbers:
        c = tried.softmaxes[n].result
        if c.dim() > 1:
            sizes = [c.numel(), c.numel() * B, *([c.numel() // B] if c.numel() % B == 0 else [])]
            entries = next((size for size in sizes if size in loops), c.numel())
            loops.setdefault(entries, []).append(n)
    return sorted(loops.values(), key=lambda loop: -loop[-1])


def _routing_of_loop(run: Run, trial: Trial, before: Tried, loop: list[int]) -> Routing | None:
    """How a call routes by the softmaxes of a loop."""
    passes = [n for n in loop if differ(before.outputs, trial.run(noisy(n)).outputs)]
    if not passes:
        return None
    last, B = before.softmaxes[passes[-1]], run.B
    axes = [axis for axis, size in enumerate(last.result.shape) if size > 1]
    found = {axis: response_to(trial, before, passes[-1], axis, B) for axis in axes}
    responses = {axis: response for axis, response in found.items() if response is not None}
    together = not any(response.axis == OUTPUTS for response in responses.values())
    if together:  # squash over the output capsules: they are what is rescaled
        responses = {a: Response(OUTPUTS, r.places) if r.axis == ENTRIES else r for a, r in responses.items()}
    roles = {axis: response.axis for axis, response in responses.items()}
    outputs = [response for response in responses.values() if response.axis == OUTPUTS]
    if not outputs or INPUTS not in roles.values():
        return None
    # Of several outputs the poses, which have the most axes.
    output = max(outputs[0].places, key=lambda n: before.outputs[n].dim())
    shown = [axis for response in outputs for axis in response.places.get(output, [])]
    constant = torch.equal(before.softmaxes[passes[0]].result, trial.run(seed=2).softmaxes[passes[0]].result)
    linked = not torch.equal(last.result, trial.run(noisy(passes[0])).softmaxes[passes[-1]].result)
    capsules = shown[0] if len(shown) == 1 else None
    follows = False
    if not constant and capsules is not None and before.softmaxes[passes[0]].result.shape == last.result.shape:
        follows = follows_outputs(trial, before, passes[0], roles, output, capsules)
    numbers = [trial.call.softmaxes[n] for n in passes]
    return Routing(
        call=trial.call,
        output=output,
        capsules=capsules,
        poses=_poses(run, trial.call, numbers, roles),
        passes=numbers,
        roles=roles,
        squashed_together=together,
        by_agreement=constant or follows or (linked and len(passes) > 1),
        constant_start=constant,
        follows_a_sum=follows,
        last=last,
    )


# ---------------------------------------------------------------------------------------------------------------- poses


def _poses(run: Run, call: Call, passes: list[Softmax], roles: dict[int, str]) -> Poses | None:
    """Where the poses of a routing come in: of the calls around it the one with the smallest capsules."""
    axes = [axis for axis, role in roles.items() if role == INPUTS]
    sizes = [passes[-1].result.shape[axis] for axis in axes]
    best, smallest = None, None
    for outer in (call, *run.around(call)):
        numbers = {n for n, softmax in enumerate(outer.softmaxes) if softmax in passes}
        try:
            mask = _closed_capsule(Trial(outer), numbers, passes, axes, run.B)
        except Exception:  # it cannot run alone, or takes no gradient
            break
        found = _capsule_axes(mask, outer, run.B) if mask is not None else None
        if mask is None or found is None:
            break
        I = mask.numel() // int(mask.sum())
        if math.prod(sizes) not in (I, run.B * I):  # the batch may be flattened into that axis
            break
        if smallest is None or mask.sum() < smallest:
            best, smallest = found, mask.sum()
    return best


def _closed_capsule(trial: Trial, numbers: set[int], passes: list[Softmax], axes: list[int], B: int) -> Tensor | None:
    """The entries of one sample's poses, ``[1, ...]``, that lose their influence with one input capsule."""
    influence = []
    for alter in (None, closed(numbers, passes[-1], axes)):
        tried = trial.run(alter)
        generator = torch.Generator().manual_seed(0)
        some = [(y * torch.randn(y.shape, generator=generator).to(y)).sum() for y in tried.outputs if y.requires_grad]
        gradient = torch.autograd.grad(torch.stack(some).sum(), tried.poses)[0]
        samples = batch_axis(gradient, B)
        if samples is None:
            return None
        influence.append(gradient.movedim(samples, 0) != 0)
    lost = influence[0] & ~influence[1]
    sample = int(lost.flatten(1).sum(1).argmax())
    return lost[sample : sample + 1]


def _capsule_axes(mask: Tensor, call: Call, B: int) -> Poses | None:
    """The axes of a call's input, if the mask ``[1, ...]`` is one capsule of it."""
    assert call.input is not None
    samples = batch_axis(call.input, B)
    axes = [axis for axis in range(call.input.dim()) if axis != samples]  # of the mask's: 1, 2, ...
    touched = [int(mask[0].movedim(n, 0).flatten(1).any(1).sum()) for n in range(len(axes))] if len(axes) > 1 else []
    if not mask.any() or int(mask.sum()) != math.prod(touched):
        return None
    single = [n for n, count in enumerate(touched) if count == 1]
    if any(count not in (1, mask.shape[n + 1]) for n, count in enumerate(touched)):
        return None
    capsules = tuple(axes[n] for n in single if mask.shape[n + 1] > 1)
    return Poses(call, capsules, tuple(axis for axis in axes if axis not in capsules)) if capsules else None


# --------------------------------------------------------------------------------------------------- layers of fastcaps


def layer_of_ours(call: Call) -> Layer:
    """The axes of a layer that fastcaps routes; of a converted one, from its old code."""
    if not isinstance(call.module, ConvertedCapsules):
        return Layer(call, 0, 1, Poses(call, (1,), (2,)))
    old = detached_copy(call.module)
    restore_layer(old)
    try:
        run = Run.of(old, call.args, call.kwargs)
    except Exception:  # it cannot run alone
        return Layer(call, 0, None, None)
    routing = next(iter(find_routings(run)), None)
    if routing is None:
        return Layer(call, 0, None, None)
    shown = class_capsules(run, routing)  # a module inside may have routed
    poses = routing.poses if routing.poses and routing.poses.call is run.calls[0] else None
    return Layer(
        call,
        shown.output if shown else 0,
        shown.classes if shown else None,
        replace(poses, call=call) if poses else None,
    )


# ------------------------------------------------------------------------------------------------------- class capsules


@dataclass(frozen=True)
class ClassCapsules:
    """Where a model's output holds the class capsules, or their lengths.

    Attributes:
        output: the position among its floating-point tensors.
        samples: the axis of the batch.
        classes: the axis of the classes.
    """

    output: int
    samples: int
    classes: int

    def lengths(self, output: Any) -> Tensor:
        """Their lengths ``[B, J]``."""
        t = floating_tensors(output)[self.output].movedim((self.samples, self.classes), (0, 1))
        return torch.linalg.vector_norm(t.flatten(2), dim=2) if t[0, 0].numel() > 1 else t.flatten(1)


def class_capsules(run: Run, layer: Layer) -> ClassCapsules | None:
    """Which output of a model shows single capsules of its last layer: one is altered, and it alone changes."""
    J = layer.number
    if layer.capsules is None or J is None:
        return None
    before = floating_tensors(Run.of(full_copy(run.model), run.args, run.kwargs).output)
    candidates: set[ClassCapsules] | None = None
    for place in (0, J - 1):
        model = full_copy(run.model)
        hook = _altered_capsule(layer.output, layer.capsules, place)
        model.get_submodule(layer.call.path).register_forward_hook(hook)
        after = floating_tensors(Run.of(model, run.args, run.kwargs).output)
        found = set(_changed_classes(before, after, place, J, run.B))
        candidates = found if candidates is None else candidates & found
    # The poses rather than their lengths: a model may return both.
    order = sorted(candidates or (), key=lambda c: (-before[c.output].squeeze().dim(), c.output))
    return next(iter(order), None)


def drawn_at_random(run: Run, classes: ClassCapsules) -> bool:
    """Whether the class capsules depend on random numbers, so that none stands for a class."""
    lengths = [classes.lengths(Run.of(full_copy(run.model), run.args, run.kwargs, seed).output) for seed in (0, 1)]
    return not torch.equal(*lengths)


def _altered_capsule(output: int, axis: int, place: int) -> Callable[..., Any]:
    """A hook that puts something else into the place of one output capsule."""

    def hook(module: nn.Module, args: Any, value: Any) -> Any:
        position = -1

        def alter(t: Tensor) -> Tensor:
            nonlocal position
            position += 1
            if position != output:
                return t
            t = t.clone()
            capsule = t.select(axis, place)
            capsule.add_(torch.rand(capsule.shape, generator=torch.Generator().manual_seed(0)).to(t))
            return t

        return map_floating(alter, value)

    return hook


def _changed_classes(before: list[Tensor], after: list[Tensor], place: int, J: int, B: int) -> Iterator[ClassCapsules]:
    """The outputs that changed in one place of one axis."""
    for n, (a, b) in enumerate(zip(before, after, strict=True)):
        samples = batch_axis(a, B)
        if a.shape != b.shape or samples is None or (is_mask(a) and is_mask(b)):
            continue
        where = changed(a, b)
        for axis in single_axes(where):
            if axis != samples and a.shape[axis] == J and bool(where.select(axis, place).any()):
                yield ClassCapsules(n, samples, axis)
