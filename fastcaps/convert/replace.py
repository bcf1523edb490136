"""Replace the capsule layers of a model in place by fastcaps, with proof that nothing changed."""

import contextlib
import functools
import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from fastcaps.convert.comparison import Verdict, detached_copy, verify
from fastcaps.convert.recipes import RECIPES, Plan, Recipe
from fastcaps.layers import CapsuleLayer
from fastcaps.measure import Cost, training_cost

__all__ = ["RECIPES", "ConversionReport", "ConvertedCapsules", "LayerReport", "Recipe", "replace_capsules"]


class ConvertedCapsules:
    """What :func:`replace_capsules` makes of a layer: a subclass of the layer's own class, routed by fastcaps.

    Parameters, names, attributes, hooks and the methods beside ``forward`` are the old layer's. It can be copied, and
    pickled where its old class can.
    """

    _fastcaps_plan: Plan

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the old layer's ``forward`` takes and returns."""
        return self._fastcaps_plan.call(self, args, kwargs)  # type: ignore[arg-type]

    def __reduce__(self) -> tuple[Any, ...]:
        return _unpickled, (_old_class(self), self._fastcaps_plan), self.__getstate__()  # type: ignore[attr-defined]


@functools.cache
def _converted_class(old: Any) -> Any:
    return type(f"Fused{old.__name__}", (ConvertedCapsules, old), {"__module__": __name__})


def _old_class(layer: Any) -> Any:
    return type(layer).__mro__[2]  # after the converted class itself and ConvertedCapsules


def _unpickled(old: type, plan: Plan) -> Any:
    layer = object.__new__(_converted_class(old))
    layer.__dict__["_fastcaps_plan"] = plan  # the old class says what else is pickled
    return layer


def _convert(layer: Any, plan: Plan) -> None:
    """In place, so that everything that holds the layer keeps it."""
    old: Any = type(layer)
    layer.__class__ = _converted_class(old)
    layer.__dict__["_fastcaps_plan"] = plan


def _restore(layer: Any) -> None:
    layer.__class__ = _old_class(layer)
    del layer.__dict__["_fastcaps_plan"]


# ------------------------------------------------------------------------------------------------------- the report


