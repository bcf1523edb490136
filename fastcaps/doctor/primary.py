"""The checks of the poses that come into the first capsule layer: their squash, and the places they were made from."""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from fastcaps.convert.modules import full_copy
from fastcaps.doctor.axes import Layer, Poses
from fastcaps.doctor.finding import FINE, INPUT_SQUASH, SCRAMBLING, SUSPICIOUS, UNKNOWN, WRONG, Finding
from fastcaps.doctor.trials import unit_lengths
from fastcaps.doctor.watch import Call, Run, batch_axis, is_inside

LARGER = 1e4  # factor of the weights after which squash gives length 1
LONGEST = 1.01  # length of what was squashed, with rounding
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def primary_capsules(run: Run, layer: Layer) -> Iterator[Finding]:
    """What comes into the first capsule layer: over which axis was it squashed, and from which places was it made?"""
    poses, where = layer.poses, layer.call.path
    if poses is None:
        text = "it was not found which entries of its input belong to one capsule"
        yield from (Finding(check, where, UNKNOWN, text) for check in (INPUT_SQUASH, SCRAMBLING))
        return
    squash = input_squash(run, poses)
    yield squash
    if squash.verdict == WRONG:  # it mixes all places by itself
        yield Finding(SCRAMBLING, poses.call.path, UNKNOWN, "the squash of its poses mixes them all")
    else:
        yield scrambling(run, poses)


def _makers(run: Run, layer: Call, kinds: tuple[type[nn.Module], ...]) -> list[Call]:
    """The last call of one of these modules before a layer, and those with the same input."""
    before = run.calls[: run.calls.index(layer)]
    calls = [call for call in before if isinstance(call.module, kinds) and not is_inside(call.path, layer.path)]
    return [call for call in calls if call.input is calls[-1].input]


@torch.no_grad()
def input_squash(run: Run, poses: Poses) -> Finding:
    """The weights of what makes the poses are made large: along which axis have they length 1?"""
    where = poses.call.path
    paths = [call.path for call in _makers(run, poses.call, (*CONVOLUTIONS, nn.Linear))]
    if not paths:
        return Finding(INPUT_SQUASH, where, UNKNOWN, "no convolution or linear layer leads to its poses")
    model = full_copy(run.model)
    for path in paths:
        for parameter in model.get_submodule(path).parameters():
            parameter.mul_(LARGER)
    x = next(call.input for call in Run.of(model, run.args, run.kwargs).calls if call.path == where)
    assert x is not None
    if not x.isfinite().all():
        text = "its poses are not finite where the layer that makes them has large weights"
        return Finding(INPUT_SQUASH, where, UNKNOWN, text)
    canonical = poses.canonical(x)
    lengths = torch.linalg.vector_norm(canonical, dim=2)
    right = {canonical.shape[2]: lengths}  # or over one of several axes: those of a map of poses
    right |= {x.shape[axis]: torch.linalg.vector_norm(x, dim=axis) for axis in poses.entries}
    for entries, norms in right.items():
        if entries > 1 and unit_lengths(norms):
            return Finding(INPUT_SQUASH, where, FINE, f"large poses get length 1 over their {entries} entries")
    over = [(axis, "the samples") for axis in (batch_axis(x, run.B),) if axis is not None]
    over += [(axis, f"{x.shape[axis]} capsules") for axis in poses.capsules]
    others = {what: torch.linalg.vector_norm(x, dim=axis) for axis, what in over}
    others[f"all {canonical.shape[1]} capsules"] = torch.linalg.vector_norm(canonical, dim=1)
    wrong = [what for what, norms in others.items() if unit_lengths(norms)]
    if wrong:
        return Finding(
            INPUT_SQUASH, where, WRONG, f"large poses get length 1 over {wrong[0]} instead of over their entries",
            "squash the primary capsules over the entries of a pose",
        )  # fmt: skip
    if lengths.max() <= LONGEST:
        text = f"poses stay below {lengths.max():.2g}, however large the weights of {paths[-1]} are"
        return Finding(INPUT_SQUASH, where, UNKNOWN, text)
    text = f"poses that should be squashed reach lengths of {lengths.max():.2g}"
    return Finding(INPUT_SQUASH, where, SUSPICIOUS, text, "squash the primary capsules")


def scrambling(run: Run, poses: Poses) -> Finding:
    """From how many places of the feature map is one capsule made?"""
    where, x = poses.call.path, poses.call.input
    convolutions = _makers(run, poses.call, (nn.Conv2d,))
    maps = [c.output for c in convolutions if isinstance(c.output, Tensor) and c.output.requires_grad]
    if x is None or x.grad_fn is None or not maps:
        return Finding(SCRAMBLING, where, UNKNOWN, "no convolution leads to its poses, or no gradient")
    if not x.isfinite().all():
        return Finding(SCRAMBLING, where, UNKNOWN, "its poses are not finite")
    if batch_axis(x, run.B) != 0:
        return Finding(SCRAMBLING, where, UNKNOWN, "the batch is not on the first axis of its poses")
    if sum(x.shape[axis] > 1 for axis in poses.entries) > 1:
        return Finding(SCRAMBLING, where, UNKNOWN, "a capsule of its input has several axes, as a map of poses has")
    capsules = poses.canonical()  # [B, I, D_in]
    most = max(_places(capsules[0, i], maps) for i in {0, capsules.shape[1] // 2, capsules.shape[1] - 1})
    H, W = maps[0].shape[2:]
    if most == 0:
        return Finding(SCRAMBLING, where, UNKNOWN, "its poses do not depend on the last convolution before it")
    if most == 1:
        return Finding(SCRAMBLING, where, FINE, "each capsule is made from one place of the feature map")
    text = f"one capsule is made from {most} places of the {H} x {W} feature map"
    if most > capsules.shape[2]:  # a view gives a pose of D_in entries at most D_in places
        return Finding(SCRAMBLING, where, UNKNOWN, f"{text}: something between mixes them, as attention does")
    fix = (
        "do not view [B, types * dim, H, W] as [B, -1, dim]: unflatten the channels into (types, dim), move dim to the "
        "end, then flatten (fastcaps.PrimaryCapsules does)"
    )
    return Finding(SCRAMBLING, where, SUSPICIOUS if most == H * W else WRONG, text, fix)


def _places(pose: Tensor, maps: list[Tensor]) -> int:
    """From how many places of the first sample's feature maps ``[B, C, H, W]`` a pose is made."""
    grads = torch.autograd.grad(pose.pow(2).sum(), maps, retain_graph=True, allow_unused=True)
    touched = sum(g[0].ne(0).any(0).long() for g in grads if g is not None)
    return int((torch.as_tensor(touched) > 0).sum())
