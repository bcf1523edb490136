"""The diagnosis of a recipe that does not describe a layer: which changes of it would."""

import itertools
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import nn

from fastcaps.convert.cases import Case, Weights
from fastcaps.convert.comparison import Comparison, expected, prepare
from fastcaps.convert.converted import Plan
from fastcaps.convert.recipes import Recipe, as_tuple
from fastcaps.convert.results import Errors, Result
from fastcaps.convert.verdict import Refusal
from fastcaps.exactness import relative_error
from fastcaps.routing.conventions import CHOICES

EPSILONS = (0.0, 1e-16, 1e-12, 1e-10, 1e-9, 1e-8, 1e-7, 1e-6, 1e-5, 1e-4)
ROUGH = 1e-2  # a combination this close is right, but perhaps for an epsilon


@dataclass(frozen=True)
class Fit:
    """How well a recipe describes a layer.

    Attributes:
        recipe: the recipe.
        error: the largest relative L2 error of outputs and gradients, over all cases.
    """

    recipe: Recipe
    error: float


@dataclass(frozen=True)
class Diagnosis:
    """Why a recipe does not describe a layer.

    Attributes:
        text: in words.
        recipe: the recipe with the changes by which it describes the layer, or None.
    """

    text: str
    recipe: Recipe | None = None


