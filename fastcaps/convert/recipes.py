"""What other people's capsule layers are and compute: recipes, and the layers of public repositories."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from fastcaps._checks import check_number
from fastcaps._deprecated import renamed_arguments, warn_renamed
from fastcaps.convert.arrangement import Arrangement, input_axes
from fastcaps.layers import WEIGHT_AXES
from fastcaps.routing.conventions import Convention

POSES_AXES, VOTES_AXES = ("B", "I", "D_in"), ("B", "I", "J", "D_out")
RETURNS = {  # what a layer may return, and its axes
    "v": ("B", "J", "D_out"),
    "s": ("B", "J", "D_out"),
    "c": ("B", "I", "J"),
    "length": ("B", "J"),
}
LARGEST_TOLERANCE = 1e-3  # beyond it one iteration more or less could pass

RENAMED = {  # the names of 0.1
    "layout": "axes",
    "iterations": "num_iterations",
    "prior_layout": "prior_axes",
    "bias_layout": "bias_axes",
}


@dataclass(frozen=True)
class Recipe:
    """How to recognise a capsule layer, and what it computes.

    A layer is recognised by the name of its class, the names of its parameters (these and no others) and their ranks.
    The defaults are the paper's routing. Where axes are asked for, ``I1 I2`` instead of ``I`` are input capsules that
    lie on several axes.

    Attributes:
        name: what reports call it.
        classes: the names that the class goes by.
        weight: the weight's name, ``"weight"`` or ``"routing.W"``; or a function of the layer that gives it as
            ``[I, J, D_out, D_in]``, each of ``I`` and ``J`` may be 1; None: the layer is given the votes.
        axes: its axes ``I``, ``J``, ``D_out``, ``D_in``, as in :meth:`fastcaps.CapsuleLayer.from_weight`; None where
            the weight has no name.
        num_iterations: T, or the attribute that holds it (read in every call), or the argument of ``forward`` that
            does, or a function of the layer.
        offset: added to it.
        out_capsules: J, or the attribute that holds it, or a function of the layer: where the weight has one axis for
            ``J`` and ``D_out``, or no J.
        prior: the name of learned initial logits, or None.
        prior_axes: their axes.
        bias: the name of the bias, or None.
        bias_axes: its axes.
        softmax: over which capsules the coupling sums to 1: ``"outputs"``, or ``"inputs"`` (wrong).
        logits: one set for each ``"sample"``, or their mean over the ``"batch"`` (wrong).
        squash: of the ``"norm"`` of a pose, ``"elementwise"`` (wrong), or of the norm over the ``"outputs"`` (wrong).
        leaky: as in :func:`fastcaps.dynamic_routing`, or the attribute that holds it.
        detach: whether the coupling is constant for the gradient.
        eps: squash divides by ``sqrt(n^2 + eps)``.
        norm_eps: squash divides by ``n + norm_eps``. The op has no such mode: the layer is recognised with it and
            replaced without it, if that changes outputs and gradients by at most 1e-5 at the model's weights.
        input: the axes of the poses, or of the votes; or a function that gives what the layer is called with, batch
            first, as ``[B, I, D_in]`` or ``[B, I, J, D_out]``.
        output: the axes of what is returned, one string for each of ``returns``; or a function of these tensors in
            canonical order that gives what the layer returns.
        returns: ``"v"``, the poses ``[B, J, D_out]``; ``"s"``, the last weighted sum, before squash; ``"c"``, the last
            coupling ``[B, I, J]``; ``"length"``, the lengths of the poses ``[B, J]``; or a tuple of these.
        ignored_arguments: arguments of ``forward`` that change nothing, whatever they are: a layer that computes
            something else with other numbers, flags or tensors is left as it was. A ``torch.device`` is ignored without
            being named.
        unused: parameters, or submodules with all of theirs, that ``forward`` does not use.
        tolerance: what outputs and gradients may differ by, where the layer has an epsilon that no recipe can say;
            0: 1e-9. It is not applied to weights that make capsules short: there only an epsilon counts.

    Raises:
        TypeError: axes are no string, or eps no number.
        ValueError: an axis or a choice is unknown, axes are missing, there are both eps and norm_eps, or the tolerance
            is above 1e-3.

    Example:
        >>> Recipe("mine", "MyCapsules", weight="W", axes="J I D_in D_out", num_iterations="routings").softmax
        'outputs'
    """

    name: str
    classes: str | tuple[str, ...]
    weight: str | Callable[[nn.Module], Tensor] | None
    axes: str | None = None
    num_iterations: int | str | Callable[[nn.Module], int] = 3
    offset: int = 0
    out_capsules: int | str | Callable[[nn.Module], int] | None = None
    prior: str | None = None
    prior_axes: str = "I J"
    bias: str | None = None
    bias_axes: str = "J D_out"
    softmax: str = "outputs"
    logits: str = "sample"
    squash: str = "norm"
    leaky: bool | str = False
    detach: bool = False
    eps: float = 0.0
    norm_eps: float = 0.0
    input: str | Callable[[Tensor], Tensor] = "B I D_in"
    output: str | tuple[str, ...] | Callable[..., Any] = "B J D_out"
    returns: str | tuple[str, ...] = "v"
    ignored_arguments: str | tuple[str, ...] = ()
    unused: str | tuple[str, ...] = ()
    tolerance: float = 0.0

    def __post_init__(self) -> None:
        check_number("eps", self.eps)
        check_number("tolerance", self.tolerance)
        if self.eps and self.norm_eps:
            raise ValueError("eps and norm_eps exclude each other")
        if self.tolerance > LARGEST_TOLERANCE:
            raise ValueError(f"tolerance must be at most {LARGEST_TOLERANCE:g}, got {self.tolerance:g}")
        if isinstance(self.weight, str) != (self.axes is not None):
            wanted = "axes of the weight" if isinstance(self.weight, str) else "no axes without the name of a weight"
            raise ValueError(f"a recipe with weight={self.weight!r} needs {wanted}, got axes={self.axes!r}")
        if not set(self.returned) <= RETURNS.keys():
            raise ValueError(f"returns must be of {', '.join(map(repr, RETURNS))}, got {self.returns!r}")
        if not callable(self.output) and len(as_tuple(self.output)) != len(self.returned):
            raise ValueError(f"output must have axes for each of {', '.join(self.returned)}, got {self.output!r}")
        self.convention  # noqa: B018 - raises where a choice is unknown
        self.parsed_axes()

    def __getattr__(self, name: str) -> Any:
        if name not in RENAMED:
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        warn_renamed(f"Recipe.{name}", f"Recipe.{RENAMED[name]}")
        return getattr(self, RENAMED[name])

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update({RENAMED.get(name, name): value for name, value in state.items()})

    @property
    def convention(self) -> Convention:
        """What deviates from the paper's routing."""
        return Convention(self.softmax, self.logits, self.squash, self.norm_eps)

    @property
    def class_names(self) -> tuple[str, ...]:
        """The names that the class goes by."""
        return as_tuple(self.classes)

    @property
    def returned(self) -> tuple[str, ...]:
        """The names of what the layer returns."""
        if self.returns == "v" and isinstance(self.output, tuple) and len(self.output) == 2:
            return ("v", "c")  # as recipes of 0.1 say it
        return as_tuple(self.returns)

    def code(self) -> str:
        """The call that makes this recipe, without what is the default."""
        values = {field: getattr(self, field.name) for field in fields(self)[2:]}
        given = [f"{field.name}={value!r}" for field, value in values.items() if value != field.default]
        return f"Recipe({', '.join([repr(self.name), repr(self.classes), *given])})"

    def is_unused(self, name: str) -> bool:
        """Whether a parameter is one of those that ``forward`` does not use."""
        return any(name == other or name.startswith(f"{other}.") for other in as_tuple(self.unused))

    def parsed_axes(self) -> dict[str, Arrangement]:
        """The parsed axes of ``weight``, ``prior``, ``bias``, ``input`` and of what is returned, by name.

        What a function arranges has none.
        """
        outputs = () if callable(self.output) else as_tuple(self.output)
        inputs = input_axes(self.axes, self.input, self.prior_axes, *outputs)
        poses = VOTES_AXES if self.weight is None else POSES_AXES
        axes = {
            "prior": Arrangement.parse(self.prior_axes, ("I", "J"), ("I", "J"), _if_named(inputs, self.prior_axes)),
            "bias": Arrangement.parse(self.bias_axes, ("J", "D_out"), ("J", "D_out"), inputs),
        }
        if self.axes is not None:
            axes["weight"] = Arrangement.parse(self.axes, WEIGHT_AXES, ("D_in", "D_out"), _if_named(inputs, self.axes))
        if not callable(self.input):
            axes["input"] = Arrangement.parse(self.input, poses, poses, _if_named(inputs, self.input))
        for name, text in zip(self.returned, outputs, strict=False):
            axes[name] = Arrangement.parse(text, RETURNS[name], RETURNS[name], _if_named(inputs, text))
        return axes

    def mismatch(self, layer: nn.Module) -> str | None:
        """Why a layer is not what this recipe describes, apart from the name of its class; None where it is."""
        have = {name: p for name, p in layer.named_parameters() if not self.is_unused(name)}
        axes = self.parsed_axes()
        named = {"weight": self.weight, "prior": self.prior, "bias": self.bias}
        want = {path: len(axes[name].axes.groups) for name, path in named.items() if isinstance(path, str)}
        if not callable(self.weight) and have.keys() != want.keys():
            return f"its parameters are {_few(list(have))}, not {_few(list(want))}"
        for name, rank in want.items():
            if name not in have:
                return f"it has no parameter {name}"
            if is_lazy(have[name]):
                return f"{name} has no shape yet: call the model once"
            if have[name].dim() != rank:
                return f"{name} has {have[name].dim()} axes, not {rank}"
        arguments = inspect.signature(type(layer).forward).parameters
        for path in (self.num_iterations, self.out_capsules, self.leaky):
            if isinstance(path, str) and path not in arguments and get_path(layer, path, None) is None:
                return f"it has no attribute {path}"
        return None


