"""Replacement of the capsule layers of a model in place by fastcaps, with proof that nothing changed."""

import warnings
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from fastcaps.convert.comparison import verify
from fastcaps.convert.converted import ConvertedCapsules, Plan, convert_layer, restore_layer
from fastcaps.convert.diagnosis import described, diagnose
from fastcaps.convert.hints import SoftmaxTakers, hints, suggestion
from fastcaps.convert.modules import Calls, detached_copy, first_calls, floating_tensors, random_state_kept
from fastcaps.convert.recipes import RECIPES, Recipe
from fastcaps.convert.report import ConversionReport, LayerReport
from fastcaps.convert.verdict import Refused, Verdict
from fastcaps.layers import CapsuleLayer
from fastcaps.measure import Cost, training_cost

TIMES_VARY = 1.1  # the ratio of two measured times of one layer may be that


def replace_capsules(
    model: nn.Module,
    sample: Any,
    *,
    recipes: Sequence[Recipe] = RECIPES,
    fix: bool = False,
    measure: bool = True,
    only_if_faster: bool = False,
) -> ConversionReport:
    """Let fastcaps route every capsule layer of a model that a recipe recognises, in place.

    A layer whose class several recipes know is compared with each in turn, those of one's own first.

    A layer is replaced only where it and its replacement give the same outputs and gradients, in float64, to 1e-9: on
    the first 4 rows of the sample and on random poses, at the model's weights, at weights so large that routing
    decides, and at weights so small that an epsilon counts. Three exceptions: ``norm_eps`` (recipes xifengguo and
    danielhavir, say) is left out, which may change outputs and gradients by 1e-5 at the model's own weights (to 1e-9,
    the old layer is the recipe with it and the new one the recipe without it); a layer that cannot run in float64 is
    compared in float32, to a few times the rounding error of plain PyTorch, as the report then says; and a recipe of
    one's own may have a ``tolerance``. The comparison holds a copy of the layer, the gradients of two results and a
    third run, all in float64: up to 11 times the memory of the weight in float32. It is about 20 times where the old
    layer repeats its weight for each of the few samples, and more where input capsules share the weight.

    A layer stays the same object, with its parameters, attributes, hooks and methods; what changes is its ``forward``.
    Optimizers, averaged copies, data-parallel wrappers and state dicts need no change; that a training ends where it
    would without the swap, 50 steps later and to 1e-9, is tested for recipes without ``norm_eps`` only. A layer whose
    ``forward`` does more than compute (it sets attributes, or calls a submodule that has hooks) is left as it was.

    A layer whose routing is not the paper's (a softmax over the input capsules, logits averaged over the batch, a
    squash of single entries or over the output capsules) is reproduced in plain PyTorch in bounded memory, with a
    warning. That can be slower than it was: the report says where it is.

    Args:
        model: any module; wrappers (``DataParallel``, ``DistributedDataParallel``, ``torch.compile``) are looked into.
            In a distributed program every process calls this; with ``only_if_faster`` every process of the default
            group must.
        sample: what the model is called with: one tensor, a tuple of positional arguments, or a dict of keyword
            arguments. Several samples (2 or more) show more than one, as batch-wide mistakes need them.
        recipes: what to recognise; ``(*RECIPES, Recipe(...))`` adds a layer of one's own.
        fix: whether a layer with wrong routing gets the paper's instead; what the model predicts then changes, and the
            report shows by how much. The new layer is compared with the paper's routing in plain PyTorch.
        measure: whether time and peak memory of old and new layer are measured, on the sample.
        only_if_faster: whether a layer stays as it was unless it was measured to be faster. In a distributed program
            the first process of the default group decides for all.

    Returns:
        A :class:`ConversionReport`. The model's mode, parameters and gradients are what they were.

    Raises:
        TypeError: the model is no module, or a recipe no :class:`Recipe`.
        ValueError: the model cannot run on the sample, or only_if_faster comes without measure.

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
    if only_if_faster and not measure:
        raise ValueError("only_if_faster needs measure=True: nothing else tells which is faster")
    watch = SoftmaxTakers()
    modules, found = _recognised(model, recipes)
    calls = first_calls(model, sample, [modules[path] for path in found], watch)
    if _recognised(model, recipes) != (modules, found):  # some layers are made in the first call of a model
        modules, found = _recognised(model, recipes)
        calls = first_calls(model, sample, [modules[path] for path in found], watch)
    similar = hints(model, sample, recipes, found, watch.modules)  # before anything is converted
    rows = [_replace_one(path, modules[path], matching, calls, fix, measure) for path, matching in found.items()]
    if only_if_faster:
        rows = _only_faster(rows, modules)
    if any(row.replaced for row in rows):
        try:
            first_calls(model, sample, [])
        except ValueError as error:
            reason = f"with the new layers the model no longer runs: {error}"
            rows = [_undone(row, modules[row.path], reason) if row.replaced else row for row in rows]
    for row in rows:
        if row.replaced and row.warning is not None:
            warnings.warn(f"{row.label}: {row.warning}", stacklevel=2)
    return ConversionReport(tuple(rows), tuple(similar), len(modules))


def _recognised(model: nn.Module, recipes: Sequence[Recipe]) -> tuple[dict[str, nn.Module], dict[str, list[Recipe]]]:
    """The modules by their paths, and the recipes of those that have some."""
    modules = dict(model.named_modules())
    matching = {path: _matching(module, recipes) for path, module in modules.items()}
    return modules, {path: recipes for path, recipes in matching.items() if recipes}


def _matching(module: nn.Module, recipes: Sequence[Recipe]) -> list[Recipe]:
    """The recipes that may describe a module, those of one's own first; the comparison decides."""
    if isinstance(module, (ConvertedCapsules, CapsuleLayer)):
        return []
    known = [recipe for recipe in recipes if type(module).__name__ in recipe.class_names]
    matching = [recipe for recipe in known if recipe.mismatch(module) is None]
    return sorted(matching, key=lambda recipe: recipe in RECIPES)


