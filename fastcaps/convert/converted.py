"""Converted layers: the class that a replaced layer gets, and the plan by which it routes."""

import functools
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from fastcaps._axes import Axes
from fastcaps.convert.recipes import Recipe, get_path
from fastcaps.routing import dynamic_routing
from fastcaps.routing.conventions import Routed, plain_routing


@dataclass(frozen=True)
class Plan:
    """A recipe, bound to the class of a layer: what a converted layer knows beyond what it was.

    Attributes:
        recipe: the recipe.
        axes: its axes, parsed.
        arguments: the names of the arguments of ``forward``; the first is the poses.
        defaults: the values of those that have one.
        iterations_argument: of the others, the one that holds the number of iterations, or None.
    """

    recipe: Recipe
    axes: Mapping[str, Axes]
    arguments: tuple[str, ...]
    defaults: Mapping[str, Any] = field(default_factory=dict)
    iterations_argument: str | None = None

    def __setstate__(self, state: dict[str, Any]) -> None:
        renamed = {"layouts": "axes", "extra": "iterations_argument"}  # in pickles of 0.1
        vars(self).update({renamed.get(name, name): value for name, value in state.items()})

    @classmethod
    def of(cls, recipe: Recipe, layer: nn.Module) -> "Plan":
        """Bind a recipe to the class of a layer."""
        parameters = list(inspect.signature(type(layer).forward).parameters.values())[1:]
        names = tuple(p.name for p in parameters)
        defaults = {p.name: p.default for p in parameters if p.default is not p.empty}
        T = recipe.num_iterations
        return cls(recipe, recipe.parsed_axes(), names, defaults, T if isinstance(T, str) and T in names[1:] else None)

    def forward(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What ``forward`` of a converted layer does."""
        poses, num_iterations = self.bind(layer, args, kwargs)
        tensors, options = self.tensors(layer, poses), self.options(layer, num_iterations)
        v = self.routing(**tensors, **options)
        if "coupling" in self.axes:
            return self.axes["output"].arranged(v), self._coupling(tensors, options)
        return self.axes["output"].arranged(v)

    def bind(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, int]:
        """The poses as they were given, and T.

        Raises:
            TypeError: there are no poses, or there is an argument that the recipe does not know.
        """
        given = {**dict(zip(self.arguments, args, strict=False)), **kwargs}
        known = {self.arguments[0], self.iterations_argument}
        unknown = [name for name in given if name not in known and not _equal(given[name], self.defaults.get(name))]
        if len(args) > len(self.arguments) or unknown or self.arguments[0] not in given:
            takes = ", ".join(name for name in self.arguments if name in known)
            raise TypeError(f"a layer converted by recipe {self.recipe.name!r} takes {takes}; got {', '.join(given)}")
        name = self.iterations_argument
        if name is None:
            T = get_path(layer, self.recipe.num_iterations)
        else:
            T = given[name] if name in given else self.defaults[name]
        return given[self.arguments[0]], T + self.recipe.offset

    def sizes(self, layer: nn.Module) -> dict[str, int]:
        """``I``, ``J``, ``D_in`` and ``D_out``, as far as the weight tells them."""
        known = {} if self.recipe.out_capsules is None else {"J": int(get_path(layer, self.recipe.out_capsules))}
        return self.axes["weight"].sizes(get_path(layer, self.recipe.weight), known)

    def tensors(self, layer: nn.Module, poses: Tensor) -> dict[str, Any]:
        """Poses, weight, prior and bias in canonical order: views, but for one copy of a weight that lies otherwise."""
        sizes = self.sizes(layer)
        weight = self.axes["weight"].canonical(get_path(layer, self.recipe.weight), sizes)

        def optional(name: str, path: str | None) -> Tensor | None:
            return None if path is None else self.axes[name].canonical(get_path(layer, path), sizes, name)

        return {
            "poses": self.axes["input"].canonical(poses, sizes, "input"),
            "weight": weight.contiguous().expand(-1, sizes.get("J", 1), -1, -1),
            "prior": optional("prior", self.recipe.prior),
            "bias": optional("bias", self.recipe.bias),
        }

    def options(self, layer: nn.Module, num_iterations: int) -> dict[str, Any]:
        """The options of the routing."""
        recipe = self.recipe
        leaky = bool(get_path(layer, recipe.leaky))
        return {"num_iterations": num_iterations, "leaky": leaky, "detach": recipe.detach, "eps": float(recipe.eps)}

    @property
    def routing(self) -> Callable[..., Tensor]:
        """The op, or where the op does not do that, plain PyTorch."""
        convention = self.recipe.convention
        return convention if convention.effects else dynamic_routing

    def plain(self, layer: nn.Module, poses: Tensor, num_iterations: int) -> Routed:
        """The same with the votes in memory and exactly as the recipe says; in canonical order."""
        options, convention = self.options(layer, num_iterations), self.recipe.convention
        return plain_routing(**self.tensors(layer, poses), convention=convention, **options)

    def _coupling(self, tensors: dict[str, Any], options: dict[str, Any]) -> Tensor:
        """The last coupling, with its gradient: a softmax of ``prior + <u, V>``, V the sum of the earlier outputs."""
        earlier = [
            self.routing(**tensors, **{**options, "num_iterations": t}) for t in range(1, options["num_iterations"])
        ]
        x, W = tensors["poses"], tensors["weight"].expand(tensors["poses"].shape[1], -1, -1, -1)
        V = torch.stack(earlier).sum(0) if earlier else x.new_zeros(x.shape[0], *W.shape[1:3])
        logits = torch.einsum("bik,ijdk,bjd->bij", x, W, V)
        if self.recipe.logits == "batch":
            logits = logits.mean(0, keepdim=True).expand_as(logits)
        if tensors["prior"] is not None:
            logits = logits + tensors["prior"]
        c = self.recipe.convention.coupling(logits, options["leaky"], may_close=tensors["prior"] is not None)
        return self.axes["coupling"].arranged(c.detach() if self.recipe.detach else c)


def _equal(a: Any, b: Any) -> bool:
    """Whether two arguments are equal; what cannot be compared is not."""
    try:
        return a is b or (torch.equal(a, b) if isinstance(a, Tensor) else bool(a == b))
    except Exception:
        return False


class ConvertedCapsules:
    """What :func:`replace_capsules` makes of a layer: a subclass of the layer's own class, routed by fastcaps.

    Parameters, names, attributes, hooks and the methods beside ``forward`` are the old layer's. It can be copied, and
    pickled where its old class can.
    """

    _fastcaps_plan: Plan

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the old layer's ``forward`` takes and returns."""
        return self._fastcaps_plan.forward(self, args, kwargs)  # type: ignore[arg-type]

    def __reduce__(self) -> tuple[Any, ...]:
        return _unpickled, (_old_class(self), self._fastcaps_plan), self.__getstate__()  # type: ignore[attr-defined]


def convert_layer(layer: Any, plan: Plan) -> None:
    """Convert a layer in place, so that everything that holds it keeps it."""
    old: Any = type(layer)
    layer.__class__ = _converted_class(old)
    layer.__dict__["_fastcaps_plan"] = plan


def restore_layer(layer: Any) -> None:
    """Give a converted layer its old class back."""
    layer.__class__ = _old_class(layer)
    del layer.__dict__["_fastcaps_plan"]


@functools.cache
def _converted_class(old: Any) -> Any:
    return type(f"Fused{old.__name__}", (ConvertedCapsules, old), {"__module__": __name__})


def _old_class(layer: Any) -> Any:
    return type(layer).__mro__[2]  # after the converted class itself and ConvertedCapsules


def _unpickled(old: type, plan: Plan) -> Any:
    """A converted layer without attributes; pickles name this function, those of 0.1 as ``fastcaps.convert``'s."""
    layer = object.__new__(_converted_class(old))
    layer.__dict__["_fastcaps_plan"] = plan  # the old class says what else is pickled
    return layer
