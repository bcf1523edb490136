"""Verification of a conversion: old layer, new layer and recipe side by side, forward and backward."""

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fastcaps.convert.cases import Case, Weights, cases
from fastcaps.convert.contents import contents, differences
from fastcaps.convert.converted import Plan
from fastcaps.convert.ignored import other_values
from fastcaps.convert.memory import refuse_without_memory
from fastcaps.convert.modules import detached_copy, map_floating
from fastcaps.convert.recipes import Recipe, as_tuple
from fastcaps.convert.results import LABELS, LIMIT, LIMIT_FLOAT32, Difference, Errors, Result
from fastcaps.convert.verdict import Refusal, Refused, Verdict, refuse

NORM_EPS_LIMIT = 1e-5  # what leaving norm_eps out may change
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def verify(
    layer: nn.Module, recipe: Recipe, args: tuple[Any, ...], kwargs: dict[str, Any], wanted: Recipe | None = None
) -> Verdict:
    """Compare a layer with what a recipe makes of it; the layer itself is not touched.

    What is held beside the layer: see :func:`fastcaps.convert.memory.needed_memory`.

    Args:
        layer: the old layer.
        recipe: the recipe.
        args: positional arguments of one call of the layer.
        kwargs: its keyword arguments.
        wanted: what the new layer computes, where that is meant to be something else; None: what the recipe says.
    """
    try:
        return prepare(layer, recipe, args, kwargs).compare(wanted or recipe)
    except Refusal as refusal:
        return refusal.verdict


def prepare(layer: nn.Module, recipe: Recipe, args: tuple[Any, ...], kwargs: dict[str, Any]) -> "Comparison":
    """A comparison of a layer with what a recipe makes of it.

    Raises:
        Refusal: there is nothing to compare.
    """
    _refuse_what_would_be_lost(layer)
    plan, poses, num_iterations = _bind(layer, recipe, args, kwargs)
    refuse_without_memory(layer, plan, poses, num_iterations)
    return _prepare(layer, plan, poses, num_iterations, args, kwargs)


def _refuse_what_would_be_lost(layer: nn.Module) -> None:
    """Refuse a layer of which something would take no effect any more, once its class is another."""
    if "forward" in vars(layer):
        refuse("a forward was set on the object itself, which hides that of any class (del layer.forward removes it)")
    hooked = [path for path, module in layer.named_modules() if path and any(vars(module).get(n) for n in HOOKS)]
    if hooked:
        refuse(f"{', '.join(hooked)} has hooks, and a converted layer would not call it")


def _bind(layer: nn.Module, recipe: Recipe, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Plan, Tensor, int]:
    """The recipe bound to the layer, the poses and T of its call."""
    try:
        plan = Plan.of(recipe, layer)
        poses, num_iterations = plan.bind(layer, args, kwargs)
        plan.tensors(layer, poses)
    except (TypeError, ValueError, AttributeError, RuntimeError) as error:
        refuse(f"the recipe does not fit: {error}", kind=Refused.UNFIT)
    if num_iterations < 1:
        refuse(f"it routes {num_iterations} times")
    return plan, poses, num_iterations


