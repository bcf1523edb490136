"""Are the losses reduced as in the paper, and given lengths?"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from fastcaps.doctor.finding import FINE, SUSPICIOUS, WRONG, Finding
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
    output: Any, B: int, margin: Callable[..., Tensor] | None, reconstruction: Callable[..., Tensor] | None
) -> Iterator[Finding]:
    """What the losses are given, and how they are reduced."""
    found = class_lengths(output, B)
    scores = next((t for t in tensors(output) if t.dim() == 2 and t.shape[0] == B), None)
    if scores is not None and (scores.sum(1) - 1).abs().max() < 1e-4:
        yield Finding(
            "class scores are lengths", "", SUSPICIOUS, "the class scores of each sample sum to 1, as after a softmax",
            "give the margin loss the lengths: its bounds 0.9 and 0.1 are for them, not for probabilities that compete",
        )  # fmt: skip
    if margin is not None and found is not None:
        yield margin_reduction(margin, found[0].shape[1], found[0].dtype)
    if reconstruction is not None:
        yield reconstruction_reduction(reconstruction)


def margin_reduction(loss: Callable[..., Tensor], J: int, dtype: torch.dtype) -> Finding:
    """The loss at some lengths beside the paper's: which constant lies between them, if one does?"""
    check = "margin loss"
    generator = torch.Generator().manual_seed(0)
    ratios = []
    for B in (4, 8):
        for _ in range(3):
            lengths = torch.rand(B, J, generator=generator, dtype=torch.float64).to(dtype)
            labels = torch.randint(J, (B,), generator=generator)
            wanted = margin_loss(lengths, labels).item()
            try:
                value = loss(lengths, labels)
            except Exception:  # it may want them one-hot
                value = loss(lengths, torch.nn.functional.one_hot(labels, J).to(dtype))
            if value.numel() != 1:
                return Finding(
                    check,
                    "",
                    WRONG,
                    f"it returns {tuple(value.shape)}, no scalar",
                    "reduce it: sum over classes, mean over samples",
                )
            ratios.append((B, value.item() / wanted))
    small, large = ([r for b, r in ratios if b == B] for B in (4, 8))
    spread = max(max(part) / min(part) for part in (small, large)) - 1 if min(r for _, r in ratios) > 0 else 1.0
    sum_, mean = "summed over the samples", "averaged over the classes"
    if spread > 1e-3:
        least, most = min(small + large), max(small + large)
        text = f"it is not a multiple of the paper's: the ratio goes from {least:.3g} to {most:.3g}"
        fix = "sum_k T_k max(0, 0.9 - |v_k|)^2 + 0.5 (1 - T_k) max(0, |v_k| - 0.1)^2, both squared (fastcaps.losses)"
        return Finding(check, "", WRONG, text, fix)
    for B, ratio in ((4, small[0]), (8, large[0])):
        notes = {1.0: "", B: sum_, 1 / J: mean, B / J: f"{sum_} and {mean}"}
        closest = min(notes, key=lambda r: abs(r - ratio))
        if abs(closest - ratio) > 1e-3 * closest:
            return Finding(
                check,
                "",
                SUSPICIOUS,
                f"it is {ratio:.4g} times the paper's",
                "the weight of the reconstruction is meant for the paper's",
            )
    if not notes[closest]:
        return Finding(check, "", FINE, "it is the paper's: summed over the classes, averaged over the samples")
    return Finding(
        check, "", WRONG, f"it is {ratio:.3g} times the paper's at {B} samples and {J} classes: {notes[closest]}",
        "sum over the classes and average over the samples, else the reconstruction weighs too much or too little",
    )  # fmt: skip


def reconstruction_reduction(loss: Callable[..., Tensor]) -> Finding:
    """The loss of two random batches beside the paper's."""
    check = "reconstruction loss"
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.rand(4, 1, 28, 28, generator=generator) for _ in range(2))
    summed = (a - b).pow(2).flatten(1).sum(1).mean().item()
    try:
        value = loss(a, b)
    except Exception:
        value = loss(a.flatten(1), b.flatten(1))
    ratio = float(value) / summed
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
