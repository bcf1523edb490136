"""Are the losses reduced as in the paper, and given lengths?"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from fastcaps.doctor.finding import FINE, SUSPICIOUS, UNKNOWN, WRONG, Finding
from fastcaps.doctor.watch import tensors
from fastcaps.losses import margin_loss


def class_lengths(output: Any, B: int) -> tuple[Tensor, bool] | None:
    """``[B, J]`` lengths of what looks most like class capsules, and whether they were made from poses here."""
    for t in tensors(output):
        t = t.squeeze()
        if t.dim() == 3 and B in t.shape[:2]:
            return torch.linalg.vector_norm(t if t.shape[0] == B else t.transpose(0, 1), dim=-1), True
    for t in tensors(output):
        if t.dim() == 2 and t.shape[0] == B:
            return t, False
    return None


def losses(
    output: Any, B: int, margin: Callable[..., Any] | None, reconstruction: Callable[..., Any] | None
) -> Iterator[Finding]:
    """What the losses are given, and how they are reduced."""
    found = class_lengths(output, B)
    scores = next((t for t in tensors(output) if t.dim() == 2 and t.shape[0] == B), None)
    check = "class scores are lengths"
    if scores is None or not scores.isfinite().all():
        yield Finding(check, "", UNKNOWN, "no finite output [B, J] was found")
    elif ((sums := scores.sum(1)) - 1).abs().max() >= 1e-4:
        yield Finding(check, "", FINE, f"no softmax: those of a sample sum to {sums.min():.2g} to {sums.max():.2g}")
    else:
        yield Finding(
            check, "", SUSPICIOUS, "the class scores of each sample sum to 1, as after a softmax",
            "give the margin loss the lengths: its bounds 0.9 and 0.1 are for them, not for probabilities that compete",
        )  # fmt: skip
    if margin is None or found is None:
        text = "none was given" if margin is None else "no output [B, J, D_out] or [B, J] was found"
        yield Finding("margin loss", "", UNKNOWN, text)
    else:
        yield margin_reduction(margin, found[0].shape[1], found[0].dtype)
    if reconstruction is None:
        yield Finding("reconstruction loss", "", UNKNOWN, "none was given")
    else:
        yield reconstruction_reduction(reconstruction)


def _value(loss: Callable[..., Any], *args: Tensor) -> Tensor | str:
    """What a loss gives: a number, or what is in the way of one."""
    try:
        returned = loss(*args)
    except Exception as error:
        return f"{type(error).__name__}: {error}".splitlines()[0]
    try:
        value = torch.as_tensor(returned)
    except Exception:
        return f"it returns {type(returned).__name__}, no scalar"
    return value.detach().double().squeeze() if value.numel() == 1 else f"it returns {tuple(value.shape)}, no scalar"


def _margin_ratios(loss: Callable[..., Any], form: str, J: int, sizes: list[int], dtype: torch.dtype) -> Any:
    """The loss over the paper's at random lengths, some for each batch size; or what is in the way."""
    generator = torch.Generator().manual_seed(0)
    ratios: dict[int, list[float]] = {B: [] for B in sizes}
    for B in sizes:
        for _ in range(3):
            lengths = torch.rand(B, J, generator=generator, dtype=torch.float64).to(dtype)
            labels = torch.randint(J, (B,), generator=generator)
            given = torch.nn.functional.one_hot(labels, J).to(dtype) if "one-hot" in form else labels
            value = _value(loss, *((given, lengths) if "first" in form else (lengths, given)))
            if isinstance(value, str):
                return value
            ratios[B].append(value.item() / margin_loss(lengths, labels).item())
    return ratios


def _factor(ratios: dict[int, list[float]], J: int) -> str | None:
    """Which reduction explains the ratios at every batch size; None: none does."""
    sum_, mean = "summed over the samples", "averaged over the classes"
    notes = {"": lambda B: 1.0, sum_: float, mean: lambda B: 1 / J, f"{sum_} and {mean}": lambda B: B / J}
    for note, factor in notes.items():
        if all(abs(r - factor(B)) <= 1e-3 * factor(B) for B, part in ratios.items() for r in part):
            return note
    return None


