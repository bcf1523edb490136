"""Losses of capsule networks, for B samples and J capsules (classes).

``reduction`` is PyTorch's: ``"batchmean"`` sums over classes and averages over samples (the paper and most code),
``"mean"`` averages over both, ``"sum"`` sums over both, ``"none"`` returns ``[B, J]``.

``class_weights`` count the samples of a class more or less: the terms of a sample are multiplied by the weight of its
class, and with several classes by their mean. The average is over the number of samples, not over the sum of weights.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from fastcaps._checks import check_choice, check_floating, check_labels, check_number

REDUCTIONS = ("batchmean", "mean", "sum", "none")


def _reduce(loss: Tensor, reduction: str) -> Tensor:
    """Reduce ``[B, ...]`` as named; an empty batch has a loss of 0, not NaN."""
    check_choice("reduction", reduction, REDUCTIONS)
    if reduction == "none":
        return loss
    if reduction == "sum":
        return loss.sum()
    return loss.sum() / max(loss.numel() if reduction == "mean" else loss.shape[0], 1)


def _check_lengths(lengths: Tensor) -> None:
    check_floating("lengths", lengths, "[B, J]")
    if lengths.dim() != 2 or lengths.shape[1] == 0:
        raise ValueError(f"lengths must be [B, J] with J at least 1, got {tuple(lengths.shape)}")


def present_classes(labels: Tensor, B: int, J: int) -> Tensor:
    """Which classes are in each image, bool ``[B, J]``: from class indices ``[B]``, or as it is.

    Raises:
        TypeError: labels are neither indices nor bool.
        ValueError: shapes do not fit, or a label is out of range.

    Example:
        >>> present_classes(torch.tensor([2, 0]), B=2, J=3)
        tensor([[False, False,  True],
                [ True, False, False]])
    """
    check_labels(labels, B, J, several=True)
    return labels if labels.dtype == torch.bool else one_hot(labels, J)


def one_hot(labels: Tensor, J: int) -> Tensor:
    """``[B, J]`` bool from class indices ``[B]``; unlike torch's it reads no value on the host."""
    return labels[:, None] == torch.arange(J, device=labels.device)


def _weighted(terms: Tensor, present: Tensor, class_weights: Tensor | None) -> Tensor:
    """Terms ``[B, ...]`` times the mean weight of the classes that are ``present`` (bool ``[B, J]``); 1 if none is."""
    if class_weights is None:
        return terms
    check_floating("class_weights", class_weights, "[J]")
    if class_weights.shape != present.shape[1:]:
        raise ValueError(f"class_weights must be [J] = {list(present.shape[1:])}, got {tuple(class_weights.shape)}")
    weights = (present * class_weights.to(terms.dtype)).sum(1) / present.sum(1).clamp(min=1)  # [B]
    weights = torch.where(present.any(1), weights, 1.0)
    return terms * weights.view(-1, *[1] * (terms.dim() - 1))


def margin_loss(
    lengths: Tensor,
    labels: Tensor,
    *,
    m_plus: float = 0.9,
    m_minus: float = 0.1,
    down_weight: float = 0.5,
    class_weights: Tensor | None = None,
    reduction: str = "batchmean",
) -> Tensor:
    r"""The margin loss of Sabour et al. (2017), equation 4.

    .. math:: L_j = T_j \max(0, m^+ - |v_j|)^2 + \lambda (1 - T_j) \max(0, |v_j| - m^-)^2

    Args:
        lengths: ``[B, J]``, lengths of the output capsules.
        labels: class indices ``[B]`` (int64, int32 or uint8), or which classes are present, bool ``[B, J]``: any
            number of classes in an image, also none.
        m_plus: length wanted of a present class.
        m_minus: length allowed of an absent one.
        down_weight: lambda, the weight of absent classes.
        class_weights: ``[J]``, floating point, see above; None: all 1.
        reduction: ``"batchmean"``, ``"mean"``, ``"sum"`` or ``"none"``.

    Returns:
        A scalar, or ``[B, J]`` for ``"none"``; dtype of ``lengths``.

    Raises:
        TypeError: lengths are not floating point, or labels are neither indices nor bool.
        ValueError: shapes do not fit, a label is out of range, or the reduction is unknown.

    Example:
        >>> margin_loss(torch.tensor([[0.9, 0.1, 0.3]]), torch.tensor([0]))  # 0.5 * (0.3 - 0.1)^2
        tensor(0.0200)
    """
    _check_lengths(lengths)
    present = present_classes(labels, *lengths.shape)
    short = F.relu(m_plus - lengths).square()
    long = F.relu(lengths - m_minus).square()
    return _reduce(_weighted(torch.where(present, short, down_weight * long), present, class_weights), reduction)


