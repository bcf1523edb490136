"""Cases of a comparison: a copy of a layer at three scales of its weights, and poses for it.

With small weights the coupling is nearly uniform, and one iteration and three, or a full and a detached gradient,
cannot be told apart; with large ones an epsilon in squash cannot be seen. So every comparison is made at the model's
weights, at weights so large that routing decides, and at weights so small that an epsilon counts. A layer that is given
the votes has no weights: then the votes are scaled.
"""

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum

import torch
from torch import Tensor, nn

from fastcaps.convert.converted import Plan
from fastcaps.convert.modules import detached_copy
from fastcaps.convert.recipes import get_path, set_path

DECISIVE = 0.7  # of log J: below this entropy of the coupling, routing decides
SHORT = 1e-4  # |s| at which an epsilon of 1e-16 still changes squash by more than the limit of 1e-9
ENLARGEMENTS, FACTOR = 64, 1.5  # how often, and by what, weights are enlarged until routing decides
REDUCTIONS = 4  # how often weights are scaled until |s| is about SHORT: once is enough where s is linear in them
SAMPLES = 4  # of those that the model is called with


class Weights(Enum):
    """The scale of the weights; the value is what a message says."""

    MODEL = "the model's weights"
    DECISIVE = "weights that make routing decide"
    SHORT = "weights that make capsules short"


@dataclass(frozen=True)
class Case:
    """One comparison.

    Attributes:
        source: where the poses are from, in words.
        weights: the scale of the weights.
        layer: a copy of the old layer: the same object in all cases, with the weights of this one until the next.
        poses: as the layer takes them.
        num_iterations: T.
    """

    source: str
    weights: Weights
    layer: nn.Module
    poses: Tensor
    num_iterations: int

    @property
    def name(self) -> str:
        """The poses and the weights in words."""
        return f"{self.source}, {self.weights.value}"


def cases(layer: nn.Module, plan: Plan, poses: Tensor, num_iterations: int, dtype: torch.dtype) -> Iterator[Case]:
    """Two batches of poses, each at three scales of the weights; in training and in evaluation, which may differ.

    All are made of one copy of the layer: a case holds until the next one is asked for.
    """
    generator, model = torch.Generator().manual_seed(0), detached_copy(layer, dtype)
    for source, given in batches(layer, plan, poses.detach(), generator).items():
        if not given.numel():
            continue
        given = given.to(dtype)
        for weights in (Weights.DECISIVE, Weights.SHORT, Weights.MODEL):
            _restore(model, layer, plan)
            T = _route_twice(model, plan, num_iterations) if weights is Weights.DECISIVE else num_iterations
            scaled = _rescaled(model, plan, given, T, weights, generator)
            if scaled is not None:
                yield Case(source, weights, model.train(), scaled, T)
                yield Case(source, weights, model.eval(), scaled, T)