def as_tuple(value: Any) -> tuple[Any, ...]:
    """Several things as a tuple, and a single one as a tuple of one."""
    return tuple(value) if isinstance(value, (tuple, list)) else (value,)


def _if_named(inputs: tuple[str, ...], text: str) -> tuple[str, ...]:
    """The axes of the input capsules for a text that may also say ``I`` for all of them."""
    return ("I",) if "I" in text.replace("(", " ").replace(")", " ").split() else inputs


def _few(names: list[str], most: int = 4) -> str:
    """The first of these names, and how many there are besides."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return f"{', '.join(names[:most]) or 'none'}{more}"


Recipe.__init__ = renamed_arguments(**RENAMED)(Recipe.__init__)  # type: ignore[method-assign]


def get_path(layer: nn.Module, path: Any, *default: Any) -> Any:
    """The attribute of a dotted path, what a function gives, or the value itself where it is neither."""
    if not isinstance(path, str):
        return path(layer) if callable(path) else path
    value: Any = layer
    for name in path.split("."):
        value = getattr(value, name, *default)
    return value


def set_path(layer: nn.Module, path: str, value: Any) -> None:
    """Set the attribute of a dotted path."""
    *parents, name = path.split(".")
    setattr(get_path(layer, ".".join(parents)) if parents else layer, name, value)


RECIPES: tuple[Recipe, ...] = (
    Recipe("capsule", "Capsule", "weights", "1 I J D_out D_in", num_iterations="num_routing", eps=1e-8),
    Recipe(
        "xifengguo", "DenseCapsule", "weight", "J I D_out D_in", num_iterations="routings", detach=True, norm_eps=1e-8
    ),
    Recipe(
        "gram-ai", "CapsuleLayer", "route_weights", "J I D_in D_out",
        num_iterations="num_iterations", softmax="inputs", output="J B 1 1 D_out",
    ),
    Recipe(  # an earlier state of the same repository
        "gram-ai-prior", "CapsuleLayer", "route_weights", "J I D_in D_out", prior="route_logits",
        prior_axes="J 1 I 1 1", num_iterations="num_iterations", softmax="inputs", output="J B 1 1 D_out",
    ),
    Recipe(
        "adambielski", "CapsLayer", "weights", "I D_in (J D_out)", out_capsules="output_caps",
        num_iterations="routing_module.n_iterations", offset=1, prior="routing_module.b",
    ),
    Recipe(  # and jindongwang
        "higgsfield", "DigitCaps", "W", "1 I J D_out D_in",
        softmax="inputs", logits="batch", squash="elementwise", output="B J D_out 1",
    ),
    Recipe(
        "cedrickchee", "CapsuleLayer", "weight", "1 I J D_out D_in",
        num_iterations="num_routing", logits="batch", input="B D_in I", output="B J D_out 1",
    ),
    Recipe(
        "danielhavir", "RoutingCapsules", "W", "1 J I D_out D_in",
        num_iterations="num_routing", detach=True, norm_eps=1e-8,
    ),
    Recipe(
        "readable_capsnet", ("CapsuleLayerWithRouting", "Capsule2Capsule", "CapsuleLayerCalled"),
        "input_caps2U.weight", "I D_in J D_out", num_iterations="routing_iterations",
    ),
    Recipe(  # the authors' TensorFlow layer, in PyTorch
        "sabour", "CapsuleLayer", "weights", "I D_in (J D_out)", out_capsules="output_dim",
        num_iterations="num_routing", bias="biases", leaky="leaky",
    ),
    Recipe(
        "riroaki", "DigitCaps", "W", "1 J I D_out D_in", num_iterations="num_routing", detach=True, norm_eps=1e-8
    ),
    Recipe(
        "motokimura", "DigitCaps", "W", "I J D_out D_in", num_iterations="routing_iters", logits="batch", detach=True
    ),
    Recipe(
        "hula-ai", "DigitCapsLayer", "W", "1 I J D_out D_in",
        num_iterations="num_iterations", detach=True, eps=1e-7, output="B 1 J D_out 1",
    ),
    Recipe("gchochla", "SemanticCaps", "Ws", "J I D_out D_in", num_iterations="route_iters"),
    Recipe("cezannec", "DigitCaps", "W", "J I D_in D_out", softmax="inputs", output="J B 1 1 D_out"),
    Recipe(
        "aleayotte", "CapsuleLayer", "route_weights", "J I D_in D_out",
        num_iterations="num_iterations", softmax="inputs", output="J B D_out 1 1",
    ),
    Recipe("labml", "Router", "weight", "I J D_in D_out", num_iterations="iterations", softmax="inputs", eps=1e-8),
    Recipe("laubonghaudoi", "DigitCaps", "W", "1 I J D_in D_out", num_iterations="opt.r"),
    *(
        Recipe(
            f"leftthomas{name}", "CapsuleLinear", "weight", axes,
            num_iterations="num_iterations", output=("B J D_out", "B J I"), returns=(returned, "c"),
        )
        for axes, shared in (("J I D_out D_in", ""), ("J D_out D_in", "-shared"))
        for returned, name in (("s", shared), ("v", f"{shared}-squashed"))
    ),
    Recipe("3d-point-capsules", "LatentCapsLayer", "W", "J I D_out D_in", detach=True),
    Recipe(
        "abc-capsnet", "DigitCapsuleLayer", "W", "1 I J D_out D_in", num_iterations="routing_iterations", eps=1e-8
    ),
    Recipe("alexcapsnet", "DenseCapsule", "weight", "J I D_out D_in", num_iterations="routings", norm_eps=1e-8),
    Recipe(
        "capsfake", "DigitCaps", "W", "1 I J D_out D_in", softmax="inputs", logits="batch", squash="elementwise",
        eps=1e-7, output="B J D_out 1", ignored_arguments="device",
    ),
    Recipe(
        "timomernick", ("CapsuleLayer", "Digits_Caps"), "W", "1 I J D_out D_in",
        softmax="inputs", logits="batch", squash="outputs", input="B D_in I", output="B J D_out 1",
    ),
)  # fmt: skip


def find_recipe(name: str) -> Recipe:
    """The recipe of that name in :data:`RECIPES`."""
    return next(recipe for recipe in RECIPES if recipe.name == name)