def _replace_one(
    path: str, layer: nn.Module, matching: list[Recipe], calls: Calls, fix: bool, measure: bool
) -> LayerReport:
    """Verify and replace one layer; the row of the report says whether that was done."""
    name = type(layer).__name__
    if layer not in calls:
        reason = "the model did not call it on this sample, or called its forward alone: layer.forward(x), not layer(x)"
        return LayerReport(path, name, matching[0].name, False, reason)
    args, kwargs = calls[layer]
    before = after = None
    with random_state_kept():
        recipe, verdict = _first_that_agrees(layer, matching, args, kwargs, fix)
        if verdict.refused is None:
            try:
                before = _cost(layer, args, kwargs) if measure else None
                convert_layer(layer, Plan.of(_wanted(recipe, fix), layer))
            except Exception as error:  # other people's code; layers before this one are converted already
                verdict = Verdict(_in_words(error))
        errors = (verdict.output, verdict.gradient)
        if verdict.refused is not None:
            return LayerReport(path, name, recipe.name, False, verdict.refused, *errors, notes=verdict.notes)
        after = _cost(layer, args, kwargs) if measure else None
    warning = _warning(recipe, fix)
    notes = (*verdict.notes, *_slower(before, after))
    return LayerReport(path, name, recipe.name, True, None, *errors, before, after, notes, warning, verdict.float32)


def _first_that_agrees(
    layer: nn.Module, matching: list[Recipe], args: tuple[Any, ...], kwargs: dict[str, Any], fix: bool
) -> tuple[Recipe, Verdict]:
    """The first recipe that describes the layer, and its verdict; or where none does, why none does."""
    refused: list[tuple[Recipe, Verdict]] = []
    for recipe in matching:
        verdict = _verdict(layer, recipe, args, kwargs, fix)
        if verdict.refused is None:
            tried = [f"recipe {other.name!r} was tried before: {why.refused}" for other, why in refused]
            return recipe, replace(verdict, notes=(*tried, *verdict.notes))
        refused.append((recipe, verdict))
    # The diagnosis takes longer than the comparison: only of the recipe that came furthest.
    recipe, verdict = max(refused, key=lambda pair: pair[1].kind.value)
    others = [f"recipe {other.name!r}: {why.refused}" for other, why in refused if other is not recipe]
    if verdict.kind is Refused.DIFFERS:
        recipe, verdict = _diagnosed(layer, recipe, verdict, args, kwargs, fix)
    elif verdict.kind is Refused.UNFIT and (guessed := suggestion(layer, args, kwargs)):
        others.append(f"but {guessed[1]}")
    return recipe, replace(verdict, notes=(*verdict.notes, *others))


