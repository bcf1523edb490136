"""The checks of the losses: what they are given, and how they are reduced."""

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastcaps import losses as paper
from fastcaps.convert.modules import floating_tensors
from fastcaps.doctor.axes import ClassCapsules
from fastcaps.doctor.finding import (
    CLASS_SCORES,
    FINE,
    MARGIN_LOSS,
    RECONSTRUCTION_LOSS,
    SUSPICIOUS,
    UNKNOWN,
    WRONG,
    Finding,
)
from fastcaps.doctor.trials import is_mask
from fastcaps.doctor.watch import Run

Loss = Callable[..., Any]

BATCHES, LENGTHS = (4, 7, 9), 3  # numbers of samples of which two are tried, and how often each
CLOSE = 1e-3  # relative: ratios that count as one
RECONSTRUCTION_WEIGHT = 0.0005  # of the summed squared error, in the paper


def losses(
    run: Run, J: int | None, classes: ClassCapsules | None, margin_loss: Loss | None, reconstruction_loss: Loss | None
) -> Iterator[Finding]:
    """What the losses are given, and how they are reduced.

    Args:
        run: the model's run.
        J: the number of output capsules of its last layer, or None.
        classes: where its output holds them, or None.
        margin_loss: the classification loss, or None.
        reconstruction_loss: the reconstruction loss, or None.
    """
    yield class_scores(run, J)
    dtypes = [t.dtype for t in floating_tensors(run.output)]
    if margin_loss is None or J is None or not dtypes:
        text = "none was given" if margin_loss is None else "no output [B, J, D_out] or [B, J] was found"
        yield Finding(MARGIN_LOSS, "", UNKNOWN, text)
    else:
        yield margin_reduction(margin_loss, J, dtypes[classes.output if classes else 0])
    if reconstruction_loss is None:
        yield Finding(RECONSTRUCTION_LOSS, "", UNKNOWN, "none was given")
    else:
        yield reconstruction_reduction(reconstruction_loss)


def class_scores(run: Run, J: int | None) -> Finding:
    """Were the class scores softmaxed?"""
    found = [t.squeeze() for t in floating_tensors(run.output)]
    # A one-hot mask sums to 1, too, but is no score.
    found = [
        t for t in found if t.dim() == 2 and len(t) == run.B and t.shape[1] == (J or t.shape[1]) and not is_mask(t)
    ]
    if not found or not found[0].isfinite().all():
        return Finding(CLASS_SCORES, "", UNKNOWN, "no finite output [B, J] was found")
    sums = found[0].sum(1)
    if (sums - 1).abs().max() >= 1e-4 and J is None:
        return Finding(CLASS_SCORES, "", UNKNOWN, "no layer was found that tells how many classes there are")
    if (sums - 1).abs().max() >= 1e-4:
        text = f"no softmax: those of a sample sum to {sums.min():.2g} to {sums.max():.2g}"
        return Finding(CLASS_SCORES, "", FINE, text)
    return Finding(
        CLASS_SCORES, "", SUSPICIOUS, "the class scores of each sample sum to 1, as after a softmax",
        "give the margin loss the lengths: its bounds 0.9 and 0.1 are for them, not for probabilities that compete",
    )  # fmt: skip


class LossFailed(Exception):
    """A loss raised an error; the message is its first line."""


class NoScalar(Exception):
    """A loss returned something other than one number; the message says what."""


def _value(loss: Loss, *args: Tensor) -> float:
    """What a loss gives.

    Raises:
        LossFailed: it does not take these arguments.
        NoScalar: it returns something other than one number.
    """
    try:
        returned = loss(*args)
    except Exception as error:
        raise LossFailed(f"{type(error).__name__}: {error}".splitlines()[0]) from error
    try:
        value = torch.as_tensor(returned)
    except Exception as error:
        raise NoScalar(f"it returns {type(returned).__name__}, no scalar") from error
    if value.numel() != 1:
        raise NoScalar(f"it returns {tuple(value.shape)}, no scalar")
    return value.detach().double().item()


