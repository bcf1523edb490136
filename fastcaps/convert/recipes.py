"""What other people's capsule layers are and compute: recipes, and the layers of public repositories."""

import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from fastcaps._axes import Layout
from fastcaps._checks import check_number
from fastcaps.layers import WEIGHT_AXES
from fastcaps.routing import dynamic_routing
from fastcaps.routing.conventions import CHOICES, Convention, Routed, plain_routing

EPSILONS = (0.0, 1e-16, 1e-12, 1e-10, 1e-9, 1e-8, 1e-7, 1e-6, 1e-5, 1e-4)
POSES_AXES, OUTPUT_AXES, COUPLING_AXES = ("B", "I", "D_in"), ("B", "J", "D_out"), ("B", "I", "J")


@dataclass(frozen=True)
class Recipe:
    """How to recognise a capsule layer, and what it computes.

    A layer is recognised by the name of its class, the names of its parameters (these and no others) and their ranks.
    The defaults are the paper's routing.

    Attributes:
        name: what reports call it.
        classes: the names that the class goes by.
        weight: the weight's name, ``"weight"`` or ``"routing.W"``.
        layout: its axes ``I``, ``J``, ``D_out``, ``D_in``, as in :meth:`fastcaps.CapsuleLayer.from_weight`.
        iterations: T, or the attribute that holds it (read in every call), or the argument of ``forward`` that does.
        offset: added to it.
        out_capsules: J, or the attribute that holds it: where the weight has one axis for ``J`` and ``D_out``, or no J.
        prior: the name of learned initial logits, or None.
        prior_layout: their axes.
        bias: the name of the bias, or None.
        bias_layout: its axes.
        softmax: over which capsules the coupling sums to 1: ``"outputs"``, or ``"inputs"`` (wrong).
        logits: one set for each ``"sample"``, or their mean over the ``"batch"`` (wrong).
        squash: of the ``"norm"``, or ``"elementwise"`` (wrong).
        leaky: as in :func:`fastcaps.dynamic_routing`, or the attribute that holds it.
        detach: whether the coupling is constant for the gradient.
        eps: squash divides by ``sqrt(n^2 + eps)``.
        norm_eps: squash divides by ``n + norm_eps``. The op has no such mode: the layer is recognised with it and
            replaced without it, if that changes outputs and gradients by at most 1e-5 at the model's weights.
        input: the axes of the poses.
        output: the axes of the output; or of the output and the coupling, where the layer returns both.

    Raises:
        TypeError: a layout is no string, or eps no number.
        ValueError: a layout or a choice is unknown, or there are both eps and norm_eps.

    Example:
        >>> Recipe("mine", "MyCapsules", weight="W", layout="J I D_in D_out", iterations="routings").softmax
        'outputs'
    """

    name: str
    classes: str | tuple[str, ...]
    weight: str
    layout: str
    iterations: int | str = 3
    offset: int = 0
    out_capsules: int | str | None = None
    prior: str | None = None
    prior_layout: str = "I J"
    bias: str | None = None
    bias_layout: str = "J D_out"
    softmax: str = "outputs"
    logits: str = "sample"
    squash: str = "norm"
    leaky: bool | str = False
    detach: bool = False
    eps: float = 0.0
    norm_eps: float = 0.0
    input: str = "B I D_in"
    output: str | tuple[str, str] = "B J D_out"

    def __post_init__(self) -> None:
        check_number("eps", self.eps)
        if self.eps and self.norm_eps:
            raise ValueError("eps and norm_eps exclude each other")
        self.convention  # noqa: B018 - raises where a choice is unknown
        self.layouts()

    @property
    def convention(self) -> Convention:
        """What deviates from the paper's routing."""
        return Convention(self.softmax, self.logits, self.squash, self.norm_eps)

    @property
    def parameters(self) -> dict[str, str]:
        """The layout of each parameter, by its name."""
        named = {self.weight: self.layout, self.prior: self.prior_layout, self.bias: self.bias_layout}
        return {name: layout for name, layout in named.items() if name is not None}

    def layouts(self) -> dict[str, Layout]:
        """The parsed layouts of ``weight``, ``prior``, ``bias``, ``input``, ``output`` and ``coupling``."""
        output, coupling = (self.output, None) if isinstance(self.output, str) else self.output
        layouts = {
            "weight": Layout.parse(self.layout, WEIGHT_AXES, ("D_in", "D_out")),
            "prior": Layout.parse(self.prior_layout, ("I", "J"), ("I", "J")),
            "bias": Layout.parse(self.bias_layout, ("J", "D_out"), ("J", "D_out")),
            "input": Layout.parse(self.input, POSES_AXES, POSES_AXES),
            "output": Layout.parse(output, OUTPUT_AXES, OUTPUT_AXES),
        }
        if coupling is not None:
            layouts["coupling"] = Layout.parse(coupling, COUPLING_AXES, COUPLING_AXES)
        return layouts

    def mismatch(self, layer: nn.Module) -> str | None:
        """Why a layer is not what this recipe describes, apart from the name of its class; None where it is."""
        have = dict(layer.named_parameters())
        want = {name: len(Layout.parse(text, WEIGHT_AXES, ()).groups) for name, text in self.parameters.items()}
        if have.keys() != want.keys():
            return f"its parameters are {', '.join(have) or 'none'}, not {', '.join(want)}"
        for name, axes in want.items():
            if is_lazy(have[name]):
                return f"{name} has no shape yet: call the model once"
            if have[name].dim() != axes:
                return f"{name} has {have[name].dim()} axes, not {axes}"
        arguments = inspect.signature(type(layer).forward).parameters
        for path in (self.iterations, self.out_capsules, self.leaky):
            if isinstance(path, str) and path not in arguments and get_path(layer, path, None) is None:
                return f"it has no attribute {path}"
        return None