@dataclass(frozen=True)
class LayerReport:
    """What became of one layer.

    Attributes:
        path: where it is in the model; empty where it is the model.
        class_name: its class.
        recipe: the name of the recipe that was recognised, or None.
        replaced: whether fastcaps routes it now.
        reason: why it was left as it was, or None.
        output: largest relative L2 difference of its outputs, old against new, at the model's weights.
        gradient: likewise of the gradients of poses and parameters.
        before: milliseconds and peak memory of a forward and backward pass on the sample, or None: not measured.
        after: the same of the new layer.
        notes: what else there is to know.
    """

    path: str
    class_name: str
    recipe: str | None
    replaced: bool
    reason: str | None
    output: float = math.nan
    gradient: float = math.nan
    before: Cost | None = None
    after: Cost | None = None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class ConversionReport:
    """What :func:`replace_capsules` did: ``print`` shows a row for each layer.

    Attributes:
        layers: the layers that were recognised.
        similar: layers that were not, and what of a recipe they have.
        modules: how many modules the model has.
    """

    layers: tuple[LayerReport, ...]
    similar: tuple[str, ...]
    modules: int

    @property
    def replaced(self) -> list[str]:
        """The paths of the layers that fastcaps routes now."""
        return [row.path for row in self.layers if row.replaced]

    def __str__(self) -> str:
        head = ("layer", "class", "recipe", "output", "gradient", "ms before, after", "MB before, after", "")
        rows = [head, *(self._row(row) for row in self.layers)]
        widths = [max(len(row[n]) for row in rows) for n in range(len(head))]
        lines = ["  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip() for row in rows]
        if not self.layers:
            lines = [f"no capsule layer was recognised among {self.modules} modules; nothing was changed"]
        for row in self.layers:
            texts = [*([f"left as it was: {row.reason}"] if row.reason else []), *row.notes]
            lines += [f"{row.path or 'the model'}: {text}" for text in texts]
        return "\n".join([*lines, *self.similar])

    @staticmethod
    def _row(row: LayerReport) -> tuple[str, ...]:
        costs = (row.before, row.after)
        times, peaks = "", ""
        if row.before is not None and row.after is not None:
            times = ", ".join(f"{cost.milliseconds:.3g}" for cost in costs if cost)
            peaks = ", ".join(f"{cost.peak / 1e6:.3g}" for cost in costs if cost)
        errors = ("" if math.isnan(error) else f"{error:.0e}" for error in (row.output, row.gradient))
        what = "replaced" if row.replaced else "left as it was"
        return (row.path or "the model", row.class_name, row.recipe or "", *errors, times, peaks, what)


# -------------------------------------------------------------------------------------------------- the replacement


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
    found: dict[str, tuple[nn.Module, list[Recipe]]] = {}
    similar = []
    modules = dict(model.named_modules())
    for path, module in modules.items():
        if isinstance(module, (ConvertedCapsules, CapsuleLayer)):
            continue
        matching, near = _recognise(module, recipes)
        if matching:
            found[path] = module, matching
        similar += [f"{path or 'the model'} ({type(module).__name__}) was not recognised: {text}" for text in near]
    calls = _calls_of(model, sample, [module for module, _ in found.values()])
    rows = [_replace_one(path, layer, list_, calls, fix, measure) for path, (layer, list_) in found.items()]
    changed = [modules[row.path] for row in rows if row.replaced]
    if changed:
        try:
            _calls_of(model, sample, [])
        except ValueError as error:
            for layer in changed:
                _restore(layer)
            reason = f"with the new layers the model no longer runs: {error}"
            rows = [replace(row, replaced=False, reason=reason) if row.replaced else row for row in rows]
    for row in rows:
        if row.replaced:
            for note in row.notes:
                if note.startswith(WARNED):
                    warnings.warn(f"{row.path or 'the model'}: {note}", stacklevel=2)
    return ConversionReport(tuple(rows), tuple(similar), len(modules))


WARNED = "this layer's routing is not the paper's: "


def _recognise(module: nn.Module, recipes: Sequence[Recipe]) -> tuple[list[Recipe], list[str]]:
    """The recipes that describe a module; and where none does, what speaks for one."""
    name, matching, near = type(module).__name__, [], []
    for recipe in recipes:
        names = (recipe.classes,) if isinstance(recipe.classes, str) else recipe.classes
        mismatch = recipe.mismatch(module)
        if name in names and mismatch is None:
            matching.append(recipe)
        elif name in names and next(module.parameters(), None) is not None:
            near.append(f"recipe {recipe.name!r} knows this class, but {mismatch}")
        elif mismatch is None:
            near.append(
                f"its parameters are those of recipe {recipe.name!r}; if it is that layer, {_how(recipe, name)}"
            )
    return matching, [] if matching else near


def _how(recipe: Recipe, class_name: str) -> str:
    """What to do so that a recipe knows one more class."""
    if recipe not in RECIPES:
        return f"add {class_name!r} to the classes of that recipe"
    return (
        "pass recipes=recipes after\n    import dataclasses\n    from fastcaps.convert import RECIPES\n"
        f"    known = next(recipe for recipe in RECIPES if recipe.name == {recipe.name!r})\n"
        f"    recipes = (*RECIPES, dataclasses.replace(known, classes={class_name!r}))"
    )


@contextlib.contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, no gradient, the random state as it was: running the model leaves no trace."""
    training = {module: module.training for module in model.modules()}
    try:
        with torch.no_grad(), torch.random.fork_rng(list(range(torch.cuda.device_count()))):
            model.eval()
            yield
    finally:
        for module, mode in training.items():
            module.training = mode


def _calls_of(model: nn.Module, sample: Any, layers: list[nn.Module]) -> dict[nn.Module, tuple[Any, Any]]:
    """Run the model and keep with what each layer was called first."""
    calls: dict[nn.Module, tuple[Any, Any]] = {}

    def keep(module: nn.Module, args: Any, kwargs: Any) -> None:
        calls.setdefault(
            module, torch.utils._pytree.tree_map_only(Tensor, lambda t: t.detach().clone(), (args, kwargs))
        )

    hooks = [layer.register_forward_pre_hook(keep, with_kwargs=True) for layer in layers]
    args, kwargs = (
        (sample, {}) if isinstance(sample, tuple) else ((), sample) if isinstance(sample, Mapping) else ((sample,), {})
    )
    inner = model
    while type(inner).__name__ in ("DataParallel", "DistributedDataParallel", "OptimizedModule"):
        inner = inner._orig_mod if hasattr(inner, "_orig_mod") else inner.module  # type: ignore[assignment]
    try:
        with _evaluating(model):
            inner(*args, **kwargs)
    except Exception as error:
        raise ValueError(f"the model cannot run on the sample: {type(error).__name__}: {error}") from error
    finally:
        for hook in hooks:
            hook.remove()
    return calls


def _replace_one(
    path: str,
    layer: nn.Module,
    matching: list[Recipe],
    calls: dict[nn.Module, tuple[Any, Any]],
    fix: bool,
    measure: bool,
) -> LayerReport:
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
    with torch.random.fork_rng(list(range(torch.cuda.device_count()))):
        try:
            verdict = verify(layer, recipe, args, kwargs, wanted)
            if verdict.refused is None:
                before = _cost(layer, args, kwargs) if measure else None
                _convert(layer, Plan.of(wanted, layer))
        except Exception as error:  # other people's code; layers before this one are converted already
            verdict = Verdict(f"it could not be compared: {type(error).__name__}: {error}")
        if verdict.refused is not None:
            return _report(path, name, recipe, verdict)
        after = _cost(layer, args, kwargs) if measure else None
    effects = recipe.convention.effects
    if effects:
        text = "reproduced in plain PyTorch; fix=True routes as in the paper"
        if fix:
            text = "it was as its recipe says, and routes as in the paper from now on: measure the accuracy again"
        verdict = replace(verdict, notes=(*verdict.notes, f"{WARNED}{'; '.join(effects)}; {text}"))
    return _report(path, name, recipe, verdict, before, after)


def _ambiguous(matching: list[Recipe]) -> str:
    names = [repr(recipe.name) for recipe in matching]
    built_in = [recipe.name for recipe in matching if recipe in RECIPES]
    text = f"the recipes {' and '.join(names)} both describe it: pass only the one that is meant"
    if not 0 < len(built_in) < len(names):
        return text
    return f"{text}, or the others without it: recipes=(*(r for r in RECIPES if r.name not in {built_in}), yours)"


def _report(
    path: str, name: str, recipe: Recipe, verdict: Verdict, before: Cost | None = None, after: Cost | None = None
) -> LayerReport:
    done, errors = verdict.refused is None, (verdict.output, verdict.gradient)
    return LayerReport(path, name, recipe.name, done, verdict.refused, *errors, before, after, verdict.notes)


def _cost(layer: nn.Module, args: Any, kwargs: Any) -> Cost | None:
    """Time and memory of forward and backward of a copy, at the sample's size; None where that does not work."""
    leaves = [t for t in torch.utils._pytree.tree_leaves((args, kwargs)) if _is_floating(t)]

    def step() -> None:
        out = torch.utils._pytree.tree_leaves(twin(*args, **kwargs))
        v = [o for o in out if _is_floating(o) and o.requires_grad]
        torch.autograd.grad(v, [*leaves, *twin.parameters()], [torch.ones_like(o) for o in v], allow_unused=True)

    try:
        tensor = next(layer.parameters())
        twin = detached_copy(layer, tensor.dtype)
        for leaf in leaves:
            leaf.requires_grad_()
        with torch.enable_grad():
            return training_cost(step, tensor.device)
    except Exception:  # most likely out of memory; whatever it is, the report is worth more than this number
        return None
    finally:
        for leaf in leaves:
            leaf.requires_grad_(False)


def _is_floating(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()
