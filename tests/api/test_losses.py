"""Losses against numbers worked out by hand, and their gradients."""

import math

import pytest
import torch

from fastcaps import length, squash
from fastcaps.losses import cross_entropy_loss, focal_margin_loss, margin_loss, reconstruction_loss, spread_loss

LENGTHS = torch.tensor([[0.8, 0.3, 0.05], [0.2, 0.95, 0.6]], dtype=torch.float64)
LABELS = torch.tensor([0, 2])
# present: (0.9 - 0.8)^2; absent: (0.3 - 0.1)^2 / 2, 0 | absent: (0.2 - 0.1)^2 / 2, (0.95 - 0.1)^2 / 2; present: 0.3^2
MARGIN = [[0.01, 0.02, 0.0], [0.005, 0.36125, 0.09]]
REDUCED = {"batchmean": lambda x: x.sum() / len(x), "mean": torch.mean, "sum": torch.sum, "none": lambda x: x}


@pytest.mark.parametrize("reduction", REDUCED)
def test_margin_loss(reduction):
    expected = REDUCED[reduction](torch.tensor(MARGIN, dtype=torch.float64))
    torch.testing.assert_close(margin_loss(LENGTHS, LABELS, reduction=reduction), expected)
    one_hot = torch.tensor([[True, False, False], [False, False, True]])
    torch.testing.assert_close(margin_loss(LENGTHS, one_hot, reduction=reduction), expected)
    torch.testing.assert_close(margin_loss(LENGTHS, LABELS.to(torch.uint8), reduction=reduction), expected)


def test_margin_loss_of_several_classes_and_other_margins():
    both = torch.tensor([[True, True, False]])
    torch.testing.assert_close(margin_loss(LENGTHS[:1], both), torch.tensor(0.01 + 0.36, dtype=torch.float64))
    loss = margin_loss(LENGTHS[:1], LABELS[:1], m_plus=1.0, m_minus=0.0, down_weight=1.0)
    torch.testing.assert_close(loss, torch.tensor(0.04 + 0.09 + 0.0025, dtype=torch.float64))


def test_focal_margin_loss():
    factor = torch.tensor([[0.2, 0.3, 0.05], [0.2, 0.95, 0.4]], dtype=torch.float64)
    expected = (factor**2 * torch.tensor(MARGIN, dtype=torch.float64)).sum(1)
    torch.testing.assert_close(focal_margin_loss(LENGTHS, LABELS, reduction="none").sum(1), expected)
    torch.testing.assert_close(focal_margin_loss(LENGTHS, LABELS, gamma=0.0), margin_loss(LENGTHS, LABELS))
    with pytest.raises(ValueError, match="gamma must be finite and not negative, got -1"):
        focal_margin_loss(LENGTHS, LABELS, gamma=-1)


def test_focal_margin_loss_has_finite_gradients_below_gamma_one():
    lengths = torch.tensor([[0.0, 1.0, 0.5]], dtype=torch.float64, requires_grad=True)
    focal_margin_loss(lengths, torch.tensor([1]), gamma=0.5).backward()
    assert lengths.grad.isfinite().all()
    assert lengths.grad[0, 2] > 0


def test_spread_loss():
    # margin 0.9: (0.9 - 0.5)^2, (0.9 - 0.75)^2 | (0.9 - 0.4)^2, (0.9 + 0.35)^2
    expected = torch.tensor([[0.0, 0.16, 0.0225], [0.25, 1.5625, 0.0]], dtype=torch.float64)
    torch.testing.assert_close(spread_loss(LENGTHS, LABELS, reduction="none"), expected)
    torch.testing.assert_close(spread_loss(LENGTHS, LABELS, margin=0.2), torch.tensor(0.55**2 / 2).double())


def test_cross_entropy_loss():
    for scale in (1.0, 10.0):
        z = (scale * LENGTHS).exp()
        expected = -torch.stack([(z[0, 0] / z[0].sum()).log(), (z[1, 2] / z[1].sum()).log()])
        torch.testing.assert_close(cross_entropy_loss(LENGTHS, LABELS, scale=scale, reduction="none"), expected)
        torch.testing.assert_close(cross_entropy_loss(LENGTHS, LABELS, scale=scale), expected.mean())
    perfect = cross_entropy_loss(torch.eye(3), torch.arange(3))
    assert perfect.item() == pytest.approx(math.log(1 + 2 * math.exp(-1)))


