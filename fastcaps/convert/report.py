"""The report of a conversion: a row for each capsule layer."""

import math
from dataclasses import dataclass

from fastcaps.measure import Cost


@dataclass(frozen=True)
class LayerReport:
    """What became of one layer.

    Attributes:
        path: where it is in the model; empty where it is the model.
        class_name: its class.
        recipe: the name of the recipe that was recognised, or None.
        replaced: whether fastcaps routes it now.
        reason: why it was left as it was, or None.
        output: largest relative L2 difference of its outputs, old against new, at the model's weights; where it was
            left for a difference, in the case in which that was seen, which may have other weights.
        gradient: likewise of the gradients of poses and parameters.
        before: milliseconds and peak memory of a forward and backward pass on the sample, or None: not measured.
        after: the same of the new layer.
        notes: what else there is to know.
        warning: what of its routing is not the paper's, and what was made of that; or None.
        float32: the largest error of outputs and gradients in float32, against float64 and at the model's weights, of
            the old layer and of the new one; None where it was not measured.
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
    warning: str | None = None
    float32: tuple[float, float] | None = None

    @property
    def is_faster(self) -> bool:
        """Whether the new layer was measured to take less time."""
        return self.before is not None and self.after is not None and self.after.milliseconds < self.before.milliseconds

    @property
    def label(self) -> str:
        """The path in words."""
        return self.path or "the model"

    def cells(self) -> tuple[str, ...]:
        """Its row of the printed table."""
        times = peaks = ""
        if self.before is not None and self.after is not None:
            costs = (self.before, self.after)
            times = ", ".join(f"{cost.milliseconds:.3g}" for cost in costs)
            peaks = ", ".join(f"{cost.peak / 1e6:.3g}" for cost in costs)
        errors = ("" if math.isnan(error) else f"{error:.0e}" for error in (self.output, self.gradient))
        float32 = ", ".join(f"{error:.0e}" for error in self.float32 or ())
        outcome = "replaced" if self.replaced else "left as it was"
        return (self.label, self.class_name, self.recipe or "", *errors, float32, times, peaks, outcome)

    def remarks(self) -> list[str]:
        """What is printed of it below the table."""
        left = None if self.reason is None else f"left as it was: {self.reason}"
        return [f"{self.label}: {text}" for text in (left, *self.notes, self.warning) if text]


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
        if not self.layers:
            nothing = f"no capsule layer was recognised among {self.modules} modules; nothing was changed"
            return "\n".join([nothing, *self.similar])
        compared = ("output", "gradient", "float32 before, after")
        head = ("layer", "class", "recipe", *compared, "ms before, after", "MB before, after", "")
        rows = [head, *(row.cells() for row in self.layers)]
        widths = [max(len(row[n]) for row in rows) for n in range(len(head))]
        table = ["  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip() for row in rows]
        return "\n".join([*table, *(text for row in self.layers for text in row.remarks()), *self.similar])