RECIPES: tuple[Recipe, ...] = (
    Recipe("capsule", "Capsule", "weights", "1 I J D_out D_in", iterations="num_routing", eps=1e-8),
    Recipe(
        "xifengguo", "DenseCapsule", "weight", "J I D_out D_in", iterations="routings", detach=True, norm_eps=1e-8
    ),
    Recipe(
        "gram-ai", "CapsuleLayer", "route_weights", "J I D_in D_out",
        iterations="num_iterations", softmax="inputs", output="J B 1 1 D_out",
    ),
    Recipe(  # an earlier state of the same repository
        "gram-ai-prior", "CapsuleLayer", "route_weights", "J I D_in D_out", prior="route_logits",
        prior_layout="J 1 I 1 1", iterations="num_iterations", softmax="inputs", output="J B 1 1 D_out",
    ),
    Recipe(
        "adambielski", "CapsLayer", "weights", "I D_in (J D_out)", out_capsules="output_caps",
        iterations="routing_module.n_iterations", offset=1, prior="routing_module.b",
    ),
    Recipe(  # and jindongwang
        "higgsfield", "DigitCaps", "W", "1 I J D_out D_in",
        softmax="inputs", logits="batch", squash="elementwise", output="B J D_out 1",
    ),
    Recipe(
        "cedrickchee", "CapsuleLayer", "weight", "1 I J D_out D_in",
        iterations="num_routing", logits="batch", input="B D_in I", output="B J D_out 1",
    ),
    Recipe(
        "danielhavir", "RoutingCapsules", "W", "1 J I D_out D_in",
        iterations="num_routing", detach=True, norm_eps=1e-8,
    ),
    Recipe(
        "readable_capsnet", ("CapsuleLayerWithRouting", "Capsule2Capsule", "CapsuleLayerCalled"),
        "input_caps2U.weight", "I D_in J D_out", iterations="routing_iterations",
    ),
    Recipe(  # the authors' TensorFlow layer, in PyTorch
        "sabour", "CapsuleLayer", "weights", "I D_in (J D_out)", out_capsules="output_dim",
        iterations="num_routing", bias="biases", leaky="leaky",
    ),
)  # fmt: skip


def get_path(layer: nn.Module, path: Any, *default: Any) -> Any:
    """The attribute of a dotted path, or the value itself where it is no path."""
    if not isinstance(path, str):
        return path
    value: Any = layer
    for name in path.split("."):
        value = getattr(value, name, *default)
    return value


def _same(a: Any, b: Any) -> bool:
    """Whether two arguments are equal; what cannot be compared is not."""
    try:
        return a is b or (torch.equal(a, b) if isinstance(a, Tensor) else bool(a == b))
    except Exception:
        return False


def set_path(layer: nn.Module, path: str, value: Any) -> None:
    """Set the attribute of a dotted path."""
    *parents, name = path.split(".")
    setattr(get_path(layer, ".".join(parents)) if parents else layer, name, value)


def variants(recipe: Recipe, num_iterations: int) -> Iterator[tuple[str, Recipe]]:
    """The recipe with one flag changed, and how to say so; none routes less than once."""
    changes: list[tuple[str, Any]] = [
        (name, choice) for name, choices in CHOICES.items() for choice in choices if choice != getattr(recipe, name)
    ]
    changes += [("detach", not recipe.detach)]
    changes += [("leaky", value) for value in (True, False) if value is not recipe.leaky]
    changes += [("offset", recipe.offset + step) for step in (-1, 1, -2, 2) if num_iterations + step > 0]
    changes += [(name, e) for name in ("eps", "norm_eps") for e in EPSILONS if e != getattr(recipe, name)]
    changes += [("layout", swapped) for swapped in _swaps(recipe.layout, ("I", "J"), ("D_in", "D_out"), ("J", "D_out"))]
    changes += [("input", swapped) for swapped in _swaps(recipe.input, ("I", "D_in"), ("B", "I"))]
    if isinstance(recipe.output, str):
        changes += [("output", swapped) for swapped in _swaps(recipe.output, ("J", "D_out"), ("B", "J"))]
    if recipe.prior is not None:
        changes += [("prior", None)] + [("prior_layout", s) for s in _swaps(recipe.prior_layout, ("I", "J"))]
    if recipe.bias is not None:
        changes += [("bias", None)] + [("bias_layout", s) for s in _swaps(recipe.bias_layout, ("J", "D_out"))]
    for name, value in changes:
        other = {"eps": "norm_eps", "norm_eps": "eps"}.get(name)
        if other is not None and value and getattr(recipe, other):  # one or the other
            yield f"{name}={value!r} and {other}=0", replace(recipe, **{name: value, other: 0.0})
        else:
            yield f"{name}={value!r} instead of {getattr(recipe, name)!r}", replace(recipe, **{name: value})


