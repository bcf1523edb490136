"""A recipe for a layer that nothing is known of: axes from its shapes, conventions by trying their combinations."""

import inspect
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from fastcaps.convert.comparison import prepare, verify
from fastcaps.convert.converted import equal
from fastcaps.convert.diagnosis import fit
from fastcaps.convert.ignored import other_values
from fastcaps.convert.modules import detached_copy, is_floating
from fastcaps.convert.recipes import POSES_AXES, RETURNS, VOTES_AXES, Recipe
from fastcaps.convert.verdict import Refusal
from fastcaps.layers import WEIGHT_AXES

MOST = 24  # readings of the axes that are tried: more than a few only where sizes are equal
LARGEST_T = 10  # an attribute above it holds something else


def guess(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Recipe | None:
    """A recipe that describes the layer, verified; None where none was found.

    Args:
        layer: the layer, which is not touched.
        args: the positional arguments of one call of it; the first are the poses.
        kwargs: its keyword arguments.
    """
    if not args or not is_floating(args[0]):
        return None
    for recipe in itertools.islice(_readings(layer, args, kwargs), MOST):
        try:
            comparison = prepare(layer, recipe, args, kwargs)
            found = fit(comparison)
        except Refusal:
            continue
        if found.error <= comparison.limit:
            constant = replace(found.recipe, num_iterations=comparison.num_iterations + found.recipe.offset, offset=0)
            if verify(layer, constant, args, kwargs).refused is not None:
                return None  # what is refused beside the numbers, as an argument that matters, is so in any reading
            return _with_attribute(layer, constant, args, kwargs)
    return None


def _readings(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[Recipe]:
    """The recipes whose axes fit the shapes of poses, weight and output; or of votes and output, without a weight."""
    with torch.no_grad():
        returned = detached_copy(layer)(*args, **kwargs)
    parts = returned if isinstance(returned, tuple) else (returned,)
    names = ("v", "c")[: len(parts)]
    if not all(isinstance(part, Tensor) for part in parts) or len(parts) > len(names):
        return
    parameters = dict(layer.named_parameters())
    others = _other_arguments(layer, args, kwargs)
    if not all(other_values(value) or _names_a_device(value) for value in others.values()):
        return  # what cannot be tried with another value cannot be said to change nothing
    shapes = [args[0].shape, *(part.shape for part in parts)]
    for taken in (POSES_AXES, VOTES_AXES):
        axes_of_all = [taken, *(RETURNS[name] for name in names)]
        for (given, *outputs), sizes in _all_arrangements(shapes, axes_of_all, {}):
            for name, axes in _weights(parameters, sizes) if taken is POSES_AXES else [(None, None)]:
                yield Recipe(
                    "mine",
                    type(layer).__name__,
                    weight=name,
                    axes=axes,
                    out_capsules=sizes["J"] if axes is not None and "(" in axes else None,
                    input=given,
                    output=outputs[0] if isinstance(returned, Tensor) else tuple(outputs),
                    returns=names[0] if isinstance(returned, Tensor) else names,
                    ignored_arguments=tuple(others),
                    unused=tuple(other for other in parameters if other != name),
                )


def _other_arguments(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a call beside the poses, without those that a recipe need not name."""
    others = list(inspect.signature(type(layer).forward).parameters.values())[2:]  # without self and the poses
    defaults = {argument.name: argument.default for argument in others}
    given = {**dict(zip(defaults, args[1:], strict=False)), **kwargs}
    return {
        name: value
        for name, value in given.items()
        if not isinstance(value, torch.device) and not equal(value, defaults.get(name, inspect.Parameter.empty))
    }


def _names_a_device(value: Any) -> bool:
    try:
        return isinstance(value, str) and torch.device(value) is not None
    except RuntimeError:
        return False


def _weights(parameters: Mapping[str, Tensor], sizes: Mapping[str, int]) -> Iterator[tuple[str, str]]:
    """The parameters that may be the weight, which may be shared over the input capsules, and their axes."""
    for name, parameter in parameters.items():
        for axes in (WEIGHT_AXES, WEIGHT_AXES[1:]):
            for text, _ in arrangements(parameter.shape, axes, sizes):
                yield name, text


def _all_arrangements(
    shapes: Sequence[torch.Size], axes: Sequence[tuple[str, ...]], known: Mapping[str, int]
) -> Iterator[tuple[tuple[str, ...], dict[str, int]]]:
    """Those of several tensors, with sizes that agree."""
    if not shapes:
        yield (), dict(known)
        return
    for text, sizes in arrangements(shapes[0], axes[0], known):
        for texts, all_sizes in _all_arrangements(shapes[1:], axes[1:], sizes):
            yield (text, *texts), all_sizes


def arrangements(
    shape: tuple[int, ...], axes: tuple[str, ...], known: Mapping[str, int]
) -> Iterator[tuple[str, dict[str, int]]]:
    """All ways to say in words which axes a tensor has, with the sizes that follow.

    Args:
        shape: its shape.
        axes: the axes that it has, in any order; two may share a dimension where their sizes are known.
        known: the sizes that are known.

    Example:
        >>> [text for text, _ in arrangements((2, 6, 4), ("B", "I", "D_in"), {"B": 2, "D_in": 4})]
        ['B I D_in']
    """
    if not shape:
        if not axes:
            yield "", dict(known)
        return
    for group, sizes in _groups(shape[0], axes, known):
        for text, all_sizes in arrangements(shape[1:], tuple(axis for axis in axes if axis not in group), sizes):
            word = "1" if not group else group[0] if len(group) == 1 else f"({' '.join(group)})"
            yield f"{word} {text}".strip(), all_sizes


def _groups(
    size: int, axes: tuple[str, ...], known: Mapping[str, int]
) -> Iterator[tuple[tuple[str, ...], dict[str, int]]]:
    """The axes that a dimension of that size may hold, and the sizes that follow."""
    if size == 1:
        yield (), dict(known)
    for axis in axes:
        if known.get(axis, size) == size:
            yield (axis,), {**known, axis: size}
    for pair in itertools.permutations(axes, 2):
        if all(axis in known for axis in pair) and known[pair[0]] * known[pair[1]] == size:
            yield pair, dict(known)


def _with_attribute(layer: nn.Module, recipe: Recipe, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Recipe:
    """The recipe with the attribute that holds T, which shows where another value of it changes T; else as it is."""
    T = recipe.num_iterations
    assert isinstance(T, int)
    for name, value in vars(layer).items():
        if type(value) is int and 0 < value <= LARGEST_T and abs(T - value) <= 1:
            read, other = replace(recipe, num_iterations=name, offset=T - value), detached_copy(layer)
            vars(other)[name] = value + 1
            try:
                if verify(other, read, args, kwargs).refused is None:
                    return read
            except Exception:  # the attribute is something else, and the layer does not run with it
                continue
    return recipe
