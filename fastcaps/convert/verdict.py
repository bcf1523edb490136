"""The verdict on a replacement, and the refusal that ends a verification with one."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import NoReturn

from fastcaps.convert.results import Difference


class Refused(Enum):
    """What stood against a replacement; of several recipes, the one counts that came furthest."""

    UNFIT = 0  # shapes or arguments are not those of the recipe
    DIFFERS = 1  # it does not compute what the recipe says
    LAYER = 2  # something that is no matter of the recipe, or of what the op can do


@dataclass(frozen=True)
class Verdict:
    """What :func:`verify` found.

    Attributes:
        refused: why the layer must not be replaced, or None.
        output: largest relative L2 difference of the outputs, old against new, at the model's weights; where the layer
            was refused, in the case in which it was.
        gradient: likewise of the gradients of poses and parameters.
        notes: what else there is to know.
        kind: what stood against it, where it was refused.
        float32: the largest error in float32, against float64 and at the model's weights, of the old layer and of the
            new one; None where it could not be measured.
    """

    refused: str | None
    output: float = math.nan
    gradient: float = math.nan
    notes: tuple[str, ...] = ()
    kind: Refused = Refused.LAYER
    float32: tuple[float, float] | None = None


class Refusal(Exception):
    """The verdict that ends a verification."""

    def __init__(self, verdict: Verdict) -> None:
        super().__init__(verdict.refused)
        self.verdict = verdict


def refuse(
    reason: str, moved: Difference | None = None, notes: Sequence[str] = (), kind: Refused = Refused.LAYER
) -> NoReturn:
    """End a verification.

    Args:
        reason: why the layer must not be replaced.
        moved: how far the layer would move.
        notes: what else there is to know.
        kind: what stands against it.

    Raises:
        Refusal: always.
    """
    raise Refusal(Verdict(reason, *(moved or (math.nan, math.nan)), tuple(notes), kind))
