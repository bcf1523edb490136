"""Verification of a conversion: old layer, new layer and recipe side by side, forward and backward."""

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from fastcaps.convert.cases import Case, Weights, cases
from fastcaps.convert.contents import contents, differences
from fastcaps.convert.converted import Plan
from fastcaps.convert.diagnosis import Observation, diagnose
from fastcaps.convert.modules import detached_copy, map_floating
from fastcaps.convert.recipes import Recipe
from fastcaps.convert.results import LIMIT, Difference, Errors, Result

__all__ = ["LIMIT", "Verdict", "verify"]

NORM_EPS_LIMIT = 1e-5  # what leaving norm_eps out may change
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")

Call = Callable[[Case, Tensor], Any]


@dataclass(frozen=True)
class Verdict:
    """What :func:`verify` found.

    Attributes:
        refused: why the layer must not be replaced, or None.
        output: largest relative L2 difference of the outputs, old against new, at the model's weights.
        gradient: likewise of the gradients of poses and parameters.
        notes: what else there is to know.
    """

    refused: str | None
    output: float = math.nan
    gradient: float = math.nan
    notes: tuple[str, ...] = ()


class _Refusal(Exception):
    """The verdict that ends a verification."""

    def __init__(self, verdict: Verdict) -> None:
        super().__init__(verdict.refused)
        self.verdict = verdict


def _refuse(reason: str, moved: Difference | None = None, notes: Sequence[str] = ()) -> NoReturn:
    raise _Refusal(Verdict(reason, *(moved or (math.nan, math.nan)), tuple(notes)))


def verify(
    layer: nn.Module, recipe: Recipe, args: tuple[Any, ...], kwargs: dict[str, Any], wanted: Recipe | None = None
) -> Verdict:
    """Compare a layer with what a recipe makes of it; the layer itself is not touched.

    Args:
        layer: the old layer.
        recipe: the recipe.
        args: positional arguments of one call of the layer.
        kwargs: its keyword arguments.
        wanted: what the new layer computes, where that is meant to be something else; None: what the recipe says.
    """
    try:
        _refuse_what_would_be_lost(layer)
        plan, poses, num_iterations = _bind(layer, recipe, args, kwargs)
        comparison = _prepare(layer, plan, poses, num_iterations, args, kwargs)
        return comparison.compare(wanted or recipe)
    except _Refusal as refusal:
        return refusal.verdict


def _refuse_what_would_be_lost(layer: nn.Module) -> None:
    """Refuse a layer of which something would take no effect any more, once its class is another."""
    if "forward" in vars(layer):
        _refuse("a forward was set on the object itself, which hides that of any class (del layer.forward removes it)")
    hooked = [path for path, module in layer.named_modules() if path and any(vars(module).get(n) for n in HOOKS)]
    if hooked:
        _refuse(f"{', '.join(hooked)} has hooks, and a converted layer would not call it")


def _bind(layer: nn.Module, recipe: Recipe, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Plan, Tensor, int]:
    """The recipe bound to the layer, the poses and T of its call."""
    try:
        plan = Plan.of(recipe, layer)
        poses, num_iterations = plan.bind(layer, args, kwargs)
        plan.tensors(layer, poses)
    except (TypeError, ValueError, AttributeError, RuntimeError) as error:
        _refuse(f"the recipe does not fit: {error}")
    if num_iterations < 1:
        _refuse(f"it routes {num_iterations} times")
    return plan, poses, num_iterations