WEIGHTS = torch.tensor([0.5, 4.0, 2.0])
LOSSES = [margin_loss, focal_margin_loss, spread_loss, cross_entropy_loss]


@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: loss.__name__)
def test_class_weights_multiply_the_terms_of_a_sample(loss):
    terms = loss(LENGTHS, LABELS, reduction="none")
    factors = torch.tensor([0.5, 2.0], dtype=torch.float64).view(-1, *[1] * (terms.dim() - 1))  # of classes 0 and 2
    expected = factors * terms
    torch.testing.assert_close(loss(LENGTHS, LABELS, class_weights=WEIGHTS, reduction="none"), expected)
    torch.testing.assert_close(loss(LENGTHS, LABELS, class_weights=WEIGHTS), expected.sum() / 2)  # not by the weights
    torch.testing.assert_close(loss(LENGTHS, LABELS, class_weights=torch.ones(3)), loss(LENGTHS, LABELS))
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(LENGTHS, LABELS, class_weights=WEIGHTS), expected.sum() / 2)


@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: loss.__name__)
def test_balanced_class_weights_are_as_many_images_of_each_class(loss):
    lengths, labels = torch.rand(4, 2, dtype=torch.float64), torch.tensor([0, 0, 0, 1])
    weighted = loss(lengths, labels, class_weights=torch.tensor([4 / 6, 4 / 2], dtype=torch.float64))
    repeated = torch.tensor([0, 1, 2, 3, 3, 3])
    torch.testing.assert_close(weighted, loss(lengths[repeated], labels[repeated]))


def test_class_weights_of_several_classes_are_their_mean():
    present = torch.tensor([[True, True, False], [False, False, False]])
    terms = margin_loss(LENGTHS, present, reduction="none")
    found = margin_loss(LENGTHS, present, class_weights=WEIGHTS, reduction="none")
    torch.testing.assert_close(found, torch.tensor([[2.25], [1.0]], dtype=torch.float64) * terms)
    one_hot = torch.tensor([[True, False, False], [False, False, True]])
    for loss in (margin_loss, focal_margin_loss):
        assert loss(LENGTHS, one_hot, class_weights=WEIGHTS) == loss(LENGTHS, LABELS, class_weights=WEIGHTS)


def test_class_weights_that_cannot_be():
    for loss in LOSSES:
        with pytest.raises(ValueError, match=r"class_weights must be \[J\] = \[3\], got \(2,\)"):
            loss(LENGTHS, LABELS, class_weights=torch.ones(2))
        with pytest.raises(TypeError, match=r"class_weights must be a floating-point tensor \[J\], got list"):
            loss(LENGTHS, LABELS, class_weights=[1.0, 1.0, 1.0])
    for loss in (spread_loss, cross_entropy_loss):
        with pytest.raises(TypeError, match=r"\[B\], one class for each image, got torch.bool"):
            loss(LENGTHS, torch.ones(2, 3, dtype=torch.bool))


@pytest.mark.parametrize("reduction", REDUCED)
def test_reconstruction_loss(reduction):
    reconstruction, images = (
        torch.zeros(2, 1, 2, 2),
        torch.tensor([1.0, 2.0, 0.0, 0.0, 0.0, 0.0, 0.0, 3.0]).view(2, 1, 2, 2),
    )
    expected = 0.0005 * REDUCED[reduction](images.square())
    torch.testing.assert_close(reconstruction_loss(reconstruction, images, reduction=reduction), expected)


@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: loss.__name__)
def test_gradients_compilation_and_the_empty_batch(loss):
    lengths = LENGTHS.clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: loss(x, LABELS), lengths)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(LENGTHS, LABELS), loss(LENGTHS, LABELS))
    empty = torch.zeros(0, 3, requires_grad=True)
    value = loss(empty, LABELS[:0])
    value.backward()
    assert value == 0
    assert loss(LENGTHS.float(), LABELS).dtype == torch.float32