@dataclass(frozen=True)
class LabelForm:
    """How a margin loss takes its labels: as indices or one-hot, after the lengths or before them."""

    one_hot: bool
    first: bool

    def arguments(self, lengths: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """The arguments of the loss, from lengths ``[B, J]`` and labels ``[B]``."""
        given = torch.nn.functional.one_hot(labels, lengths.shape[1]).to(lengths.dtype) if self.one_hot else labels
        return (given, lengths) if self.first else (lengths, given)


FORMS = [LabelForm(one_hot, first) for first in (False, True) for one_hot in (False, True)]

Ratios = dict[int, list[float]]  # of a loss to the paper's, some for each number of samples


def _margin_ratios(loss: Loss, form: LabelForm, J: int, sizes: list[int], dtype: torch.dtype) -> Ratios:
    """The loss over the paper's at random lengths."""
    generator = torch.Generator().manual_seed(0)
    ratios: Ratios = {B: [] for B in sizes}
    for B, _ in itertools.product(sizes, range(LENGTHS)):
        lengths = torch.rand(B, J, generator=generator, dtype=torch.float64).to(dtype)
        labels = torch.randint(J, (B,), generator=generator)
        value = _value(loss, *form.arguments(lengths, labels))
        ratios[B].append(value / paper.margin_loss(lengths, labels).item())
    return ratios


def _reduction(ratios: Ratios, J: int) -> str | None:
    """Which reduction explains the ratios at every batch size, empty for the paper's; None: none does."""
    samples, classes = "summed over the samples", "averaged over the classes"
    factors: dict[str, Callable[[int], float]] = {
        "": lambda B: 1.0,
        samples: float,
        classes: lambda B: 1 / J,
        f"{samples} and {classes}": lambda B: B / J,
    }
    for reduction, factor in factors.items():
        if all(_is_close(ratio, factor(B)) for B, some in ratios.items() for ratio in some):
            return reduction
    return None


def _is_close(ratio: float, factor: float) -> bool:
    return abs(ratio - factor) <= CLOSE * factor


def margin_reduction(loss: Loss, J: int, dtype: torch.dtype) -> Finding:
    """The loss at some lengths beside the paper's: which constant lies between them, if one does?"""
    sizes = [B for B in BATCHES if B != J][:2]  # B = J could not tell a sum from a mean
    accepted: list[Ratios] = []
    failures: list[LossFailed | NoScalar] = []
    for form in FORMS:
        try:
            accepted.append(_margin_ratios(loss, form, J, sizes, dtype))
        except (LossFailed, NoScalar) as error:
            failures.append(error)
    if not accepted:
        return _no_margin_loss(failures)
    # A loss may take both kinds of labels by broadcasting: it is meant for the one that it makes sense of.
    ratios = next((ratios for ratios in accepted if _reduction(ratios, J) is not None), accepted[0])
    reduction = _reduction(ratios, J)
    if reduction == "":
        return Finding(MARGIN_LOSS, "", FINE, "it is the paper's: summed over the classes, averaged over the samples")
    if reduction is not None:
        B = sizes[-1]
        return Finding(
            MARGIN_LOSS, "", WRONG,
            f"it is {ratios[B][0]:.3g} times the paper's at {B} samples and {J} classes: {reduction}",
            "sum over the classes and average over the samples, else the reconstruction weighs too much or too little",
        )  # fmt: skip
    values = [ratio for some in ratios.values() for ratio in some]
    if min(values) > 0 and max(values) / min(values) - 1 <= CLOSE:
        text = f"it is {values[0]:.4g} times the paper's"
        return Finding(MARGIN_LOSS, "", SUSPICIOUS, text, "the weight of the reconstruction is meant for the paper's")
    text = f"it is not a multiple of the paper's: the ratio goes from {min(values):.3g} to {max(values):.3g}"
    fix = "sum_k T_k max(0, 0.9 - |v_k|)^2 + 0.5 (1 - T_k) max(0, |v_k| - 0.1)^2, both squared (fastcaps.losses)"
    return Finding(MARGIN_LOSS, "", WRONG, text, fix)


def _no_margin_loss(failures: list[LossFailed | NoScalar]) -> Finding:
    """A loss that gives no number for any form of the labels."""
    for failure in failures:
        if isinstance(failure, NoScalar):
            return Finding(MARGIN_LOSS, "", WRONG, str(failure), "reduce it: sum over classes, mean over samples")
    text = f"it does not take lengths [B, J] and labels [B], nor one-hot labels: {failures[0]}"
    return Finding(MARGIN_LOSS, "", UNKNOWN, text)


def reconstruction_reduction(loss: Loss) -> Finding:
    """The loss of two random batches beside the paper's."""
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.rand(4, 1, 28, 28, generator=generator) for _ in range(2))
    try:
        try:
            value = _value(loss, a, b)
        except (LossFailed, NoScalar):
            value = _value(loss, a.flatten(1), b.flatten(1))
    except NoScalar as error:
        return Finding(RECONSTRUCTION_LOSS, "", WRONG, str(error), "reduce it: sum over pixels, mean over samples")
    except LossFailed as error:
        return Finding(RECONSTRUCTION_LOSS, "", UNKNOWN, f"it does not take two batches of images: {error}")
    ratio = value / (a - b).pow(2).flatten(1).sum(1).mean().item()
    reductions = {"": 1.0, "averaged over the pixels": 1 / a[0].numel(), "summed over the samples": float(len(a))}
    for weight, (reduction, factor) in itertools.product((1.0, RECONSTRUCTION_WEIGHT), reductions.items()):
        if not _is_close(ratio, factor * weight):
            continue
        weighted = "" if weight == 1 else f", times {weight}"
        if not reduction:
            text = f"it is the paper's: summed over the pixels, averaged over the samples{weighted}"
            return Finding(RECONSTRUCTION_LOSS, "", FINE, text)
        text = f"it is {ratio:.3g} times the paper's sum over the pixels: {reduction}{weighted}"
        fix = "sum over the pixels and average over the samples, or multiply 0.0005 by the number of pixels"
        return Finding(RECONSTRUCTION_LOSS, "", WRONG, text, fix)
    text = f"it is {ratio:.3g} times the summed squared error"
    return Finding(RECONSTRUCTION_LOSS, "", SUSPICIOUS, text, "check its weight")