def _prepare(
    layer: nn.Module,
    plan: Plan,
    poses: Tensor,
    num_iterations: int,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> "_Comparison":
    """The comparison in float64, or in float32 where the old layer cannot run in float64."""
    for dtype in (torch.float64, torch.float32):
        try:
            call = _old_call(plan, args, kwargs, dtype)
            found = list(cases(layer, plan, poses, num_iterations, dtype))
            first = found[0].poses.clone()
            call(found[0], first)
        except Exception as error:
            failed = f"the old layer cannot run alone: {type(error).__name__}: {error}"
            continue
        if first._version:
            _refuse("its forward changes its input in place, which a converted layer would not")
        return _Comparison(plan, call, found, dtype)
    _refuse(failed)


def _old_call(plan: Plan, args: tuple[Any, ...], kwargs: dict[str, Any], dtype: torch.dtype) -> Call:
    """The old layer of a case, as a function of its poses; with the other arguments that it was called with."""

    def call(case: Case, poses: Tensor) -> Any:
        others = {key: value for key, value in kwargs.items() if key != plan.arguments[0]}
        rest, named = map_floating(lambda tensor: tensor.to(dtype), (args[1:], others))
        given = [poses, *rest]
        if plan.iterations_argument is not None:
            T = case.num_iterations - plan.recipe.offset
            position = plan.arguments.index(plan.iterations_argument)
            if position < len(given):
                given[position] = T
            else:
                named[plan.iterations_argument] = T
        with _default_dtype(dtype):  # many layers make their logits by torch.zeros without a dtype
            return case.layer(*given, **named)

    return call


@contextlib.contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def _new_call(plan: Plan, case: Case, poses: Tensor) -> Any:
    """What a converted layer returns."""
    given: dict[str, Any] = {plan.arguments[0]: poses}
    if plan.iterations_argument is not None:
        given[plan.iterations_argument] = case.num_iterations - plan.recipe.offset
    return plan.forward(case.layer, (), given)


def _expected(recipe: Recipe, case: Case, dtype: torch.dtype = torch.float64) -> Result:
    """What the recipe says, step by step in plain PyTorch: by default in float64 on the same numbers."""
    layer = detached_copy(case.layer, dtype)
    plan = Plan.of(recipe, layer)

    def call(x: Tensor) -> Any:
        routed = plan.plain(layer, x, case.num_iterations)
        out = plan.axes["output"].arranged(routed.poses)
        return (out, plan.axes["coupling"].arranged(routed.coupling)) if "coupling" in plan.axes else out

    return Result.of(call, layer, case.poses.to(dtype))


@dataclass(frozen=True)
class _Outcome:
    """How far a case moves when its layer is replaced.

    Attributes:
        weights: the scale of the weights.
        moved: the new layer from the old one.
        inexact: the new layer from what it should compute, step by step in plain PyTorch.
        left_out: the larger error from leaving norm_eps out, at the model's weights; else 0.
    """

    weights: Weights
    moved: Difference
    inexact: Difference
    left_out: float


@dataclass(frozen=True)
class _Comparison:
    """An old layer at work in all cases, beside what its recipe says."""

    plan: Plan
    old_call: Call
    cases: list[Case]
    dtype: torch.dtype

    def compare(self, wanted: Recipe) -> Verdict:
        """The verdict on replacing the layer by what ``wanted`` says."""
        recipe, drops_norm_eps = self.plan.recipe, bool(wanted.norm_eps) and not wanted.convention.effects
        computed = replace(wanted, norm_eps=0.0) if drops_norm_eps else wanted
        observations, notes = self._observe()
        outcomes = [self._check(one, observations, wanted, computed, notes) for one in observations]
        moved = Difference.largest(outcome.moved for outcome in outcomes if outcome.weights is Weights.MODEL)
        if drops_norm_eps:
            notes.append(f"the {recipe.norm_eps:g} that squash adds to the norm is left out")
            if not all(outcome.left_out <= NORM_EPS_LIMIT for outcome in outcomes):
                reason = f"capsules are so short that the {recipe.norm_eps:g} which squash adds to the norm matters"
                _refuse(reason, moved, notes)
        if wanted != recipe:
            text = "the errors of this row are from the old layer; from the paper's routing in plain PyTorch they are"
            inexact = Difference.largest(outcome.inexact for outcome in outcomes)
            notes.append(f"{text} {inexact.output:.0e} and {inexact.gradient:.0e}")
        return Verdict(None, *moved, tuple(notes))

    def _check(
        self,
        observation: Observation,
        observations: list[Observation],
        wanted: Recipe,
        computed: Recipe,
        notes: list[str],
    ) -> "_Outcome":
        """One case: the old layer is what the recipe says, and the new one what ``computed`` says; or refuse."""
        recipe, case, old = self.plan.recipe, observation.case, observation.result
        new = Result.of(partial(_new_call, Plan.of(wanted, case.layer), case), case.layer, case.poses)
        moved, expected = Errors.of(new, old).largest, _expected(recipe, case)
        if not self._close(old, expected, recipe, case):
            reason = diagnose(recipe, self.cases[0].num_iterations, observations, self.dtype, _expected)
            _refuse(reason, moved, notes)
        exact = expected if computed == recipe else _expected(computed, case)
        if not self._close(new, exact, computed, case):
            _refuse(f"fastcaps itself is wrong here ({case.name}): please report this", moved)
        left_out = 0.0
        if computed != wanted and case.weights is Weights.MODEL:
            # Both in float64: in float32, rounding would hide or feign it.
            left_out = max(Errors.of(exact, _expected(wanted, case)).largest)
        return _Outcome(case.weights, moved, Errors.of(new, exact).largest, left_out)

    def _observe(self) -> tuple[list[Observation], list[str]]:
        """What the old layer computes in the cases where it is finite, and notes."""
        in_float64 = self.dtype == torch.float64
        notes = [] if in_float64 else ["compared in float32, as the old layer cannot run in float64"]
        observations = []
        for case in self.cases:
            before = contents(case.layer)
            result = self._old(case)
            changed = differences(before, contents(case.layer))
            if changed:
                _refuse(f"its forward also sets {', '.join(changed)}, which a converted layer would not")
            self._refuse_other_shapes(case, result)
            finite = self._finite_samples(case, result)
            if not finite.all() and case.weights is Weights.MODEL:
                count = f"{int((~finite).sum())} of {len(finite)} samples"
                notes.append(f"{case.name}: the old layer gives NaN or infinity for {count}, which are not compared")
            observation = Observation(case, result) if finite.all() else self._finite_part(case, finite)
            if observation is not None:
                observations.append(observation)
        if not any(observation.case.weights is Weights.DECISIVE for observation in observations):
            _refuse("no weights were found for which the old layer is finite and its routing decides", notes=notes)
        return observations, notes

    def _old(self, case: Case) -> Result:
        return Result.of(partial(self.old_call, case), case.layer, case.poses)

    def _finite_part(self, case: Case, finite: Tensor) -> Observation | None:
        """The same with the finite samples alone; None where there are none, or where samples depend on each other."""
        if self.plan.recipe.logits == "batch" or not finite.any():
            return None
        axes = self.plan.axes["input"]
        rows = axes.canonical(case.poses, self.plan.sizes(case.layer), "input")[finite]
        part = replace(case, poses=axes.arranged(rows))
        result = self._old(part)
        return Observation(part, result) if result.is_finite() else None

    def _refuse_other_shapes(self, case: Case, old: Result) -> None:
        plan, tensors = self.plan, self.plan.tensors(case.layer, case.poses)
        (B, I, _), (J, D_out) = tensors["poses"].shape, tensors["weight"].shape[1:3]
        wanted = {"output": plan.axes["output"].arranged(case.poses.new_empty(B, J, D_out)).shape}
        if "coupling" in plan.axes:
            wanted["coupling"] = plan.axes["coupling"].arranged(case.poses.new_empty(B, I, J)).shape
        got = {name: output.shape for name, output in old.outputs.items()}
        for name in ("output", "coupling"):
            if got.get(name) != wanted.get(name):
                _refuse(
                    f"{name}: the old layer returns {tuple(got.get(name, ())) or 'none'}, the recipe's "
                    f"{tuple(wanted.get(name, ())) or 'none'} (most likely the flag output)"
                )

    def _finite_samples(self, case: Case, old: Result) -> Tensor:
        """``[B]`` bool: the samples whose output and whose gradient of the poses are finite."""
        sizes = self.plan.sizes(case.layer)
        grad = self.plan.axes["input"].canonical(old.gradients[0], sizes, "input")
        out = self.plan.axes["output"].canonical(old.outputs["output"], sizes, "output")
        return grad.isfinite().flatten(1).all(1) & out.isfinite().flatten(1).all(1)

    def _close(self, value: Result, exact: Result, recipe: Recipe, case: Case) -> bool:
        """Whether all errors are within their limits; below float64, about those of plain PyTorch in that dtype."""
        errors = Errors.of(value, exact)
        if self.dtype == torch.float64:
            return errors.within(LIMIT)
        return errors.within_budget(Errors.of(_expected(recipe, case, self.dtype), exact), self.dtype)
