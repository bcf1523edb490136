"""Calls made again and again: what a place of a coupling stands for is seen in what changes when it is altered."""

import copy
import itertools
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fastcaps.convert.modules import detached_copy, floating_tensors, map_floating, seed_generators
from fastcaps.doctor.watch import Alteration, Call, RecordedSoftmaxes, Softmax, batch_axis

SIZE = 0.1  # root mean square of parameters at most, and of what is added to them
UNCHANGED = {torch.float64: 1e-8, torch.float32: 1e-4}  # relative to the largest entry; other dtypes: 1e-2
MOVED = 10.0  # what is added to an entry of random poses
SAME_DIRECTION = 1e-4  # of vectors, up to which one is a multiple of the other

BATCH, INPUTS, OUTPUTS, ENTRIES = "batch", "input capsules", "output capsules", "entries of a pose"


@dataclass(frozen=True, eq=False)
class Tried:
    """What a trial gave: the poses it was given, the floating-point outputs, and the softmaxes."""

    poses: Tensor
    outputs: list[Tensor]
    softmaxes: list[Softmax]


class Trial:
    """A call, made again and again: each time from the same state, with the same parameters, poses and random numbers.

    The poses are random and the parameters noisy: with zeros, or with saturated capsules, nothing depends on anything.
    """

    def __init__(self, call: Call) -> None:
        seed_generators(0)
        self.call, self.module = call, detached_copy(call.module)
        with torch.no_grad():
            for parameter in self.module.parameters():
                size = parameter.nan_to_num_().pow(2).mean().sqrt()
                parameter.mul_(SIZE / size.clamp(min=SIZE)).add_(SIZE * torch.randn_like(parameter))

    def run(self, alter: Alteration | None = None, seed: int = 1, moved: float = 0.0) -> Tried:
        """Make the call.

        Args:
            alter: what the softmaxes shall give instead.
            seed: of the poses; all other random numbers are the same for every seed.
            moved: what is added to one entry of the poses.
        """
        given: list[Tensor] = []

        def random_poses(t: Tensor) -> Tensor:
            if not given:
                generator = torch.Generator().manual_seed(seed)
                poses = torch.randn(t.shape, generator=generator).to(t)
                poses.view(-1)[poses.numel() // 2] += moved
                given.append(poses.requires_grad_())
                return given[0].clone()  # a leaf could not be changed in place
            return t.detach()

        args, kwargs = map_floating(random_poses, (self.call.args, self.call.kwargs))
        module = copy.deepcopy(self.module, {id(p): p for p in self.module.parameters()})
        seed_generators(0)
        with RecordedSoftmaxes(alter) as watch:
            outputs = floating_tensors(module(*args, **kwargs))
        return Tried(given[0], outputs, watch.softmaxes)


@dataclass(frozen=True)
class Response:
    """How outputs respond to one place of a coupling's axis.

    Attributes:
        axis: what the axis stands for: ``BATCH``, ``INPUTS``, ``OUTPUTS`` or ``ENTRIES``.
        places: for ``OUTPUTS`` and ``ENTRIES`` the axes of each output that show it, by the output's position.
    """

    axis: str
    places: dict[int, list[int]]


def noisy(number: int) -> Alteration:
    """One softmax gives something else."""
    factors = torch.Generator().manual_seed(0)

    def alter(n: int, softmax: Softmax) -> Tensor:
        c = softmax.result
        return c * (0.5 + torch.rand(c.shape, generator=factors).to(c)) if n == number else c

    return alter


def _scaled(number: int, axis: int, place: int, factor: float) -> Alteration:
    """One softmax gives more, or less, at one place of an axis."""

    def alter(n: int, softmax: Softmax) -> Tensor:
        c = softmax.result.clone()
        if n == number:
            c.select(axis, place).mul_(factor)
        return c

    return alter


def closed(numbers: set[int], last: Softmax, axes: list[int]) -> Alteration:
    """Some softmaxes give 0 at the middle of some axes of the last of them; others may lack or have the batch."""
    where = torch.zeros_like(last.result, dtype=torch.bool)
    where[tuple(size // 2 if axis in axes else slice(None) for axis, size in enumerate(where.shape))] = True

    def alter(n: int, softmax: Softmax) -> Tensor:
        c = softmax.result
        if n not in numbers:
            return c
        samples = where.reshape(-1, min(c.numel(), where.numel()))
        here = samples.expand(c.numel() // samples.numel(), -1) if c.numel() > where.numel() else samples.any(0)
        return c.masked_fill(here.reshape(c.shape), 0)

    return alter


def differ(before: list[Tensor], after: list[Tensor]) -> bool:
    """Whether some outputs are not the same to the bit."""
    return any(not torch.equal(a, b) for a, b in zip(before, after, strict=True))


def response_to(trial: Trial, before: Tried, number: int, axis: int, B: int) -> Response | None:
    """How the outputs respond to one place of a softmax's axis; None where they do not."""
    coupling = before.softmaxes[number].result
    size = coupling.shape[axis]
    # As much as at all places together; or hardly anything, as more changes nothing where squash is saturated. And a
    # capsule may be without any effect.
    for place, factor in itertools.product(dict.fromkeys((size // 2, 0, size - 1)), (size, 1 / size)):
        outputs = trial.run(_scaled(number, axis, place, factor)).outputs
        alone: dict[int, list[int]] = {}
        rescaled: dict[int, list[int]] = {}
        some = False
        for n, (a, b) in enumerate(zip(before.outputs, outputs, strict=True)):
            where = changed(a, b)
            if not where.any() or _same_entries(a, coupling):
                continue
            some = True
            single, samples = single_axes(where), batch_axis(a, B)
            along = [x for x in range(a.dim()) if a.shape[x] == size and _rescales(a, b, x, place, factor)]
            if single == [samples] or samples in along:
                # One place of an axis into which others are flattened with the batch stands for these.
                return Response(BATCH if size == B else INPUTS, {})
            alone |= {n: [x for x in single if x != samples]} if single else {}
            rescaled |= {n: along[:1]} if along else {}
        if some:
            return Response(OUTPUTS, alone) if alone else Response(ENTRIES if rescaled else INPUTS, rescaled)
    return None


def follows_outputs(trial: Trial, before: Tried, number: int, roles: dict[int, str], output: int, axis: int) -> bool:
    """Whether the logits of a softmax are agreements with outputs of an earlier pass, which need have no softmax.

    One entry of the poses is moved. With all couplings held, some output capsules move. If logits are agreements with
    these, they move too, for all input capsules; those of attention do for one input capsule, or for one query.

    Args:
        trial: the call.
        before: what it gave.
        number: of the softmax.
        roles: what the axes of its result stand for.
        output: the position of the output that holds the output capsules.
        axis: its axis of output capsules.
    """
    after, held = trial.run(moved=MOVED), trial.run(lambda n, _: before.softmaxes[n].result, moved=MOVED)
    was, now = before.softmaxes[number], after.softmaxes[number]
    change = (now.result.double().log() - was.result.double().log()).nan_to_num(0.0, 0.0, 0.0)
    change = change - change.median(was.axis, keepdim=True)[0]  # what its sum changes is no change of a logit
    where = change.abs() > UNCHANGED.get(was.result.dtype, 1e-2) * change.abs().max()
    kept = [x for role in (OUTPUTS, INPUTS) for x in roles if roles[x] == role]
    where = where.permute(*kept, *(x for x in range(where.dim()) if x not in kept)).flatten(len(kept)).any(-1)
    several = where.flatten(1).sum(1) > 1
    moved = changed(before.outputs[output], held.outputs[output]).movedim(axis, 0).flatten(1).any(1)
    return bool(moved.any()) and bool(several[moved].all())


def changed(a: Tensor, b: Tensor) -> Tensor:
    """Where two outputs differ by more than rounding."""
    if a.shape != b.shape or not a.numel():
        return torch.ones(1, dtype=torch.bool)
    size = a.detach().abs().nan_to_num(0.0, 0.0, 0.0).max()
    change = (a - b).detach().abs().nan_to_num(torch.inf)
    change = change.where(change > UNCHANGED.get(a.dtype, 1e-2) * size, 0.0)
    return change > UNCHANGED.get(a.dtype, 1e-2) * change.max().clamp(max=size)


def _same_entries(a: Tensor, b: Tensor) -> bool:
    """Whether an output is the coupling itself, in whatever order."""
    return a.numel() == b.numel() and torch.equal(a.detach().flatten().sort()[0], b.flatten().sort()[0].to(a.dtype))


def single_axes(mask: Tensor) -> list[int]:
    """The axes along which a mask is true in one place only."""
    others = [[x for x in range(mask.dim()) if x != axis] for axis in range(mask.dim())]
    touched = [int((mask.amax(rest) if rest else mask).sum()) for rest in others]
    return [axis for axis, count in enumerate(touched) if count == 1 and mask.shape[axis] > 1]


def _rescales(a: Tensor, b: Tensor, axis: int, place: int, factor: float) -> bool:
    """Whether one entry of the vectors along an axis was multiplied, and then these got another length."""
    scaled = a.detach().clone()
    scaled.select(axis, place).mul_(factor)
    cosine = nn.functional.cosine_similarity(scaled.double(), b.detach().double(), dim=axis)
    return bool(((1 - cosine).abs() < SAME_DIRECTION).all())


def scaled_copy(module: nn.Module, factor: float) -> nn.Module:
    """A copy whose parameters are multiplied by a factor."""
    copied = detached_copy(module)
    with torch.no_grad():
        for parameter in copied.parameters():
            parameter.nan_to_num_().mul_(factor)  # 0 * NaN is NaN
    return copied


def is_mask(t: Tensor) -> bool:
    """Whether all entries are 0 or 1, as in one-hot labels."""
    return bool(((t == 0) | (t == 1)).all())


def unit_lengths(lengths: Tensor) -> bool:
    """Whether these are lengths of squashed large vectors: none above 1, most of those that are not 0 near it."""
    there = lengths[lengths > 1e-3 * lengths.max()].float()
    return bool(there.numel()) and bool(there.max() < 1.01) and bool(there.median() > 0.98)
