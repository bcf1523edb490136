"""The doctor's checks of losses: which reductions are told apart."""

import pytest
import torch
from support.networks_to_examine import LOSS, SHAPE, look
from torch import nn

import fastcaps
from fastcaps.doctor import FINE, SUSPICIOUS, UNKNOWN, WRONG
from fastcaps.doctor.loss_checks import margin_reduction, reconstruction_reduction
from fastcaps.losses import margin_loss


def unsquared(lengths, labels):
    target = nn.functional.one_hot(labels, lengths.shape[1])
    return (target * (0.9 - lengths).relu() + 0.5 * (1 - target) * (lengths - 0.1).relu()).sum(1).mean()


def unreduced(lengths, labels):
    return torch.stack([margin_loss(*pair) for pair in zip(lengths.split(1), labels.split(1), strict=True)])


def one_hot_margin(lengths, target):
    if target.dim() != 2:
        raise TypeError("one-hot labels, please")
    return (target * (0.9 - lengths).relu() ** 2 + 0.5 * (1 - target) * (lengths - 0.1).relu() ** 2).sum(1).mean()


def one_hot_by_product(lengths, target):
    """Made for one-hot labels; indices broadcast where there are as many samples as classes."""
    return (target * (0.9 - lengths).relu() ** 2 + 0.5 * (1 - target) * (lengths - 0.1).relu() ** 2).sum(1).mean()


MARGINS = {
    "the paper's": (margin_loss, FINE, "it is the paper's"),
    "one-hot": (one_hot_margin, FINE, "it is the paper's"),
    "mean over classes": (lambda v, y: margin_loss(v, y) / v.shape[1], WRONG, "averaged over the classes"),
    "sum over samples": (lambda v, y: margin_loss(v, y) * len(v), WRONG, "summed over the samples"),
    "both": (lambda v, y: margin_loss(v, y) * len(v) / v.shape[1], WRONG, "summed over the samples and averaged"),
    "unsquared": (unsquared, WRONG, "not a multiple of the paper's"),
    "scaled": (lambda v, y: 3 * margin_loss(v, y), SUSPICIOUS, "it is 3 times the paper's"),
    "unreduced": (lambda v, y: (v - 0.1).relu()[:, :1].expand(-1, 3), WRONG, "no scalar"),
    "unreduced, labels first": (lambda y, v: unreduced(v, y), WRONG, ",), no scalar"),
    "nothing": (lambda v, y: None, WRONG, "it returns NoneType, no scalar"),
    "a float": (lambda v, y: margin_loss(v, y).item(), FINE, "it is the paper's"),
    "labels first": (lambda y, v: margin_loss(v, y), FINE, "it is the paper's"),
    "three arguments": (lambda v, y, images: margin_loss(v, y), UNKNOWN, "does not take lengths"),
    "broadcast": (one_hot_by_product, FINE, "it is the paper's"),
}


CASES = [(name, J) for J in (4, 7, 8, 10) for name in MARGINS]
CASES += [(name, 1) for name in MARGINS if name not in ("mean over classes", "both", "unsquared")]  # alike for J = 1


@pytest.mark.parametrize(("name", "J"), CASES)
def test_reductions_of_the_margin_loss(name, J):
    loss, verdict, text = MARGINS[name]
    finding = margin_reduction(loss, J, torch.float32)
    assert (finding.verdict, text in finding.evidence) == (verdict, True), str(finding)


RECONSTRUCTIONS = {
    "summed": (lambda a, b: (a - b).pow(2).flatten(1).sum(1).mean(), FINE, "it is the paper's"),
    "weighted": (lambda a, b: 0.0005 * (a - b).pow(2).flatten(1).sum(1).mean(), FINE, "times 0.0005"),
    "mean": (nn.MSELoss(), WRONG, "averaged over the pixels"),
    "weighted mean": (
        lambda a, b: 0.0005 * nn.functional.mse_loss(a, b),
        WRONG,
        "averaged over the pixels, times 0.0005",
    ),
    "sum": (nn.MSELoss(reduction="sum"), WRONG, "summed over the samples"),
    "unreduced": (nn.MSELoss(reduction="none"), WRONG, "no scalar"),
    "three": (lambda a, b, c: a.sum(), UNKNOWN, "does not take two batches"),
    "other": (lambda a, b: 0.3 * (a - b).pow(2).flatten(1).sum(1).mean(), SUSPICIOUS, "0.3 times"),
}


@pytest.mark.parametrize("name", RECONSTRUCTIONS)
def test_reductions_of_the_reconstruction_loss(name):
    loss, verdict, text = RECONSTRUCTIONS[name]
    findings = look(fastcaps.CapsNet(SHAPE, 10, kernel_size=3), reconstruction_loss=loss)
    finding = next(f for f in findings if f.check == "reconstruction loss")
    assert (finding.verdict, text in finding.evidence) == (verdict, True), str(finding)


def test_an_error_that_mentions_scalars_is_an_error():
    """The words of a message decide nothing."""

    def loss(*arguments):
        raise TypeError("no scalar, please")

    assert margin_reduction(loss, 10, torch.float32).verdict == UNKNOWN
    assert reconstruction_reduction(loss).verdict == UNKNOWN


def test_losses_under_their_names_of_0_1():
    model = fastcaps.CapsNet(SHAPE, 10, kernel_size=3)
    with pytest.warns(DeprecationWarning, match="is now") as told:
        findings = look(model, margin=margin_loss, reconstruction=fastcaps.losses.reconstruction_loss)
    assert {f.verdict for f in findings if f.check in (LOSS, "reconstruction loss")} == {FINE}
    for old in ("margin", "reconstruction"):
        assert any(f"{old}= is now {old}_loss=" in str(one.message) for one in told)