def focal_margin_loss(
    lengths: Tensor,
    labels: Tensor,
    *,
    gamma: float = 2.0,
    m_plus: float = 0.9,
    m_minus: float = 0.1,
    down_weight: float = 0.5,
    class_weights: Tensor | None = None,
    reduction: str = "batchmean",
) -> Tensor:
    r"""The margin loss with the modulating factor of the focal loss (Lin et al. 2017, equation 4).

    A class that is already right counts less: its term is multiplied by :math:`(1 - |v_j|)^\gamma` where it is present
    and by :math:`|v_j|^\gamma` where it is absent. ``gamma = 0`` is :func:`margin_loss`.

    Args:
        lengths: ``[B, J]``, between 0 and 1.
        labels: as in :func:`margin_loss`.
        gamma: the exponent, not negative.
        m_plus: as in :func:`margin_loss`.
        m_minus: as in :func:`margin_loss`.
        down_weight: as in :func:`margin_loss`.
        class_weights: as in :func:`margin_loss`.
        reduction: as in :func:`margin_loss`.

    Returns:
        A scalar, or ``[B, J]`` for ``"none"``; dtype of ``lengths``.

    Raises:
        TypeError: as :func:`margin_loss`, or ``gamma`` is not a number.
        ValueError: as :func:`margin_loss`, or ``gamma`` is negative or not finite.

    Example:
        >>> focal_margin_loss(torch.tensor([[0.5, 0.1]]), torch.tensor([0]), gamma=1.0)  # 0.5 * 0.4^2
        tensor(0.0800)
    """
    check_number("gamma", gamma)
    margins = {"m_plus": m_plus, "m_minus": m_minus, "down_weight": down_weight}
    terms = margin_loss(lengths, labels, **margins, class_weights=class_weights, reduction="none")
    error = torch.where(present_classes(labels, *lengths.shape), 1 - lengths, lengths)
    # Where the error is 0 the term is 0 too; a power below 1 would have an infinite slope there.
    factor = torch.where(error > 0, error, 1.0) ** gamma
    return _reduce(factor * terms, reduction)


def spread_loss(
    lengths: Tensor,
    labels: Tensor,
    *,
    margin: float = 0.9,
    class_weights: Tensor | None = None,
    reduction: str = "batchmean",
) -> Tensor:
    r"""The spread loss of Hinton et al. (2018), equation 3.

    .. math:: L_j = \max(0, m - (a_t - a_j))^2 \quad (j \ne t)

    Args:
        lengths: ``[B, J]``, activations.
        labels: class indices ``[B]``, one class for each image; :func:`margin_loss` takes several.
        margin: m; the paper raises it from 0.2 to 0.9 during training.
        class_weights: as in :func:`margin_loss`.
        reduction: as in :func:`margin_loss`.

    Returns:
        A scalar, or ``[B, J]`` for ``"none"`` (0 at the target); dtype of ``lengths``.

    Raises:
        TypeError: lengths are not floating point, or labels are not indices.
        ValueError: shapes do not fit, a label is out of range, or the reduction is unknown.

    Example:
        >>> spread_loss(torch.tensor([[0.5, 0.2]]), torch.tensor([0]), margin=0.4)  # (0.4 - 0.3)^2
        tensor(0.0100)
    """
    _check_lengths(lengths)
    check_labels(labels, *lengths.shape)
    target = lengths.gather(1, labels[:, None].long())  # [B, 1]
    terms = F.relu(margin - (target - lengths)).square()
    present = one_hot(labels, lengths.shape[1])
    return _reduce(_weighted(terms.masked_fill(present, 0), present, class_weights), reduction)


def cross_entropy_loss(
    lengths: Tensor,
    labels: Tensor,
    *,
    scale: float = 1.0,
    class_weights: Tensor | None = None,
    reduction: str = "batchmean",
) -> Tensor:
    r"""Cross-entropy with the capsule lengths as logits.

    Lengths lie in [0, 1), so at ``scale = 1`` the loss of a perfect network is still
    :math:`\log(1 + (J - 1) e^{-1})`; a larger scale sharpens it.

    Args:
        lengths: ``[B, J]``.
        labels: class indices ``[B]``, one class for each image; :func:`margin_loss` takes several.
        scale: factor on the lengths.
        class_weights: as in :func:`margin_loss`.
        reduction: ``"batchmean"`` (here the same as ``"mean"``), ``"sum"``, or ``"none"`` for ``[B]``.

    Returns:
        A scalar, or ``[B]`` for ``"none"``; dtype of ``lengths``.

    Raises:
        TypeError: lengths are not floating point, or labels are not indices.
        ValueError: shapes do not fit, a label is out of range, or the reduction is unknown.

    Example:
        >>> cross_entropy_loss(torch.zeros(3, 4), torch.tensor([0, 1, 2]))  # log 4
        tensor(1.3863)
    """
    _check_lengths(lengths)
    check_labels(labels, *lengths.shape)
    terms = F.cross_entropy(scale * lengths, labels.long(), reduction="none")
    return _reduce(_weighted(terms, one_hot(labels, lengths.shape[1]), class_weights), reduction)


def reconstruction_loss(
    reconstruction: Tensor, images: Tensor, *, weight: float = 0.0005, reduction: str = "batchmean"
) -> Tensor:
    """The weighted sum of squared pixel errors (Sabour et al. 2017, section 4.1).

    Args:
        reconstruction: ``[B, ...]``, of the shape of ``images``.
        images: ``[B, C, H, W]``, values in [0, 1].
        weight: 0.0005 in the paper, so that it does not dominate the margin loss.
        reduction: ``"batchmean"`` sums over pixels and averages over samples; ``"mean"`` averages over both, ``"sum"``
            sums over both, ``"none"`` returns one value per pixel.

    Returns:
        A scalar, or the shape of ``images`` for ``"none"``.

    Raises:
        TypeError: an argument is not a floating-point tensor.
        ValueError: shapes differ, or the reduction is unknown.

    Example:
        >>> reconstruction_loss(torch.zeros(2, 1, 28, 28), torch.ones(2, 1, 28, 28))  # 0.0005 * 784
        tensor(0.3920)
    """
    for name, value in (("reconstruction", reconstruction), ("images", images)):
        check_floating(name, value, "[B, C, H, W]")
        if value.dim() < 1:
            raise ValueError(f"{name} must be [B, ...], got a scalar")
    if reconstruction.shape != images.shape:
        raise ValueError(
            f"reconstruction must have the shape of images, {tuple(images.shape)}, got {tuple(reconstruction.shape)}"
        )
    return weight * _reduce((reconstruction - images).square(), reduction)
