"""Results of a layer, outputs and gradients, and the errors between two of them."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastcaps.exactness import error_budget, relative_error

LIMIT, LIMIT_FLOAT32 = 1e-9, 1e-4  # relative L2, where the old layer runs in float64, or in float32 alone
LABELS = {"v": "output", "s": "output", "c": "coupling", "length": "output"}  # what messages call what is returned


@dataclass(frozen=True)
class Result:
    """What a layer computed for one fixed incoming gradient.

    Attributes:
        outputs: what it returns, by the names that it was asked for; what is beyond these has a number.
        gradients: of the poses, then of each parameter.
    """

    outputs: dict[str, Tensor]
    gradients: list[Tensor]

    @classmethod
    def of(
        cls, call: Callable[[Tensor], Any], layer: nn.Module, poses: Tensor, names: Sequence[str] = ("v",)
    ) -> "Result":
        """Run a layer forward and backward.

        Args:
            call: the layer as a function of its poses.
            layer: the layer.
            poses: as it takes them.
            names: of what it returns.

        Raises:
            TypeError: it returns something other than a tensor or a tuple of several.
        """
        x = poses.clone().requires_grad_()
        with torch.enable_grad():
            returned = call(x)
        parts = returned if type(returned) is tuple and len(returned) > 1 else (returned,)
        if not all(isinstance(part, Tensor) for part in parts):
            raise TypeError(f"it returns {_types(returned)}, and a converted layer a tensor or a tuple of several")
        named = [*names, *(f"output {n + 1}" for n in range(len(names), len(parts)))]
        outputs = dict(zip(named, parts, strict=False))
        generator = torch.Generator().manual_seed(1)
        sent = [torch.randn(o.shape, generator=generator, dtype=torch.float64).to(o) for o in outputs.values()]
        pairs = [(o, grad) for o, grad in zip(outputs.values(), sent, strict=True) if o.requires_grad]
        leaves = [x, *layer.parameters()]
        grads = torch.autograd.grad([o for o, _ in pairs], leaves, [grad for _, grad in pairs], allow_unused=True)
        gradients = [torch.zeros_like(leaf) if g is None else g for g, leaf in zip(grads, leaves, strict=True)]
        return cls({name: o.detach() for name, o in outputs.items()}, gradients)

    def shapes(self) -> tuple[list[torch.Size], list[torch.Size]]:
        """The shapes of the outputs, and of the gradients."""
        return [o.shape for o in self.outputs.values()], [g.shape for g in self.gradients]

    def is_finite(self) -> bool:
        """Whether all entries are."""
        return all(bool(t.isfinite().all()) for t in (*self.outputs.values(), *self.gradients))


def _types(value: Any) -> str:
    """The types of what a layer returns, in words."""
    inner = f" of {', '.join(type(part).__name__ for part in value)}" if isinstance(value, (tuple, list)) else ""
    return f"{type(value).__name__}{inner}"


class Difference(NamedTuple):
    """The largest relative L2 error of the outputs, and of the gradients."""

    output: float
    gradient: float

    @classmethod
    def largest(cls, differences: Iterable["Difference"]) -> "Difference":
        """The largest of several; 0 where there is none."""
        return cls(*(max(column) for column in zip((0.0, 0.0), *differences, strict=True)))


@dataclass(frozen=True)
class Errors:
    """The relative L2 error of each output and of each gradient."""

    outputs: list[float]
    gradients: list[float]

    @classmethod
    def of(cls, value: Result, exact: Result) -> "Errors":
        """The errors of one result against another; infinite where their shapes differ."""
        if value.shapes() != exact.shapes():
            return cls([math.inf] * len(exact.outputs), [math.inf] * len(exact.gradients))
        pairs = zip(value.outputs.values(), exact.outputs.values(), strict=True)
        outputs = [relative_error(a, b) for a, b in pairs]
        return cls(outputs, [relative_error(a, b) for a, b in zip(value.gradients, exact.gradients, strict=True)])

    @property
    def largest(self) -> Difference:
        """The largest of the outputs and of the gradients."""
        return Difference(max(self.outputs), max(self.gradients))

    def within(self, limit: float) -> bool:
        """Whether all are at most the limit."""
        return all(error <= limit for error in (*self.outputs, *self.gradients))  # unlike max, false for NaN

    def within_budget(self, plain: "Errors", dtype: torch.dtype) -> bool:
        """Whether all are about as small as those of plain PyTorch in that dtype."""
        budgets = [error_budget(dtype, error, gradient=False) for error in plain.outputs]
        budgets += [error_budget(dtype, error, gradient=True) for error in plain.gradients]
        errors = (*self.outputs, *self.gradients)
        return all(error <= budget for error, budget in zip(errors, budgets, strict=True))