def margin_reduction(loss: Callable[..., Any], J: int, dtype: torch.dtype) -> Finding:
    """The loss at some lengths beside the paper's: which constant lies between them, if one does?"""
    check = "margin loss"
    sizes = [B for B in (4, 7, 9) if B != J][:2]  # B = J could not tell a sum from a mean
    forms = ("indices", "one-hot", "indices first", "one-hot first")
    tried = {form: _margin_ratios(loss, form, J, sizes, dtype) for form in forms}
    ran = {form: ratios for form, ratios in tried.items() if not isinstance(ratios, str)}
    if not ran:
        reason = next((text for text in tried.values() if "no scalar" in text), tried["indices"])
        if "no scalar" in reason:
            return Finding(check, "", WRONG, reason, "reduce it: sum over classes, mean over samples")
        text = f"it does not take lengths [B, J] and labels [B], nor one-hot labels: {reason}"
        return Finding(check, "", UNKNOWN, text)
    # A loss may take both kinds of labels by broadcasting: it is meant for the one that it makes sense of.
    ratios = next((r for r in ran.values() if _factor(r, J) is not None), next(iter(ran.values())))
    note = _factor(ratios, J)
    values = [r for part in ratios.values() for r in part]
    if note == "":
        return Finding(check, "", FINE, "it is the paper's: summed over the classes, averaged over the samples")
    if note is not None:
        B = sizes[-1]
        return Finding(
            check, "", WRONG, f"it is {ratios[B][0]:.3g} times the paper's at {B} samples and {J} classes: {note}",
            "sum over the classes and average over the samples, else the reconstruction weighs too much or too little",
        )  # fmt: skip
    if min(values) > 0 and max(values) / min(values) - 1 <= 1e-3:
        text = f"it is {values[0]:.4g} times the paper's"
        return Finding(check, "", SUSPICIOUS, text, "the weight of the reconstruction is meant for the paper's")
    text = f"it is not a multiple of the paper's: the ratio goes from {min(values):.3g} to {max(values):.3g}"
    fix = "sum_k T_k max(0, 0.9 - |v_k|)^2 + 0.5 (1 - T_k) max(0, |v_k| - 0.1)^2, both squared (fastcaps.losses)"
    return Finding(check, "", WRONG, text, fix)


def reconstruction_reduction(loss: Callable[..., Any]) -> Finding:
    """The loss of two random batches beside the paper's."""
    check = "reconstruction loss"
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.rand(4, 1, 28, 28, generator=generator) for _ in range(2))
    summed = (a - b).pow(2).flatten(1).sum(1).mean().item()
    value = _value(loss, a, b)
    if isinstance(value, str):
        value = _value(loss, a.flatten(1), b.flatten(1))
    if isinstance(value, str):
        if "no scalar" in value:
            return Finding(check, "", WRONG, value, "reduce it: sum over pixels, mean over samples")
        return Finding(check, "", UNKNOWN, f"it does not take two batches of images: {value}")
    ratio = value.item() / summed
    names = {1.0: "", 1 / 784: "averaged over the pixels", 4.0: "summed over the samples"}
    for scale in (1.0, 0.0005):
        for factor, name in names.items():
            if abs(ratio - factor * scale) < 1e-3 * factor * scale:
                weight = "" if scale == 1 else ", times 0.0005"
                if not name:
                    return Finding(
                        check, "", FINE, f"it is the paper's: summed over the pixels, averaged over the samples{weight}"
                    )
                text = f"it is {ratio:.3g} times the paper's sum over the pixels: {name}{weight}"
                fix = "sum over the pixels and average over the samples, or multiply 0.0005 by the number of pixels"
                return Finding(check, "", WRONG, text, fix)
    return Finding(check, "", SUSPICIOUS, f"it is {ratio:.3g} times the summed squared error", "check its weight")