def diagnose(layer: nn.Module, recipe: Recipe, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Diagnosis:
    """Which changes of the recipe explain the old layer: one flag, or else several conventions together."""
    try:
        comparison = prepare(layer, recipe, args, kwargs)
        unchanged = closest(comparison, [recipe])
        best = closest(comparison, variants(recipe, comparison.num_iterations))
        if best.error > comparison.limit:
            best = min(best, fit(comparison), key=lambda found: found.error)
    except Refusal as refusal:  # of a case that was not reached before
        return Diagnosis(str(refusal))
    changes = described(recipe, best.recipe)
    if best.error <= comparison.limit:
        text = f"it differs; most likely {changes} (with that the difference is {best.error:.0e})"
        return Diagnosis(text, best.recipe)
    hint = f"; the closest is {changes} (difference {best.error:.0e})" if best.error < unchanged.error / 10 else ""
    return Diagnosis(f"it differs by {unchanged.error:.0e}, and no combination of conventions explains it{hint}")


def fit(comparison: Comparison) -> Fit:
    """The combination of conventions that is closest to the old layer."""
    rough = _rough_fit(comparison)
    if rough.error > ROUGH:
        return rough
    return closest(comparison, _with_epsilons_and_gradients(rough.recipe))


def _rough_fit(comparison: Comparison) -> Fit:
    """The same by the outputs of one case alone."""
    recipe = comparison.plan.recipe
    rough, decisive = Fit(recipe, math.inf), _decisive(comparison)
    if decisive is None:
        return rough
    fits = (_by_outputs(convention, *decisive, comparison.num_iterations) for convention in _conventions(recipe))
    for one in itertools.chain.from_iterable(fits):
        rough = min(rough, one, key=lambda found: found.error)
        if rough.error <= comparison.limit:
            break
    return rough


def _decisive(comparison: Comparison) -> tuple[Case, Result] | None:
    """The first case in which routing decides, and what the old layer computes in it."""
    for case in comparison.cases():
        if case.weights is Weights.DECISIVE and (found := comparison.observe(case, [])) is not None:
            return found
    return None


def closest(comparison: Comparison, candidates: Iterable[Recipe]) -> Fit:
    """The recipe that is closest to the old layer.

    Case by case the recipes are tried that have equalled it so far; or where none has, the one that came closest.
    """
    fits = [Fit(candidate, 0.0) for candidate in candidates]
    for case in comparison.cases():
        found = comparison.observe(case, [])
        if found is None:
            continue
        errors = [Fit(one.recipe, max(one.error, _error(one.recipe, *found, comparison.plan.recipe))) for one in fits]
        equal = [one for one in errors if one.error <= comparison.limit]
        fits = equal or [min(errors, key=lambda one: one.error)]
        del found  # before the old layer runs in the next case
    return min(fits, key=lambda one: one.error)


def _error(variant: Recipe, case: Case, result: Result, recipe: Recipe) -> float:
    """The largest error of the old layer from what a variant of the recipe says; infinite where that does not fit."""
    try:
        return max(Errors.of(result, expected(variant, _case_of(variant, case, recipe))).largest)
    except (ValueError, RuntimeError, AttributeError):  # axes that do not fit
        return math.inf


@torch.no_grad()
def _by_outputs(recipe: Recipe, case: Case, result: Result, num_iterations: int) -> list[Fit]:
    """How well the outputs alone fit, by the number of iterations; none routes less than once.

    One run tells all of them, as a run goes through what the shorter ones return.
    """
    steps = [step for step in (0, -1, 1, -2, 2) if num_iterations + step > 0]
    plan, errors = Plan.of(recipe, case.layer), []
    sizes = plan.sizes(case.layer, case.poses)
    for found in plan.plain_iterations(case.layer, case.poses, case.num_iterations + max(steps)):
        returned = plan.arranged({"v": found.v, "s": found.s, "c": found.c}, sizes)
        pairs = zip(result.outputs.values(), as_tuple(returned), strict=True)
        errors.append(max(relative_error(old, value) for old, value in pairs))
    return [Fit(replace(recipe, offset=recipe.offset + n), errors[case.num_iterations + n - 1]) for n in steps]


def _case_of(variant: Recipe, case: Case, recipe: Recipe) -> Case:
    """The case with as many iterations as the variant counts."""
    return replace(case, num_iterations=case.num_iterations + variant.offset - recipe.offset)


def described(recipe: Recipe, variant: Recipe) -> str:
    """What differs between two recipes, in words."""
    pairs = [(f.name, getattr(recipe, f.name), getattr(variant, f.name)) for f in fields(Recipe)]
    changes = [
        f"{name}={new!r} instead of {old!r}" for name, old, new in pairs if new != old or type(new) is not type(old)
    ]
    return " and ".join(changes)


def variants(recipe: Recipe, num_iterations: int) -> Iterator[Recipe]:
    """The recipe with one flag changed; none routes less than once."""
    for name, value in _changes(recipe, num_iterations):
        yield replace(recipe, **{name: value}, **_without_the_other(recipe, name, value))


def _without_the_other(recipe: Recipe, name: str, value: Any) -> dict[str, Any]:
    """eps and norm_eps exclude each other."""
    other = {"eps": "norm_eps", "norm_eps": "eps"}.get(name)
    return {other: 0.0} if other is not None and value and getattr(recipe, other) else {}


def _conventions(recipe: Recipe) -> Iterator[Recipe]:
    """The recipe with every combination of conventions."""
    for values in itertools.product(*CHOICES.values()):
        flags: dict[str, Any] = dict(zip(CHOICES, values, strict=True))
        yield replace(recipe, **flags)


def _with_epsilons_and_gradients(recipe: Recipe) -> Iterator[Recipe]:
    """The recipe with each epsilon, and with the full and the detached gradient."""
    for name, value, detach in itertools.product(("eps", "norm_eps"), EPSILONS, (recipe.detach, not recipe.detach)):
        epsilons: dict[str, Any] = {"eps": 0.0, "norm_eps": 0.0, name: value}
        yield replace(recipe, **epsilons, detach=detach)


def _changes(recipe: Recipe, num_iterations: int) -> Iterator[tuple[str, Any]]:
    """Each flag with its other values."""
    for name, choices in CHOICES.items():
        yield from ((name, choice) for choice in choices if choice != getattr(recipe, name))
    yield "detach", not recipe.detach
    yield from (("leaky", value) for value in (True, False) if value is not recipe.leaky)
    yield from (("offset", recipe.offset + step) for step in (-1, 1, -2, 2) if num_iterations + step > 0)
    yield from ((name, e) for name in ("eps", "norm_eps") for e in EPSILONS if e != getattr(recipe, name))
    if recipe.axes is not None:
        yield from (("axes", swapped) for swapped in _swaps(recipe.axes, ("I", "J"), ("D_in", "D_out"), ("J", "D_out")))
    if isinstance(recipe.input, str):
        yield from (("input", swapped) for swapped in _swaps(recipe.input, ("I", "D_in"), ("B", "I")))
    if isinstance(recipe.output, str):
        yield from (("output", swapped) for swapped in _swaps(recipe.output, ("J", "D_out"), ("B", "J")))
    if recipe.returned[0] in ("v", "s"):
        other = {"v": "s", "s": "v"}[recipe.returned[0]]
        yield "returns", other if isinstance(recipe.returns, str) else (other, *recipe.returned[1:])
    if recipe.prior is not None:
        yield "prior", None
        yield from (("prior_axes", swapped) for swapped in _swaps(recipe.prior_axes, ("I", "J")))
    if recipe.bias is not None:
        yield "bias", None
        yield from (("bias_axes", swapped) for swapped in _swaps(recipe.bias_axes, ("J", "D_out")))


def _swaps(axes: str, *pairs: tuple[str, str]) -> Iterator[str]:
    """The axes with two of them exchanged."""
    for a, b in pairs:
        table = {a: b, b: a}
        words = axes.replace("(", "( ").replace(")", " )").split()
        if not {a, b} <= set(words):
            continue
        swapped = " ".join(table.get(word, word) for word in words).replace("( ", "(").replace(" )", ")")
        yield swapped