def _prepare(
    layer: nn.Module,
    plan: Plan,
    poses: Tensor,
    num_iterations: int,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> "Comparison":
    """The comparison in float64, or in float32 where the old layer cannot run in float64."""
    for dtype in (torch.float64, torch.float32):
        found = Comparison(layer, plan, poses, num_iterations, args, kwargs, dtype)
        try:
            first = next((case for case in found.cases() if case.weights is Weights.MODEL), None)
            if first is None:
                refuse("the sample is empty")
            given = first.poses.clone()
            found.call_old(first, given)
        except Refusal:
            raise
        except Exception as error:
            failed = f"the old layer cannot run alone: {type(error).__name__}: {error}"
            continue
        if given._version:
            refuse("its forward changes its input in place, which a converted layer would not")
        return found
    refuse(failed)


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


def expected(recipe: Recipe, case: Case, dtype: torch.dtype = torch.float64) -> Result:
    """What the recipe says, step by step in plain PyTorch: by default in float64 on the same numbers."""
    same = all(parameter.dtype == dtype for parameter in case.layer.parameters())
    there = replace(case, layer=case.layer if same else detached_copy(case.layer, dtype), poses=case.poses.to(dtype))
    return Result.of(lambda x: expected_outputs(recipe, there, x), there.layer, there.poses, recipe.returned)


def expected_outputs(recipe: Recipe, case: Case, poses: Tensor | None = None) -> Any:
    """What a layer of that recipe returns, in the dtype of the case, for its poses or others."""
    x = case.poses if poses is None else poses
    plan = Plan.of(recipe, case.layer)
    routed = plan.plain(case.layer, x, case.num_iterations)
    return plan.arranged({"v": routed.poses, "s": routed.sums, "c": routed.coupling}, plan.sizes(case.layer, x))


@dataclass(frozen=True)
class _Outcome:
    """How far a case moves when its layer is replaced.

    Attributes:
        weights: the scale of the weights.
        moved: the new layer from the old one.
        inexact: the new layer from what it should compute, step by step in plain PyTorch.
        left_out: the larger error from leaving norm_eps out, at the model's weights; else 0.
        float32: as in :class:`Verdict`.
    """

    weights: Weights
    moved: Difference
    inexact: Difference
    left_out: float = 0.0
    float32: tuple[float, float] | None = None


@dataclass(frozen=True)
class Comparison:
    """An old layer beside what its recipe says.

    Attributes:
        layer: the old layer, which is copied.
        plan: the recipe, bound to it.
        poses: as it was called with.
        num_iterations: T of that call.
        args: the positional arguments of that call.
        kwargs: its keyword arguments.
        dtype: in which the old layer runs.
    """

    layer: nn.Module
    plan: Plan
    poses: Tensor
    num_iterations: int
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    dtype: torch.dtype

    @property
    def limit(self) -> float:
        """The error at which two results count as the same."""
        return LIMIT if self.dtype == torch.float64 else LIMIT_FLOAT32

    def cases(self) -> Iterator[Case]:
        """The cases, one at a time."""
        return cases(self.layer, self.plan, self.poses, self.num_iterations, self.dtype)

    def compare(self, wanted: Recipe) -> Verdict:
        """The verdict on replacing the layer by what ``wanted`` says."""
        recipe, drops_norm_eps = self.plan.recipe, bool(wanted.norm_eps) and not wanted.convention.effects
        computed = replace(wanted, norm_eps=0.0) if drops_norm_eps else wanted
        in_float64 = self.dtype == torch.float64
        notes = [] if in_float64 else ["compared in float32, as the old layer cannot run in float64"]
        outcomes: list[_Outcome] = []
        for case in self.cases():
            found = self.observe(case, notes)
            if found is not None:
                with_float32 = not any(outcome.float32 for outcome in outcomes)
                outcomes.append(self._check(*found, wanted, computed, notes, with_float32))
                self._refuse_what_is_not_ignored(*found, notes)
                del found  # before the old layer runs in the next case
        if not any(outcome.weights is Weights.DECISIVE for outcome in outcomes):
            refuse("no weights were found for which the old layer is finite and its routing decides", notes=notes)
        moved = Difference.largest(outcome.moved for outcome in outcomes if outcome.weights is Weights.MODEL)
        if drops_norm_eps:
            notes.append(f"the {recipe.norm_eps:g} that squash adds to the norm is left out")
            if not all(outcome.left_out <= max(NORM_EPS_LIMIT, recipe.tolerance) for outcome in outcomes):
                reason = f"capsules are so short that the {recipe.norm_eps:g} which squash adds to the norm matters"
                refuse(reason, moved, notes)
        if recipe.tolerance > LIMIT:
            notes.append(f"its recipe allows differences of {recipe.tolerance:g}, and more where capsules are short")
        if wanted != recipe:
            text = "the errors of this row are from the old layer; from the paper's routing in plain PyTorch they are"
            inexact = Difference.largest(outcome.inexact for outcome in outcomes)
            notes.append(f"{text} {inexact.output:.0e} and {inexact.gradient:.0e}")
        float32 = next((outcome.float32 for outcome in outcomes if outcome.float32), None)
        return Verdict(None, *moved, tuple(notes), float32=float32)

    def _check(
        self, case: Case, old: Result, wanted: Recipe, computed: Recipe, notes: list[str], with_float32: bool
    ) -> "_Outcome":
        """One case: the old layer is what the recipe says, and the new one what ``computed`` says; or refuse."""
        recipe, exact = self.plan.recipe, expected(self.plan.recipe, case)
        agrees = self._close(old, exact, recipe, case) or self._tolerated(old, exact, case)
        if agrees and computed != recipe:
            del exact  # before the other is made
            exact = expected(computed, case)
        new = Result.of(partial(_new_call, Plan.of(wanted, case.layer), case), case.layer, case.poses, recipe.returned)
        moved = Errors.of(new, old).largest
        if not agrees:
            refuse(f"it differs by {max(Errors.of(old, exact).largest):.0e}", moved, notes, Refused.DIFFERS)
        if not self._close(new, exact, computed, case):
            refuse(f"fastcaps itself is wrong here ({case.name}): please report this", moved)
        inexact = Errors.of(new, exact).largest
        del new  # before the copy in float32 is made
        if case.weights is not Weights.MODEL:
            return _Outcome(case.weights, moved, inexact)
        # Both in float64: in float32, rounding would hide or feign it.
        left_out = max(Errors.of(exact, expected(wanted, case)).largest) if computed != wanted else 0.0
        float32 = self._float32(case, old, exact, wanted) if with_float32 else None
        return _Outcome(case.weights, moved, inexact, left_out, float32)

    def _float32(self, case: Case, old: Result, exact: Result, wanted: Recipe) -> tuple[float, float] | None:
        """The largest errors of old and new layer in float32; None where the old one does not run in it."""
        rounded = replace(case, layer=detached_copy(case.layer, torch.float32), poses=case.poses.float())
        try:
            before = max(Errors.of(replace(self, dtype=torch.float32).old(rounded), old).largest)
        except Exception:  # it knows float64 alone
            return None
        new_call = partial(_new_call, Plan.of(wanted, rounded.layer), rounded)
        after = Result.of(new_call, rounded.layer, rounded.poses, self.plan.recipe.returned)
        return before, max(Errors.of(after, exact).largest)

    def observe(self, case: Case, notes: list[str]) -> tuple[Case, Result] | None:
        """What the old layer computes for the samples for which it is finite; None where there are none."""
        before = contents(case.layer)
        result = self.old(case)
        changed = differences(before, contents(case.layer))
        if changed:
            refuse(f"its forward also sets {', '.join(changed)}, which a converted layer would not")
        self._refuse_other_shapes(case, result)
        finite = self._finite_samples(case, result)
        if finite.all():
            return case, result
        if case.weights is Weights.MODEL:
            count = f"{int((~finite).sum())} of {len(finite)} samples"
            notes.append(f"{case.name}: the old layer gives NaN or infinity for {count}, which are not compared")
        return self._finite_part(case, finite)

    def old(self, case: Case) -> Result:
        """What the old layer computes in a case."""
        return Result.of(partial(self.call_old, case), case.layer, case.poses, self.plan.recipe.returned)

    def call_old(self, case: Case, poses: Tensor) -> Any:
        """Call the old layer of a case, with the other arguments that it was called with."""
        plan = self.plan
        others = {key: value for key, value in self.kwargs.items() if key != plan.arguments[0]}
        rest, named = map_floating(lambda tensor: tensor.to(self.dtype), (self.args[1:], others))
        given = [poses, *rest]
        if plan.iterations_argument is not None:
            T = case.num_iterations - plan.recipe.offset
            position = plan.arguments.index(plan.iterations_argument)
            if position < len(given):
                given[position] = T
            else:
                named[plan.iterations_argument] = T
        with _default_dtype(self.dtype):  # many layers make their logits by torch.zeros without a dtype
            return case.layer(*given, **named)

    def _finite_part(self, case: Case, finite: Tensor) -> tuple[Case, Result] | None:
        """The same with the finite samples alone; None where there are none, or where samples depend on each other."""
        recipe = self.plan.recipe
        if recipe.logits == "batch" or not finite.any():
            return None
        if callable(recipe.input):
            part = replace(case, poses=case.poses[finite])
        else:
            rows = self.plan.canonical(case.layer, case.poses)[finite]
            sizes = self.plan.sizes(case.layer, case.poses)
            part = replace(case, poses=self.plan.axes["input"].arranged(rows, sizes))
        result = self.old(part)
        return (part, result) if result.is_finite() else None

    def _refuse_what_is_not_ignored(self, case: Case, old: Result, notes: list[str]) -> None:
        """Refuse where another value of an argument that the recipe ignores changes the result."""
        given = {**self.plan.defaults, **dict(zip(self.plan.arguments, self.args, strict=False)), **self.kwargs}
        for name in as_tuple(self.plan.recipe.ignored_arguments):
            for value in other_values(given.get(name)):
                try:
                    result = self._with(name, value).old(case)
                except Exception:  # it does not take that value, which tells nothing
                    continue
                if not Errors.of(result, old).within(self.limit):
                    text = f"its recipe ignores the argument {name}, but another value changes outputs or gradients"
                    refuse(text, notes=notes)

    def _with(self, name: str, value: Any) -> "Comparison":
        """The same where the layer is called with another value of an argument."""
        position = self.plan.arguments.index(name) if name in self.plan.arguments else len(self.args)
        if position < len(self.args):
            return replace(self, args=(*self.args[:position], value, *self.args[position + 1 :]))
        return replace(self, kwargs={**self.kwargs, name: value})

    def _refuse_other_shapes(self, case: Case, old: Result) -> None:
        plan, tensors = self.plan, self.plan.tensors(case.layer, case.poses)
        x, weight = tensors["poses"], tensors["weight"]
        (B, I), (J, D_out) = x.shape[:2], x.shape[2:] if weight is None else weight.shape[1:3]
        empty = {"v": x.new_empty(B, J, D_out), "s": x.new_empty(B, J, D_out), "c": x.new_empty(B, I, J)}
        returned = plan.arranged(empty, plan.sizes(case.layer, case.poses))
        parts = returned if isinstance(returned, tuple) else (returned,)
        wanted = {name: part.shape for name, part in zip(plan.recipe.returned, parts, strict=False)}
        got = {name: output.shape for name, output in old.outputs.items()}
        for name in {**wanted, **got}:
            if got.get(name) != wanted.get(name):
                refuse(
                    f"{LABELS.get(name, name)}: the old layer returns {tuple(got.get(name, ())) or 'none'}, the "
                    f"recipe's {tuple(wanted.get(name, ())) or 'none'} (most likely the flag output)",
                    kind=Refused.UNFIT,
                )

    def _finite_samples(self, case: Case, old: Result) -> Tensor:
        """``[B]`` bool: the samples whose outputs and whose gradient of the poses are finite."""
        plan, sizes = self.plan, self.plan.sizes(case.layer, case.poses)
        x = plan.canonical(case.layer, case.poses)
        finite = x.new_ones(len(x), dtype=torch.bool)
        tensors = {**old.outputs, "input": old.gradients[0]}
        for name, tensor in tensors.items():
            if name in plan.axes:
                rows = plan.axes[name].canonical(tensor, sizes, name)
            elif name == "input":
                rows = tensor
            else:  # a function arranged it: its samples are not known
                rows = tensor.new_full((len(x), 1), 1.0 if tensor.isfinite().all() else math.nan)
            finite &= rows.isfinite().flatten(1).all(1)
        return finite

    def _tolerated(self, old: Result, exact: Result, case: Case) -> bool:
        """Whether the recipe's own tolerance allows the difference."""
        if self.plan.recipe.tolerance <= LIMIT:
            return False
        return case.weights is Weights.SHORT or Errors.of(old, exact).within(self.plan.recipe.tolerance)

    def _close(self, value: Result, exact: Result, recipe: Recipe, case: Case) -> bool:
        """Whether all errors are within their limits; below float64, about those of plain PyTorch in that dtype."""
        errors = Errors.of(value, exact)
        if self.dtype == torch.float64:
            return errors.within(LIMIT)
        return errors.within_budget(Errors.of(expected(recipe, case, self.dtype), exact), self.dtype)