def _swaps(layout: str, *pairs: tuple[str, str]) -> Iterator[str]:
    """The layout with two axes exchanged."""
    for a, b in pairs:
        table = {a: b, b: a}
        words = layout.replace("(", "( ").replace(")", " )").split()
        swapped = " ".join(table.get(word, word) for word in words).replace("( ", "(").replace(" )", ")")
        if swapped != layout:
            yield swapped


# ------------------------------------------------------------------------------------------------ the layer itself


@dataclass(frozen=True)
class Plan:
    """A recipe, bound to the class of a layer: what a converted layer knows beyond what it was.

    Attributes:
        recipe: the recipe.
        layouts: its layouts, parsed.
        arguments: the names of the arguments of ``forward``; the first is the poses.
        defaults: the values of those that have one.
        extra: of the others, the one that holds the iterations, or None.
    """

    recipe: Recipe
    layouts: Mapping[str, Layout]
    arguments: tuple[str, ...]
    defaults: Mapping[str, Any] = field(default_factory=dict)
    extra: str | None = None

    @classmethod
    def of(cls, recipe: Recipe, layer: nn.Module) -> "Plan":
        """Bind a recipe to the class of a layer."""
        parameters = list(inspect.signature(type(layer).forward).parameters.values())[1:]
        names = tuple(p.name for p in parameters)
        defaults = {p.name: p.default for p in parameters if p.default is not p.empty}
        given = isinstance(recipe.iterations, str) and recipe.iterations in names[1:]
        return cls(recipe, recipe.layouts(), names, defaults, str(recipe.iterations) if given else None)

    def call(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What ``forward`` of a converted layer does."""
        poses, num_iterations = self.bind(layer, args, kwargs)
        tensors, options = self.tensors(layer, poses), self.options(layer, num_iterations)
        v = self.routing(**tensors, **options)
        if "coupling" in self.layouts:
            return self.layouts["output"].arranged(v), self._coupling(tensors, options)
        return self.layouts["output"].arranged(v)

    def bind(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, int]:
        """The poses as they were given, and T.

        Raises:
            TypeError: there are no poses, or there is an argument that the recipe does not know.
        """
        given = {**dict(zip(self.arguments, args, strict=False)), **kwargs}
        known = {self.arguments[0], self.extra}
        unknown = [name for name in given if name not in known and not _same(given[name], self.defaults.get(name))]
        if len(args) > len(self.arguments) or unknown or self.arguments[0] not in given:
            takes = ", ".join(name for name in self.arguments if name in known)
            raise TypeError(f"a layer converted by recipe {self.recipe.name!r} takes {takes}; got {', '.join(given)}")
        if self.extra is not None:
            T = given[self.extra] if self.extra in given else self.defaults[self.extra]
        else:
            T = get_path(layer, self.recipe.iterations)
        return given[self.arguments[0]], T + self.recipe.offset

    def sizes(self, layer: nn.Module) -> dict[str, int]:
        """``I``, ``J``, ``D_in`` and ``D_out``, as far as the weight tells them."""
        sizes = {} if self.recipe.out_capsules is None else {"J": int(get_path(layer, self.recipe.out_capsules))}
        self.layouts["weight"].canonical(get_path(layer, self.recipe.weight), sizes)
        return sizes

    def tensors(self, layer: nn.Module, poses: Tensor) -> dict[str, Any]:
        """Poses, weight, prior and bias in canonical order: views, but for one copy of a weight that lies otherwise."""
        sizes = self.sizes(layer)
        weight = self.layouts["weight"].canonical(get_path(layer, self.recipe.weight), sizes)
        return {
            "poses": self.layouts["input"].canonical(poses, dict(sizes), "input"),
            "weight": weight.contiguous().expand(-1, sizes.get("J", 1), -1, -1),
            "prior": self._extra(layer, "prior", self.recipe.prior, sizes),
            "bias": self._extra(layer, "bias", self.recipe.bias, sizes),
        }

    def _extra(self, layer: nn.Module, name: str, path: str | None, sizes: dict[str, int]) -> Tensor | None:
        return None if path is None else self.layouts[name].canonical(get_path(layer, path), dict(sizes), name)

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
        c = self.recipe.convention.coupling(logits, options["leaky"])
        return self.layouts["coupling"].arranged(c.detach() if self.recipe.detach else c)
