"""The diagnosis of a recipe that does not describe a layer: which single change of it would."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from fastcaps.convert.cases import Case
from fastcaps.convert.recipes import Recipe
from fastcaps.convert.results import LIMIT, Errors, Result
from fastcaps.routing.conventions import CHOICES

EPSILONS = (0.0, 1e-16, 1e-12, 1e-10, 1e-9, 1e-8, 1e-7, 1e-6, 1e-5, 1e-4)
LIMIT_FLOAT32 = 1e-4  # relative L2


@dataclass(frozen=True)
class Observation:
    """What the old layer computed in one case."""

    case: Case
    result: Result


def diagnose(
    recipe: Recipe,
    num_iterations: int,
    observations: Sequence[Observation],
    dtype: torch.dtype,
    expected: Callable[[Recipe, Case], Result],
) -> str:
    """Which single change of the recipe explains the old layer, in words.

    Args:
        recipe: the recipe.
        num_iterations: T at the model's weights.
        observations: what the old layer computed.
        dtype: in which.
        expected: what a recipe says for a case.
    """

    def worst(variant: Recipe, enough: float) -> float:
        """The largest error of the old layer; the search stops where ``enough`` is reached."""
        largest = 0.0
        for observation in observations:
            case = observation.case
            case = replace(case, num_iterations=case.num_iterations + variant.offset - recipe.offset)
            try:
                exact = expected(variant, case)
            except (ValueError, RuntimeError, AttributeError):  # axes that do not fit
                return math.inf
            largest = max(largest, *Errors.of(observation.result, exact).largest)
            if not largest < enough:
                break
        return largest

    closest, best = math.inf, ""
    unchanged = worst(recipe, math.inf)
    for text, variant in variants(recipe, num_iterations):
        error = worst(variant, closest)
        if error < closest:
            closest, best = error, text
    if closest <= (LIMIT if dtype == torch.float64 else LIMIT_FLOAT32):
        return f"it differs; most likely {best} (with that the difference is {closest:.0e})"
    hint = f"; the closest is {best} (difference {closest:.0e})" if closest < unchanged / 10 else ""
    return f"it differs by {unchanged:.0e}, and no single flag explains it{hint}"


def variants(recipe: Recipe, num_iterations: int) -> Iterator[tuple[str, Recipe]]:
    """The recipe with one flag changed, and how to say so; none routes less than once."""
    for name, value in _changes(recipe, num_iterations):
        other = {"eps": "norm_eps", "norm_eps": "eps"}.get(name)
        if other is not None and value and getattr(recipe, other):  # one or the other
            yield f"{name}={value!r} and {other}=0", replace(recipe, **{name: value, other: 0.0})
        else:
            yield f"{name}={value!r} instead of {getattr(recipe, name)!r}", replace(recipe, **{name: value})


def _changes(recipe: Recipe, num_iterations: int) -> Iterator[tuple[str, Any]]:
    """Each flag with its other values."""
    for name, choices in CHOICES.items():
        yield from ((name, choice) for choice in choices if choice != getattr(recipe, name))
    yield "detach", not recipe.detach
    yield from (("leaky", value) for value in (True, False) if value is not recipe.leaky)
    yield from (("offset", recipe.offset + step) for step in (-1, 1, -2, 2) if num_iterations + step > 0)
    yield from ((name, e) for name in ("eps", "norm_eps") for e in EPSILONS if e != getattr(recipe, name))
    yield from (("axes", swapped) for swapped in _swaps(recipe.axes, ("I", "J"), ("D_in", "D_out"), ("J", "D_out")))
    yield from (("input", swapped) for swapped in _swaps(recipe.input, ("I", "D_in"), ("B", "I")))
    if isinstance(recipe.output, str):
        yield from (("output", swapped) for swapped in _swaps(recipe.output, ("J", "D_out"), ("B", "J")))
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
        swapped = " ".join(table.get(word, word) for word in words).replace("( ", "(").replace(" )", ")")
        if swapped != axes:
            yield swapped
