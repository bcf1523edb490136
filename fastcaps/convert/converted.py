"""Converted layers: the class that a replaced layer gets, and the plan by which it routes."""

import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from fastcaps.convert.arrangement import Arrangement
from fastcaps.convert.recipes import Recipe, as_tuple, get_path
from fastcaps.functional import compute_dtype, length, without_autocast
from fastcaps.routing import dynamic_routing, route_votes
from fastcaps.routing.conventions import Routed, plain_iterations, plain_routing
from fastcaps.routing.dynamic.reference import Iteration


@dataclass(frozen=True)
class Plan:
    """A recipe, bound to the class of a layer: what a converted layer knows beyond what it was.

    Attributes:
        recipe: the recipe.
        axes: its axes, parsed; none of what a function arranges.
        arguments: the names of the arguments of ``forward``; the first is the poses.
        defaults: the values of those that have one.
        iterations_argument: of the others, the one that holds the number of iterations, or None.
    """

    recipe: Recipe
    axes: Mapping[str, Arrangement]
    arguments: tuple[str, ...]
    defaults: Mapping[str, Any] = field(default_factory=dict)
    iterations_argument: str | None = None

    def __setstate__(self, state: dict[str, Any]) -> None:
        renamed = {"layouts": "axes", "extra": "iterations_argument"}  # in pickles of 0.1
        vars(self).update({renamed.get(name, name): value for name, value in state.items()})
        vars(self)["axes"] = self.recipe.parsed_axes()

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
        sizes = self.sizes(layer, poses)
        tensors, options = self.tensors(layer, poses), self.options(layer, num_iterations)
        results: dict[str, Tensor] = {}
        if "v" in self.recipe.returned or "length" in self.recipe.returned:
            results["v"] = self.routing(**tensors, **options)
        if "s" in self.recipe.returned or "c" in self.recipe.returned:
            results |= self._coupling_and_sum(tensors, options, "s" in self.recipe.returned)
        return self.arranged(results, sizes)

    def arranged(self, results: Mapping[str, Tensor], sizes: Mapping[str, int]) -> Any:
        """What the layer returns, from ``v``, ``s`` and ``c`` in canonical order, as far as it needs them."""
        results = {**results, "length": length(results["v"])} if "length" in self.recipe.returned else results
        wanted = [results[name] for name in self.recipe.returned]
        if callable(self.recipe.output):
            return self.recipe.output(*wanted)
        parts = tuple(self.axes[name].arranged(t, sizes) for name, t in zip(self.recipe.returned, wanted, strict=True))
        return parts if isinstance(self.recipe.output, (tuple, list)) else parts[0]

    def bind(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, int]:
        """The poses as they were given, and T.

        Raises:
            TypeError: there are no poses, or there is an argument that the recipe does not know.
        """
        given = {**dict(zip(self.arguments, args, strict=False)), **kwargs}
        known = {self.arguments[0], self.iterations_argument, *as_tuple(self.recipe.ignored_arguments)}
        unknown = [name for name in given if name not in known and not self.changes_nothing(name, given[name])]
        if len(args) > len(self.arguments) or unknown or self.arguments[0] not in given:
            takes = ", ".join(name for name in self.arguments if name in known)
            raise TypeError(f"a layer converted by recipe {self.recipe.name!r} takes {takes}; got {', '.join(given)}")
        name = self.iterations_argument
        if name is None:
            T = get_path(layer, self.recipe.num_iterations)
        else:
            T = given[name] if name in given else self.defaults[name]
        return given[self.arguments[0]], T + self.recipe.offset

    def changes_nothing(self, name: str, value: Any) -> bool:
        """Whether an argument is the default, or only says where tensors lie."""
        return isinstance(value, torch.device) or (name in self.defaults and equal(value, self.defaults[name]))

    def sizes(self, layer: nn.Module, poses: Tensor | None = None) -> dict[str, int]:
        """``I``, ``J``, ``D_in`` and ``D_out``, as far as the weight, and the poses where they are given, tell them."""
        sizes = {} if self.recipe.out_capsules is None else {"J": int(get_path(layer, self.recipe.out_capsules))}
        if "weight" in self.axes:
            sizes = self.axes["weight"].sizes(get_path(layer, self.recipe.weight), sizes)
        if poses is not None and "input" in self.axes:
            sizes |= self.axes["input"].sizes(poses, sizes, "input")
        return sizes

    def canonical(self, layer: nn.Module, poses: Tensor) -> Tensor:
        """The poses, or the votes, in canonical order."""
        if callable(self.recipe.input):
            return self.recipe.input(poses)
        return self.axes["input"].canonical(poses, self.sizes(layer, poses), "input")

    def tensors(self, layer: nn.Module, poses: Tensor) -> dict[str, Any]:
        """Poses, weight, prior and bias in canonical order: views, but for one copy of a weight that lies otherwise."""
        sizes = self.sizes(layer, poses)

        def optional(name: str, path: str | None) -> Tensor | None:
            return None if path is None else self.axes[name].canonical(get_path(layer, path), sizes, name)

        return {
            "poses": self.canonical(layer, poses),
            "weight": self._weight(layer, sizes),
            "prior": optional("prior", self.recipe.prior),
            "bias": optional("bias", self.recipe.bias),
        }

    def _weight(self, layer: nn.Module, sizes: Mapping[str, int]) -> Tensor | None:
        """``[I or 1, J, D_out, D_in]``, or None where the layer is given the votes."""
        if self.recipe.weight is None:
            return None
        if callable(self.recipe.weight):
            weight = self.recipe.weight(layer)
        else:
            weight = self.axes["weight"].canonical(get_path(layer, self.recipe.weight), sizes)
        return weight.contiguous().expand(-1, sizes.get("J", weight.shape[1]), -1, -1)

    def options(self, layer: nn.Module, num_iterations: int) -> dict[str, Any]:
        """The options of the routing."""
        recipe = self.recipe
        leaky = bool(get_path(layer, recipe.leaky))
        return {"num_iterations": num_iterations, "leaky": leaky, "detach": recipe.detach, "eps": float(recipe.eps)}

    @property
    def routing(self) -> Callable[..., Tensor]:
        """The op, or where the op does not do that, plain PyTorch."""
        convention = self.recipe.convention
        if convention.effects:
            return convention
        return dynamic_routing if self.recipe.weight is not None else _route_votes

    def plain(self, layer: nn.Module, poses: Tensor, num_iterations: int) -> Routed:
        """The same with the votes in memory and exactly as the recipe says; in canonical order."""
        return plain_routing(**self._given_to_plain(layer, poses, num_iterations))

    def plain_iterations(self, layer: nn.Module, poses: Tensor, num_iterations: int) -> Iterator[Iteration]:
        """The iterations of :meth:`plain`."""
        return plain_iterations(**self._given_to_plain(layer, poses, num_iterations))

    def _given_to_plain(self, layer: nn.Module, poses: Tensor, num_iterations: int) -> dict[str, Any]:
        options = self.options(layer, num_iterations)
        return {**self.tensors(layer, poses), **options, "convention": self.recipe.convention}

    def _coupling_and_sum(self, tensors: dict[str, Any], options: dict[str, Any], with_sum: bool) -> dict[str, Tensor]:
        """``c``, and ``s`` where it is wanted, of the last iteration; half types are computed in float32."""
        poses = tensors["poses"]
        dtype = compute_dtype(poses.dtype)
        with without_autocast(poses.device.type):
            exact = {name: None if t is None else t.to(dtype) for name, t in tensors.items()}
            c = self._coupling(exact, options)
            found = {"c": c, "s": _weighted_sum(c, exact)} if with_sum else {"c": c}
        return {name: t.to(poses.dtype) for name, t in found.items()}

    def _coupling(self, tensors: dict[str, Any], options: dict[str, Any]) -> Tensor:
        """The last coupling, with its gradient: a softmax of ``prior + <u, V>``, V the sum of the earlier outputs."""
        x, W = tensors["poses"], tensors["weight"]
        earlier = [
            self.routing(**tensors, **{**options, "num_iterations": t}) for t in range(1, options["num_iterations"])
        ]
        if not earlier:
            J = x.shape[2] if W is None else W.shape[1]
            logits = x.new_zeros(*x.shape[:2], J)
        elif W is None:
            logits = torch.einsum("bijd,bjd->bij", x, torch.stack(earlier).sum(0))
        else:
            logits = torch.einsum("bik,ijdk,bjd->bij", x, _for_each(W, x), torch.stack(earlier).sum(0))
        if self.recipe.logits == "batch":
            logits = logits.mean(0, keepdim=True).expand_as(logits)
        if tensors["prior"] is not None:
            logits = logits + tensors["prior"]
        c = self.recipe.convention.coupling(logits, options["leaky"], may_close=tensors["prior"] is not None)
        return c.detach() if self.recipe.detach else c


def _route_votes(poses: Tensor, weight: None, **options: Any) -> Tensor:
    """:func:`fastcaps.routing.route_votes` with the arguments of ``dynamic_routing``."""
    return route_votes(poses, **options)


def _for_each(weight: Tensor, poses: Tensor) -> Tensor:
    """A weight that may be shared over the input capsules as one of each."""
    return weight.expand(poses.shape[1], -1, -1, -1)


def _weighted_sum(c: Tensor, tensors: dict[str, Any]) -> Tensor:
    """``s``: the votes, which are never held, weighted by ``c [B, I, J]`` and summed, plus the bias."""
    x, W, bias = tensors["poses"], tensors["weight"], tensors["bias"]
    if W is None:
        s = torch.einsum("bij,bijd->bjd", c, x)
    else:  # one product of matrices for each output capsule
        weighted = torch.einsum("bij,bik->jbik", c, x).flatten(2)
        s = (weighted @ _for_each(W, x).permute(1, 0, 3, 2).flatten(1, 2)).transpose(0, 1)
    return s if bias is None else s + bias


def equal(a: Any, b: Any) -> bool:
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