@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: loss.__name__)
@pytest.mark.parametrize(
    ("lengths", "labels", "error", "message"),
    [
        (LENGTHS, torch.tensor([0, 3]), ValueError, r"labels must lie in 0 \.\. 2, got 0 \.\. 3"),
        (LENGTHS, torch.tensor([-1, 0]), ValueError, r"labels must lie in 0 \.\. 2, got -1 \.\. 0"),
        (LENGTHS, torch.tensor([0]), ValueError, r"labels must be \[B\] = \[2\], .* got \(1,\)"),
        (LENGTHS, torch.tensor([0.0, 1.0]), TypeError, "labels must be an int64, int32 or uint8 tensor"),
        (LENGTHS, [0, 1], TypeError, "labels must be .* got list"),
        (LENGTHS[0], LABELS, ValueError, r"lengths must be \[B, J\]"),
        (LENGTHS[:, :0], LABELS, ValueError, r"lengths must be \[B, J\] with J at least 1"),
        (LENGTHS.long(), LABELS, TypeError, "lengths must be a floating-point tensor"),
        (None, LABELS, TypeError, "lengths must be .* got NoneType"),
    ],
)
def test_bad_input(loss, lengths, labels, error, message):
    with pytest.raises(error, match=message):
        loss(lengths, labels)


def test_bad_reductions_and_shapes():
    for loss in LOSSES:
        with pytest.raises(ValueError, match="reduction must be one of 'batchmean', 'mean', 'sum', 'none', got 'avg'"):
            loss(LENGTHS, LABELS, reduction="avg")
    with pytest.raises(ValueError, match=r"bool labels must be \[B, J\] = \[2, 3\], got \(2, 2\)"):
        margin_loss(LENGTHS, torch.ones(2, 2, dtype=torch.bool))
    with pytest.raises(TypeError, match=r"reconstruction must be a floating-point tensor .* got NoneType"):
        reconstruction_loss(None, torch.zeros(2, 1, 4, 4))
    with pytest.raises(ValueError, match=r"the shape of images, \(2, 1, 4, 4\), got \(2, 16\)"):
        reconstruction_loss(torch.zeros(2, 16), torch.zeros(2, 1, 4, 4))


# -------------------------------------------------------------------------------------------------- squash and length


@pytest.mark.parametrize("eps", [0.0, 0.1])
def test_squash(eps):
    s = torch.randn(4, 3, 5, dtype=torch.float64, requires_grad=True)
    for dim in (0, 1, -1):
        n = s.norm(dim=dim, keepdim=True)
        expected = n**2 / (1 + n**2) * s / torch.sqrt(n**2 + eps)
        torch.testing.assert_close(squash(s, dim, eps), expected)
    assert torch.autograd.gradcheck(lambda s: squash(s, eps=eps), s)
    assert torch.autograd.gradgradcheck(lambda s: squash(s, eps=eps), s)


@pytest.mark.parametrize("function", [squash, length], ids=lambda function: function.__name__)
def test_zero_vectors_have_zero_value_and_finite_derivatives(function):
    s = torch.zeros(2, 3, requires_grad=True)
    out = function(s)
    (first,) = torch.autograd.grad(out.sum(), s, create_graph=True)
    (second,) = torch.autograd.grad(first.sum() + 0 * s.sum(), s)
    assert (out == 0).all()
    assert (first == 0).all()
    assert (second == 0).all()


def test_length():
    poses = torch.tensor([[3.0, 4.0], [0.0, 0.0]], dtype=torch.float64)
    assert torch.equal(length(poses), torch.tensor([5.0, 0.0], dtype=torch.float64))
    assert torch.equal(length(poses.T, dim=0), length(poses))
    x = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(length, x)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_types_are_rounded_once(dtype):
    s = (100 * torch.randn(50, 8)).to(dtype)
    assert torch.equal(squash(s), squash(s.float()).to(dtype))
    assert torch.equal(length(s), length(s.float()).to(dtype))  # its square alone would overflow float16


def test_squash_and_length_refuse():
    for function in (squash, length):
        with pytest.raises(TypeError, match="must be a floating-point tensor, got torch"):
            function(torch.arange(3))
        with pytest.raises(TypeError, match="must be a floating-point tensor, got list"):
            function([1.0])
    for eps in (-1.0, math.inf, math.nan):
        with pytest.raises(ValueError, match="eps must be finite and not negative"):
            squash(torch.ones(3), eps=eps)
