"""What other people's capsule layers are and compute: recipes, and the layers of public repositories."""

import inspect
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.nn.parameter import is_lazy

from fastcaps._axes import Axes
from fastcaps._checks import check_number
from fastcaps._deprecated import renamed_arguments, warn_renamed
from fastcaps.layers import WEIGHT_AXES
from fastcaps.routing.conventions import Convention

POSES_AXES, OUTPUT_AXES, COUPLING_AXES = ("B", "I", "D_in"), ("B", "J", "D_out"), ("B", "I", "J")

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
    The defaults are the paper's routing.

    Attributes:
        name: what reports call it.
        classes: the names that the class goes by.
        weight: the weight's name, ``"weight"`` or ``"routing.W"``.
        axes: its axes ``I``, ``J``, ``D_out``, ``D_in``, as in :meth:`fastcaps.CapsuleLayer.from_weight`.
        num_iterations: T, or the attribute that holds it (read in every call), or the argument of ``forward`` that
            does.
        offset: added to it.
        out_capsules: J, or the attribute that holds it: where the weight has one axis for ``J`` and ``D_out``, or no J.
        prior: the name of learned initial logits, or None.
        prior_axes: their axes.
        bias: the name of the bias, or None.
        bias_axes: its axes.
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
        TypeError: axes are no string, or eps no number.
        ValueError: an axis or a choice is unknown, or there are both eps and norm_eps.

    Example:
        >>> Recipe("mine", "MyCapsules", weight="W", axes="J I D_in D_out", num_iterations="routings").softmax
        'outputs'
    """

    name: str
    classes: str | tuple[str, ...]
    weight: str
    axes: str
    num_iterations: int | str = 3
    offset: int = 0
    out_capsules: int | str | None = None
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
    input: str = "B I D_in"
    output: str | tuple[str, str] = "B J D_out"

    def __post_init__(self) -> None:
        check_number("eps", self.eps)
        if self.eps and self.norm_eps:
            raise ValueError("eps and norm_eps exclude each other")
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
        return (self.classes,) if isinstance(self.classes, str) else self.classes

    @property
    def parameters(self) -> dict[str, str]:
        """The axes of each parameter, by its name."""
        named = {self.weight: self.axes, self.prior: self.prior_axes, self.bias: self.bias_axes}
        return {name: axes for name, axes in named.items() if name is not None}

    def parsed_axes(self) -> dict[str, Axes]:
        """The parsed axes of ``weight``, ``prior``, ``bias``, ``input``, ``output`` and ``coupling``."""
        output, coupling = (self.output, None) if isinstance(self.output, str) else self.output
        axes = {
            "weight": Axes.parse(self.axes, WEIGHT_AXES, ("D_in", "D_out")),
            "prior": Axes.parse(self.prior_axes, ("I", "J"), ("I", "J")),
            "bias": Axes.parse(self.bias_axes, ("J", "D_out"), ("J", "D_out")),
            "input": Axes.parse(self.input, POSES_AXES, POSES_AXES),
            "output": Axes.parse(output, OUTPUT_AXES, OUTPUT_AXES),
        }
        if coupling is not None:
            axes["coupling"] = Axes.parse(coupling, COUPLING_AXES, COUPLING_AXES)
        return axes

    def mismatch(self, layer: nn.Module) -> str | None:
        """Why a layer is not what this recipe describes, apart from the name of its class; None where it is."""
        have = dict(layer.named_parameters())
        want = {name: len(Axes.parse(text, WEIGHT_AXES, ()).groups) for name, text in self.parameters.items()}
        if have.keys() != want.keys():
            return f"its parameters are {', '.join(have) or 'none'}, not {', '.join(want)}"
        for name, rank in want.items():
            if is_lazy(have[name]):
                return f"{name} has no shape yet: call the model once"
            if have[name].dim() != rank:
                return f"{name} has {have[name].dim()} axes, not {rank}"
        arguments = inspect.signature(type(layer).forward).parameters
        for path in (self.num_iterations, self.out_capsules, self.leaky):
            if isinstance(path, str) and path not in arguments and get_path(layer, path, None) is None:
                return f"it has no attribute {path}"
        return None


Recipe.__init__ = renamed_arguments(**RENAMED)(Recipe.__init__)  # type: ignore[method-assign]


def get_path(layer: nn.Module, path: Any, *default: Any) -> Any:
    """The attribute of a dotted path, or the value itself where it is no path."""
    if not isinstance(path, str):
        return path
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
)  # fmt: skip


def find_recipe(name: str) -> Recipe:
    """The recipe of that name in :data:`RECIPES`."""
    return next(recipe for recipe in RECIPES if recipe.name == name)
