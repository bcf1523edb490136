"""Numbers of several digits: many classes from few images."""

import torch
from torch import Tensor

from fastcaps._checks import check_int, check_positive
from fastcaps.data.augment import random_integers
from fastcaps.data.datasets import Dataset, digits


def multi_digit(count: int, *, seed: int = 0, num_train: int = 20_000, num_test: int = 4_000) -> Dataset:
    """Numbers of ``count`` digits side by side, a class for each: 100 for two digits, 1000 for three.

    Which of the 8x8 images of :func:`digits` stand in image ``n`` is a pure function of seed and ``n``.

    Args:
        count: digits of a number, from 1 to 4.
        seed: another one gives other numbers of the same digits.
        num_train: numbers made of the training digits.
        num_test: numbers made of the test digits.

    Returns:
        A :class:`Dataset` with images ``[num_train, 1, 8, 8 * count]`` and ``[num_test, 1, 8, 8 * count]``.

    Raises:
        TypeError: an argument is not an int.
        ValueError: ``count`` is not from 1 to 4, a number of images is below 1, or the seed is negative.
        ModuleNotFoundError: scikit-learn is missing (the extra ``train``).

    Example:
        >>> data = multi_digit(2, num_train=50, num_test=10)
        >>> data.train_images.shape, data.num_classes
        (torch.Size([50, 1, 8, 16]), 100)
    """
    check_int("count", count, 1)
    check_int("seed", seed, 0)
    check_positive(num_train=num_train, num_test=num_test)
    if count > 4:
        raise ValueError(f"count must be from 1 to 4, got {count}")
    single = digits()
    train = _numbers(single.train_images, single.train_labels, count, seed, num_train)
    test = _numbers(single.test_images, single.test_labels, count, seed, num_test)
    return Dataset(*train, *test, single.num_classes**count)


def _numbers(images: Tensor, labels: Tensor, count: int, seed: int, n: int) -> tuple[Tensor, Tensor]:
    """Images ``[n, 1, H, count * W]`` and labels ``[n]`` of ``n`` numbers made of ``[N, 1, H, W]`` and ``[N]``."""
    index = torch.arange(n)
    chosen = [random_integers(len(images), index, seed, place) for place in range(count)]
    number = torch.zeros(n, dtype=torch.long)
    for digit in chosen:
        number = 10 * number + labels[digit]
    return torch.cat([images[digit] for digit in chosen], dim=3), number