def batches(layer: nn.Module, plan: Plan, poses: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
    """The first samples and random ones, as the layer takes them, by where they are from."""
    sizes, x = plan.sizes(layer, poses), plan.canonical(layer, poses)
    weight = plan.tensors(layer, poses)["weight"]
    taken = {min(len(x), SAMPLES), *x.shape[1:], *([] if weight is None else weight.shape)}
    B = next(n for n in itertools.count(3) if n not in taken)  # two axes of one size, or two batches, could be confused

    def random(like: Tensor) -> Tensor:
        values = torch.randn(B, *like.shape[1:], generator=generator, dtype=torch.float64)
        return values.to(like) * _size(like)

    if callable(plan.recipe.input):
        return {"the sample": poses[:SAMPLES], "random poses": random(poses)}
    axes = plan.axes["input"]
    return {"the sample": axes.arranged(x[:SAMPLES], sizes), "random poses": axes.arranged(random(x), sizes)}


def _size(x: Tensor) -> float:
    """The root mean square of the entries; 1 where that is no scale."""
    size = x.double().pow(2).mean().sqrt().item()
    return size if 0 < size < math.inf else 1.0


@torch.no_grad()
def _restore(model: nn.Module, layer: nn.Module, plan: Plan) -> None:
    """Give a copy of a layer its weights and its T back."""
    for ours, theirs in zip(model.parameters(), layer.parameters(), strict=True):
        ours.copy_(theirs)
    if isinstance(plan.recipe.num_iterations, str) and plan.iterations_argument is None:
        set_path(model, plan.recipe.num_iterations, get_path(layer, plan.recipe.num_iterations))


def _route_twice(layer: nn.Module, plan: Plan, num_iterations: int) -> int:
    """Let a layer whose T may change later route twice at least: one iteration does not tell what a second does."""
    path, T = plan.recipe.num_iterations, max(num_iterations, 2)
    if not isinstance(path, str):
        return num_iterations
    if plan.iterations_argument is None:
        set_path(layer, path, T - plan.recipe.offset)
    return T


@torch.no_grad()
def _rescaled(
    layer: nn.Module, plan: Plan, poses: Tensor, num_iterations: int, weights: Weights, generator: torch.Generator
) -> Tensor | None:
    """Scale the weights until the coupling is decided, or until |s| is about :data:`SHORT`.

    Returns:
        The poses, which are scaled instead where there are no weights; None if it did not work.
    """
    if weights is Weights.MODEL:
        return poses
    if weights is Weights.DECISIVE:
        return _make_decisive(layer, plan, poses, max(num_iterations, 2), generator)
    return _make_short(layer, plan, poses, num_iterations)


def _make_decisive(
    layer: nn.Module, plan: Plan, poses: Tensor, num_iterations: int, generator: torch.Generator
) -> Tensor | None:
    """Enlarge the weight until the coupling's entropy is low."""
    for path in (plan.recipe.prior, plan.recipe.bias):
        if path is not None:  # what is still at its initial value would hide a mistake
            parameter = get_path(layer, path)
            parameter += torch.randn(parameter.shape, generator=generator, dtype=torch.float64).to(parameter)
    axis = -1 if plan.recipe.softmax == "outputs" else 1
    for _ in range(ENLARGEMENTS):
        c = plan.plain(layer, poses, num_iterations).coupling
        most = math.log(c.shape[axis]) if c.shape[axis] > 1 else math.inf
        entropy = torch.special.entr(c).sum(axis).mean().item()
        if not math.isfinite(entropy):
            return None
        if entropy < DECISIVE * most:
            return poses
        poses = _scaled(layer, plan, poses, FACTOR)
    return None


def _make_short(layer: nn.Module, plan: Plan, poses: Tensor, num_iterations: int) -> Tensor | None:
    """Scale weight and bias until the median of ``|s|`` is :data:`SHORT`, within a factor of 2."""
    power, last = 1.0, (1.0, math.nan)  # s may be quadratic, say, in what a function makes the weight of
    for _ in range(REDUCTIONS):
        length = plan.plain(layer, poses, num_iterations).sums.norm(dim=-1).median().item()
        if not 0 < length < math.inf:
            return None
        if SHORT / 2 < length < 2 * SHORT:
            return poses
        if last[0] != 1:
            power = math.log(length / last[1]) / math.log(last[0])
        if not 0.5 < power < 10:
            return None
        last = ((SHORT / length) ** (1 / power), length)
        poses = _scaled(layer, plan, poses, last[0])
        if plan.recipe.bias is not None:
            get_path(layer, plan.recipe.bias).mul_(last[0])
    return None


def _scaled(layer: nn.Module, plan: Plan, poses: Tensor, factor: float) -> Tensor:
    """Scale what the votes are linear in: the weight in place, or the poses where there is none, which are returned."""
    recipe = plan.recipe
    if recipe.weight is None:
        return poses * factor
    for name, parameter in layer.named_parameters():
        others = name in (recipe.prior, recipe.bias) or recipe.is_unused(name)
        if name == recipe.weight or (callable(recipe.weight) and not others):
            parameter.mul_(factor)
    return poses
