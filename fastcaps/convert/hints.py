"""Hints for layers that no recipe is known for: what was tried, and what would describe them."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.nn.parameter import is_lazy

from fastcaps.convert.comparison import verify
from fastcaps.convert.converted import ConvertedCapsules
from fastcaps.convert.guess import guess
from fastcaps.convert.modules import Calls, first_calls, random_state_kept
from fastcaps.convert.recipes import RECIPES, Recipe
from fastcaps.convert.softmaxes import SoftmaxWatch
from fastcaps.layers import CapsuleLayer

SHOWN = 5  # modules that are named
TWO_LINES = """
    from fastcaps.convert import RECIPES, Recipe
    recipes = (*RECIPES, {recipe})"""


class SoftmaxTakers(SoftmaxWatch):
    """Records which modules take a softmax; inside, those of PyTorch count as a part of the module that calls them.

    Attributes:
        modules: the modules, without their order.
    """

    def __init__(self) -> None:
        super().__init__()
        self.modules: set[nn.Module] = set()
        self._stack: list[nn.Module] = []

    def __enter__(self) -> "SoftmaxTakers":
        def before(module: nn.Module, args: Any) -> None:
            if not type(module).__module__.startswith("torch."):
                self._stack.append(module)

        def after(module: nn.Module, args: Any, output: Any) -> None:
            if self._stack and self._stack[-1] is module:
                self._stack.pop()

        self._hooks = [register_module_forward_pre_hook(before), register_module_forward_hook(after)]
        super().__enter__()
        return self

    def __exit__(self, *raised: Any) -> None:
        for hook in self._hooks:
            hook.remove()
        self._stack.clear()
        super().__exit__(*raised)

    def seen(self, axis: int, result: Tensor, numerator: Tensor | None) -> None:
        """It was the innermost module."""
        self.modules.update(self._stack[-1:])


def hints(
    model: nn.Module,
    sample: Any,
    recipes: Sequence[Recipe],
    found: Mapping[str, Sequence[Recipe]],
    softmaxes: set[nn.Module],
) -> list[str]:
    """What there is to say of modules that may be capsule layers and have no recipe.

    Args:
        model: the model.
        sample: what it is called with.
        recipes: those that there are.
        found: the recipes of the modules that have some, by their paths.
        softmaxes: the modules that take a softmax.
    """
    modules = dict(model.named_modules())
    known = {path for path, m in modules.items() if path in found or isinstance(m, (ConvertedCapsules, CapsuleLayer))}
    around = {outer for path in known for outer in _around(path)}
    left = {path: m for path, m in modules.items() if path not in around and known.isdisjoint(_around(path))}
    similar = [text for path, module in left.items() for text in _other_parameters(path, module, recipes)]
    takers = [path for path, module in left.items() if module in softmaxes]
    tried = {path: [other for other in _around(path) if other in left] for path in takers}
    if not takers:
        return similar
    wanted = {other: modules[other] for others in tried.values() for other in others}
    calls = first_calls(model, sample, list(wanted.values()))
    nothing: list[str] = []
    for taker, paths in tried.items():
        described = _best(_described(path, modules[path], recipes, calls) for path in paths)
        if described is None:
            nothing.append(taker)
        elif described not in similar:
            similar.append(described)
    return similar if found or len(nothing) < len(takers) else [*similar, *_template(nothing, modules)]


def _around(path: str) -> list[str]:
    """A path and those of the modules around it, the model last."""
    parts = path.split(".") if path else []
    return [".".join(parts[:n]) for n in range(len(parts), -1, -1)]


def _label(path: str, module: nn.Module) -> str:
    return f"{path or 'the model'} ({type(module).__name__})"


def _other_parameters(path: str, module: nn.Module, recipes: Sequence[Recipe]) -> Iterator[str]:
    """That a module has the name of a recipe's class, and why it is not that class."""
    named = [recipe for recipe in recipes if type(module).__name__ in recipe.class_names]
    known = [recipe for recipe in named if recipe.mismatch(module) is not None]
    if not known or next(module.parameters(), None) is None:
        return
    reasons = [f"recipe {recipe.name!r} knows this class, but {recipe.mismatch(module)}" for recipe in known[:2]]
    more = f"; and so for {len(known) - 2} more recipes" if len(known) > 2 else ""
    yield f"{_label(path, module)} was not recognised: {'; '.join(reasons)}{more}"


def _best(descriptions: Iterable[tuple[Recipe, str] | None]) -> str | None:
    """The first whose recipe has the weight, so that no votes are made; else the first."""
    first = None
    for recipe, text in filter(None, descriptions):
        if recipe.weight is not None:
            return text
        first = first or text
    return first


def _described(path: str, module: nn.Module, recipes: Sequence[Recipe], calls: Calls) -> tuple[Recipe, str] | None:
    """A recipe of another class, or a combination of conventions, that describes a module, and how to use it."""
    if module not in calls:
        return None
    args, kwargs = calls[module]
    with random_state_kept():
        for recipe in recipes:
            if recipe.mismatch(module) is None and _agrees(module, recipe, args, kwargs):
                advice = _how_to_add(type(module).__name__, recipe)
                text = f"recipe {recipe.name!r} describes it, but does not know its class: {advice}"
                return recipe, f"{_label(path, module)} was not recognised: {text}"
        guessed = suggestion(module, args, kwargs)
    if guessed is None:
        return None
    recipe, text = guessed
    return recipe, f"{_label(path, module)} was not recognised, but {text}"


def suggestion(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Recipe, str] | None:
    """A recipe for a module, and the lines that make it; None where no combination of conventions describes it."""
    try:
        guessed = guess(module, args, kwargs)
    except Exception:  # other people's code, called in ways that it was not made for
        return None
    if guessed is None:
        return None
    return guessed, f"a recipe describes it: pass recipes=recipes after{TWO_LINES.format(recipe=guessed.code())}"


def _agrees(module: nn.Module, recipe: Recipe, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    try:
        return verify(module, recipe, args, kwargs).refused is None
    except Exception:  # other people's code
        return False


def _how_to_add(class_name: str, recipe: Recipe) -> str:
    """What to do so that a recipe knows one more class."""
    if recipe not in RECIPES:
        return f"add {class_name!r} to the classes of that recipe"
    return (
        "pass recipes=recipes after\n    import dataclasses\n    from fastcaps.convert import RECIPES\n"
        f"    known = next(recipe for recipe in RECIPES if recipe.name == {recipe.name!r})\n"
        f"    recipes = (*RECIPES, dataclasses.replace(known, classes={class_name!r}))"
    )


def _template(paths: Sequence[str], modules: Mapping[str, nn.Module]) -> list[str]:
    """Which modules take a softmax, and the lines by which one of them is described."""
    named = [_label(path, modules[path]) for path in paths[:SHOWN]]
    more = f" and {len(paths) - SHOWN} more" if len(paths) > SHOWN else ""
    module = modules[paths[0]]
    sizes = {name: p.numel() for name, p in module.named_parameters() if not is_lazy(p)}
    says = "weight=None, input='B I J D_out'"
    if sizes:
        says = f"weight={max(sizes, key=lambda name: sizes[name])!r}, axes='I J D_out D_in'"
    recipe = f"Recipe({'mine'!r}, {type(module).__name__!r}, {says})"
    return [
        f"a softmax is taken in {', '.join(named)}{more}. If one of these routes capsules, say what its axes are "
        f"and what it does otherwise than the paper (docs/convert.md), and pass recipes=recipes:"
        + TWO_LINES.format(recipe=recipe)
    ]