def _verdict(layer: nn.Module, recipe: Recipe, args: tuple[Any, ...], kwargs: dict[str, Any], fix: bool) -> Verdict:
    try:
        return verify(layer, recipe, args, kwargs, _wanted(recipe, fix))
    except Exception as error:  # other people's code
        return Verdict(_in_words(error))


def _diagnosed(
    layer: nn.Module, recipe: Recipe, verdict: Verdict, args: tuple[Any, ...], kwargs: dict[str, Any], fix: bool
) -> tuple[Recipe, Verdict]:
    """Why a layer differs; with ``fix``, a recipe that is wrong only in what is mended anyway will do."""
    try:
        diagnosis = diagnose(layer, recipe, args, kwargs)
    except Exception as error:  # other people's code
        return recipe, replace(verdict, refused=f"{verdict.refused}; {_in_words(error)}")
    if fix and diagnosis.recipe is not None and _wanted(diagnosis.recipe, fix) == _wanted(recipe, fix):
        mended = _verdict(layer, diagnosis.recipe, args, kwargs, fix)
        if mended.refused is None:
            text = f"its recipe is wrong in what was mended: {described(recipe, diagnosis.recipe)}"
            return diagnosis.recipe, replace(mended, notes=(text, *mended.notes))
    return recipe, replace(verdict, refused=diagnosis.text)


def _wanted(recipe: Recipe, fix: bool) -> Recipe:
    """What the new layer computes."""
    return replace(recipe, softmax="outputs", logits="sample", squash="norm") if fix else recipe


def _in_words(error: Exception) -> str:
    return f"it could not be compared: {type(error).__name__}: {error}"


def _warning(recipe: Recipe, fix: bool) -> str | None:
    """What of the routing is not the paper's, and what was made of it; None where it is."""
    effects = recipe.convention.effects
    if not effects:
        return None
    text = "reproduced in plain PyTorch; fix=True routes as in the paper"
    if fix:
        text = "it was as its recipe says, and routes as in the paper from now on: measure the accuracy again"
    return f"this layer's routing is not the paper's: {'; '.join(effects)}; {text}"


def _slower(before: Cost | None, after: Cost | None) -> list[str]:
    """A note where the new layer was measured to be slower."""
    if before is None or after is None or after.milliseconds <= TIMES_VARY * before.milliseconds:
        return []
    times = f"{before.milliseconds:.3g} ms before, {after.milliseconds:.3g} ms after"
    return [f"a training step on this sample got slower: {times}; only_if_faster=True leaves such a layer"]


def _only_faster(rows: list[LayerReport], modules: dict[str, nn.Module]) -> list[LayerReport]:
    """Give back the layers that are not faster; the first process of the default group decides for all."""
    reasons = {row.path: _not_faster(row) for row in rows if row.replaced}
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        decided = [reasons]
        torch.distributed.broadcast_object_list(decided, src=0)
        reasons = decided[0]
    missing = "the first process did not replace it"
    reasons = {row.path: reasons.get(row.path, missing) for row in rows if row.replaced}
    return [_undone(row, modules[row.path], reason) if (reason := reasons.get(row.path)) else row for row in rows]


def _not_faster(row: LayerReport) -> str | None:
    """Why a layer stays that is only replaced if that is faster; None where it is."""
    if row.before is None or row.after is None:
        return "its time could not be measured, which is most likely for want of memory"
    return None if row.is_faster else "it would not be faster"


def _undone(row: LayerReport, layer: nn.Module, reason: str) -> LayerReport:
    """Restore a layer; its row says why."""
    restore_layer(layer)
    return replace(row, replaced=False, reason=reason)


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
            return training_cost(step, leaves[0].device)
    except Exception:  # most likely out of memory; whatever it is, the report is worth more than this number
        return None
    finally:
        for leaf in leaves:
            leaf.requires_grad_(False)
