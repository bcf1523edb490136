"""Replacement of the capsule layers of a model in place by fastcaps, with proof that nothing changed."""

import warnings
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from fastcaps.convert.comparison import Verdict, verify
from fastcaps.convert.converted import ConvertedCapsules, Plan, convert_layer, restore_layer
from fastcaps.convert.failure import explain_failure
from fastcaps.convert.modules import (
    call_arguments,
    detached_copy,
    evaluation_mode,
    floating_tensors,
    random_state_kept,
)
from fastcaps.convert.recipes import RECIPES, Recipe
from fastcaps.convert.report import ConversionReport, LayerReport
from fastcaps.layers import CapsuleLayer
from fastcaps.measure import Cost, training_cost

WRAPPERS = ("DataParallel", "DistributedDataParallel", "OptimizedModule")

Calls = dict[nn.Module, tuple[tuple[Any, ...], dict[str, Any]]]  # the arguments of each layer's first call


def replace_capsules(
    model: nn.Module,
    sample: Any,
    *,
    recipes: Sequence[Recipe] = RECIPES,
    fix: bool = False,
    measure: bool = True,
) -> ConversionReport:
    """Let fastcaps route every capsule layer of a model that a recipe recognises, in place.

    A layer is replaced only where it and its replacement give the same outputs and gradients, in float64, to 1e-9: on
    the first 4 rows of the sample and on random poses, at the model's weights, at weights so large that routing
    decides, and at weights so small that an epsilon counts. Two exceptions: ``norm_eps`` (recipes xifengguo and
    danielhavir) is left out, which may change outputs and gradients by 1e-5 at the model's own weights (to 1e-9, the
    old layer is the recipe with it and the new one the recipe without it); and a layer that cannot run in float64 is
    compared in float32, to a few times the rounding error of plain PyTorch, as the report then says.

    A layer stays the same object, with its parameters, attributes, hooks and methods; what changes is its ``forward``.
    Optimizers, averaged copies, data-parallel wrappers and state dicts need no change; that a training ends where it
    would without the swap, 50 steps later and to 1e-9, is tested for recipes without ``norm_eps`` only. A layer whose
    ``forward`` does more than compute (it sets attributes, or calls a submodule that has hooks) is left as it was.

    A layer whose routing is not the paper's (a softmax over the input capsules, logits averaged over the batch, a
    squash of single entries) is reproduced in plain PyTorch in bounded memory, with a warning.

    Args:
        model: any module; wrappers (``DataParallel``, ``DistributedDataParallel``, ``torch.compile``) are looked into.
            In a distributed program every process calls this.
        sample: what the model is called with: one tensor, a tuple of positional arguments, or a dict of keyword
            arguments. Several samples (2 or more) show more than one, as batch-wide mistakes need them.
        recipes: what to recognise; ``(*RECIPES, Recipe(...))`` adds a layer of one's own.
        fix: whether a layer with wrong routing gets the paper's instead; what the model predicts then changes, and the
            report shows by how much. The new layer is compared with the paper's routing in plain PyTorch.
        measure: whether time and peak memory of old and new layer are measured, on the sample.

    Returns:
        A :class:`ConversionReport`. The model's mode, parameters and gradients are what they were.

    Raises:
        TypeError: the model is no module, or a recipe no :class:`Recipe`.
        ValueError: the model cannot run on the sample.

    Example:
        >>> class Capsule(torch.nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.weights, self.num_routing = torch.nn.Parameter(torch.randn(1, 6, 3, 8, 4)), 3
        ...     def forward(self, x):
        ...         u = (self.weights @ x[:, :, None, :, None]).squeeze(-1)
        ...         b = x.new_zeros(u.shape[:3])
        ...         for _ in range(self.num_routing):
        ...             s = (b.softmax(2)[..., None] * u).sum(1)
        ...             n2 = (s * s).sum(-1, keepdim=True)
        ...             v = s * n2 / (1 + n2) / (n2 + 1e-8).sqrt()
        ...             b = b + (u * v[:, None]).sum(-1)
        ...         return v
        >>> replace_capsules(torch.nn.Sequential(Capsule()), torch.randn(2, 6, 4)).replaced
        ['0']
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a module, got {type(model).__name__}")
    for recipe in recipes:
        if not isinstance(recipe, Recipe):
            raise TypeError(f"recipes must be Recipe objects, got {recipe!r}")
    modules = dict(model.named_modules())
    found, similar = _recognise_all(modules, recipes)
    calls = _first_calls(model, sample, [modules[path] for path in found])
    rows = [_replace_one(path, modules[path], matching, calls, fix, measure) for path, matching in found.items()]
    if any(row.replaced for row in rows):
        try:
            _first_calls(model, sample, [])
        except ValueError as error:
            rows = [_undone(row, modules[row.path], error) if row.replaced else row for row in rows]
    for row in rows:
        if row.replaced and row.warning is not None:
            warnings.warn(f"{row.label}: {row.warning}", stacklevel=2)
    return ConversionReport(tuple(rows), tuple(similar), len(modules))


def _recognise_all(
    modules: dict[str, nn.Module], recipes: Sequence[Recipe]
) -> tuple[dict[str, list[Recipe]], list[str]]:
    """The recipes of each layer that has some, and hints for layers that nearly have one."""
    found: dict[str, list[Recipe]] = {}
    similar: list[str] = []
    for path, module in modules.items():
        if isinstance(module, (ConvertedCapsules, CapsuleLayer)):
            continue
        matching, hints = _recognise(module, recipes)
        if matching:
            found[path] = matching
        similar += [f"{path or 'the model'} ({type(module).__name__}) was not recognised: {hint}" for hint in hints]
    return found, similar


def _recognise(module: nn.Module, recipes: Sequence[Recipe]) -> tuple[list[Recipe], list[str]]:
    """The recipes that describe a module; and where none does, what speaks for one."""
    name, matching, hints = type(module).__name__, [], []
    for recipe in recipes:
        mismatch = recipe.mismatch(module)
        if name in recipe.class_names and mismatch is None:
            matching.append(recipe)
        elif name in recipe.class_names and next(module.parameters(), None) is not None:
            hints.append(f"recipe {recipe.name!r} knows this class, but {mismatch}")
        elif mismatch is None:
            advice = _how_to_add(name, recipe)
            hints.append(f"its parameters are those of recipe {recipe.name!r}; if it is that layer, {advice}")
    return matching, [] if matching else hints


def _how_to_add(class_name: str, recipe: Recipe) -> str:
    """What to do so that a recipe knows one more class."""
    if recipe not in RECIPES:
        return f"add {class_name!r} to the classes of that recipe"
    return (
        "pass recipes=recipes after\n    import dataclasses\n    from fastcaps.convert import RECIPES\n"
        f"    known = next(recipe for recipe in RECIPES if recipe.name == {recipe.name!r})\n"
        f"    recipes = (*RECIPES, dataclasses.replace(known, classes={class_name!r}))"
    )


def _first_calls(model: nn.Module, sample: Any, layers: list[nn.Module]) -> Calls:
    """Run the model and keep with what each layer was called first."""
    calls: Calls = {}

    def keep(module: nn.Module, args: Any, kwargs: Any) -> None:
        kept = torch.utils._pytree.tree_map_only(Tensor, lambda t: t.detach().clone(), (args, kwargs))
        calls.setdefault(module, kept)

    hooks = [layer.register_forward_pre_hook(keep, with_kwargs=True) for layer in layers]
    args, kwargs = call_arguments(sample)
    try:
        with evaluation_mode(model), torch.no_grad():
            _unwrapped(model)(*args, **kwargs)
    except Exception as error:
        raise ValueError(f"the model cannot run on the sample: {explain_failure(error, model)}") from error
    finally:
        for hook in hooks:
            hook.remove()
    return calls


def _unwrapped(model: nn.Module) -> nn.Module:
    """The module inside data-parallel and compiled wrappers; known by name, as importing them takes seconds."""
    while type(model).__name__ in WRAPPERS:
        model = model._orig_mod if hasattr(model, "_orig_mod") else model.module  # type: ignore[assignment]
    return model


def _replace_one(
    path: str, layer: nn.Module, matching: list[Recipe], calls: Calls, fix: bool, measure: bool
) -> LayerReport:
    """Verify and replace one layer; the row of the report says whether that was done."""
    name = type(layer).__name__
    if len(matching) > 1:
        return LayerReport(path, name, None, False, _ambiguous(matching))
    recipe = matching[0]
    if layer not in calls:
        reason = "the model did not call it on this sample, or called its forward alone: layer.forward(x), not layer(x)"
        return LayerReport(path, name, recipe.name, False, reason)
    args, kwargs = calls[layer]
    wanted = replace(recipe, softmax="outputs", logits="sample", squash="norm") if fix else recipe
    before = after = None
    with random_state_kept():
        try:
            verdict = verify(layer, recipe, args, kwargs, wanted)
            if verdict.refused is None:
                before = _cost(layer, args, kwargs) if measure else None
                convert_layer(layer, Plan.of(wanted, layer))
        except Exception as error:  # other people's code; layers before this one are converted already
            verdict = Verdict(f"it could not be compared: {type(error).__name__}: {error}")
        errors = (verdict.output, verdict.gradient)
        if verdict.refused is not None:
            return LayerReport(path, name, recipe.name, False, verdict.refused, *errors, notes=verdict.notes)
        after = _cost(layer, args, kwargs) if measure else None
    warning = _warning(recipe, fix)
    return LayerReport(path, name, recipe.name, True, None, *errors, before, after, verdict.notes, warning)


def _ambiguous(matching: list[Recipe]) -> str:
    """What to do where several recipes describe a layer."""
    names = [repr(recipe.name) for recipe in matching]
    built_in = [recipe.name for recipe in matching if recipe in RECIPES]
    text = f"the recipes {' and '.join(names)} both describe it: pass only the one that is meant"
    if not 0 < len(built_in) < len(names):
        return text
    return f"{text}, or the others without it: recipes=(*(r for r in RECIPES if r.name not in {built_in}), yours)"


def _warning(recipe: Recipe, fix: bool) -> str | None:
    """What of the routing is not the paper's, and what was made of it; None where it is."""
    effects = recipe.convention.effects
    if not effects:
        return None
    text = "reproduced in plain PyTorch; fix=True routes as in the paper"
    if fix:
        text = "it was as its recipe says, and routes as in the paper from now on: measure the accuracy again"
    return f"this layer's routing is not the paper's: {'; '.join(effects)}; {text}"


def _undone(row: LayerReport, layer: nn.Module, error: ValueError) -> LayerReport:
    """Restore a layer with which the model no longer runs; its row says so."""
    restore_layer(layer)
    return replace(row, replaced=False, reason=f"with the new layers the model no longer runs: {error}")


def _cost(layer: nn.Module, args: Any, kwargs: Any) -> Cost | None:
    """Time and memory of forward and backward of a copy, at the sample's size; None where that does not work."""
    leaves = floating_tensors((args, kwargs))

    def step() -> None:
        v = [output for output in floating_tensors(copied(*args, **kwargs)) if output.requires_grad]
        torch.autograd.grad(v, [*leaves, *copied.parameters()], [torch.ones_like(o) for o in v], allow_unused=True)

    try:
        copied = detached_copy(layer)
        for leaf in leaves:
            leaf.requires_grad_()
        with torch.enable_grad():
            return training_cost(step, next(layer.parameters()).device)
    except Exception:  # most likely out of memory; whatever it is, the report is worth more than this number
        return None
    finally:
        for leaf in leaves:
            leaf.requires_grad_(False)
