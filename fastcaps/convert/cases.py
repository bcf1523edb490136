"""Cases of a comparison: copies of a layer at three scales of its weights, and poses for them.

With small weights the coupling is nearly uniform, and one iteration and three, or a full and a detached gradient,
cannot be told apart; with large ones an epsilon in squash cannot be seen. So every comparison is made at the model's
weights, at weights so large that routing decides, and at weights so small that an epsilon counts.
"""

import copy
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
        layer: a copy of the old layer.
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
    """Two batches of poses, each at three scales of the weights; in training and in evaluation, which may differ."""
    x = plan.axes["input"].canonical(poses.detach(), plan.sizes(layer), "input").to(dtype)
    sample, generator = x[:SAMPLES], torch.Generator().manual_seed(0)
    taken = {len(sample), x.shape[1], *plan.tensors(layer, poses)["weight"].shape}
    B = next(n for n in itertools.count(3) if n not in taken)  # two axes of one size, or two batches, could be confused
    random = torch.randn(B, *x.shape[1:], generator=generator, dtype=torch.float64).to(x) * _size(x)
    for source, few in (("the sample", sample), ("random poses", random)):
        if not few.numel():
            continue
        given = plan.axes["input"].arranged(few)
        for training in (True, False):
            model = detached_copy(layer, dtype).train(training)
            yield Case(source, Weights.MODEL, model, given, num_iterations)
        for weights in (Weights.DECISIVE, Weights.SHORT):
            scaled, T = detached_copy(layer, dtype), num_iterations
            if weights is Weights.DECISIVE:
                T = _route_twice(scaled, plan, T)
            if _rescale(scaled, plan, given, T, weights, generator):
                yield Case(source, weights, scaled.train(), given, T)
                yield Case(source, weights, copy.deepcopy(scaled).eval(), given, T)


def _size(x: Tensor) -> float:
    """The root mean square of the entries; 1 where that is no scale."""
    size = x.double().pow(2).mean().sqrt().item()
    return size if 0 < size < math.inf else 1.0


def _route_twice(layer: nn.Module, plan: Plan, num_iterations: int) -> int:
    """Let a layer whose T may change later route twice at least: one iteration does not tell what a second does."""
    path, T = plan.recipe.num_iterations, max(num_iterations, 2)
    if isinstance(path, int):
        return num_iterations
    if plan.iterations_argument is None:
        set_path(layer, path, T - plan.recipe.offset)
    return T


@torch.no_grad()
def _rescale(
    layer: nn.Module, plan: Plan, poses: Tensor, num_iterations: int, weights: Weights, generator: torch.Generator
) -> bool:
    """Scale the weights until the coupling is decided, or until |s| is about :data:`SHORT`; whether that worked."""
    if weights is Weights.DECISIVE:
        return _make_decisive(layer, plan, poses, max(num_iterations, 2), generator)
    length = plan.plain(layer, poses, num_iterations).sums.norm(dim=-1).median().item()
    if not 0 < length < math.inf:
        return False
    for path in (plan.recipe.weight, plan.recipe.bias):
        if path is not None:
            get_path(layer, path).mul_(SHORT / length)
    return True


def _make_decisive(
    layer: nn.Module, plan: Plan, poses: Tensor, num_iterations: int, generator: torch.Generator
) -> bool:
    """Enlarge the weight until the coupling's entropy is low; whether that worked."""
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
            return False
        if entropy < DECISIVE * most:
            return True
        get_path(layer, plan.recipe.weight).mul_(FACTOR)
    return False
