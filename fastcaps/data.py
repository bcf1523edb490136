"""Datasets as tensors, one function each."""

from typing import NamedTuple

import torch
from torch import Tensor


class Dataset(NamedTuple):
    """Images ``[N, C, H, W]`` float32 in [0, 1] and labels ``[N]`` int64, for training and for testing."""

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor
    num_classes: int


def digits() -> Dataset:
    """1,797 real handwritten digits of 8x8 pixels that ship with scikit-learn (Alpaydin and Kaynak 1998).

    One fifth of them, 359 images, is the test set; the split is always the same.

    Returns:
        A :class:`Dataset` with images ``[1438, 1, 8, 8]`` and ``[359, 1, 8, 8]``.

    Raises:
        ModuleNotFoundError: scikit-learn is missing (the extra ``train``).

    Example:
        >>> digits().train_images.shape
        torch.Size([1438, 1, 8, 8])
    """
    try:
        from sklearn.datasets import load_digits
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("the digits come with scikit-learn: pip install scikit-learn") from error
    bunch = load_digits()
    images = torch.from_numpy(bunch.images).float()[:, None] / 16  # 17 grey levels
    labels = torch.from_numpy(bunch.target).long()
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    test, train = order[: len(order) // 5], order[len(order) // 5 :]
    return Dataset(images[train], labels[train], images[test], labels[test], 10)
