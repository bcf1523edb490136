"""Pairs of overlapping digits (MultiMNIST), made on the fly."""

import os
from dataclasses import dataclass

import torch
from torch import Tensor

from fastcaps._deprecated import FormerTuple
from fastcaps.data.augment import random_integers
from fastcaps.data.datasets import Dataset, mnist

MARGIN = 4  # pixels added on each side of a digit, and the longest shift of one


@dataclass(frozen=True, eq=False)
class MultiMNIST(FormerTuple):
    """Pairs of overlapping digits of different classes on 36x36 pixels, made on the fly (Sabour 2017, section 6).

    Attributes:
        digits: the single digits, a :class:`Dataset` of 28x28 pixels.
        num_classes: 10.

    Example:
        >>> images, labels = torch.rand(20, 1, 28, 28), torch.arange(20) % 10
        >>> pairs = MultiMNIST(Dataset(images, labels, images, labels, 10))
        >>> pairs.image_shape, pairs.test(torch.arange(4))[1].shape
        ((1, 36, 36), torch.Size([4, 2]))
    """

    digits: Dataset
    num_classes: int = 10

    @property
    def class_names(self) -> tuple[str, ...]:
        """Those of the digits: none."""
        return self.digits.class_names

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """What pairs are made of: training images and labels, test images and labels."""
        return self.digits.tensors

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """``(C, H, W)`` of a pair."""
        C, H, W = self.digits.image_shape
        return C, H + 2 * MARGIN, W + 2 * MARGIN

    @property
    def num_train(self) -> int:
        """Number of training pairs of an epoch, one for each digit."""
        return self.digits.num_train

    @property
    def num_test(self) -> int:
        """Number of test pairs, one for each digit."""
        return self.digits.num_test

    @property
    def device(self) -> torch.device:
        """Where the digits are."""
        return self.digits.device

    def to(self, device: torch.device | str) -> "MultiMNIST":
        """The same on another device."""
        return MultiMNIST(self.digits.to(device), self.num_classes)

    def train(
        self, index: Tensor, *, seed: int, epoch: int, shift: int = 0, flip: bool = False
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Training pairs: a pure function of index, seed and epoch.

        Args:
            index: ``[B]`` int64, on any device.
            seed: of the run.
            epoch: which pass over the data it is.
            shift: 0, as the digits of a pair are shifted already.
            flip: False.

        Returns:
            Images ``[B, 1, H, W]``, labels ``[B, 2]`` and the two digits alone, ``[B, 2, 1, H, W]``.

        Raises:
            ValueError: ``shift`` or ``flip`` is given.
        """
        if shift or flip:
            raise ValueError("pairs are shifted already: shift and flip are not for them")
        images, alone, labels = self.batch(index.to(self.device), seed=seed, epoch=epoch)
        return images, labels, alone[:, :, None]

    def test(self, index: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Test pairs of these indices ``[B]`` int64, always the same; returns what :meth:`train` does."""
        images, alone, labels = self.batch(index.to(self.device), seed=0, epoch=0, train=False)
        return images, labels, alone[:, :, None]

    def batch(self, index: Tensor, *, seed: int, epoch: int, train: bool = True) -> tuple[Tensor, Tensor, Tensor]:
        """The pairs of these indices: a pure function of seed, epoch and index.

        The first digit of pair ``n`` is digit ``n`` modulo their number. Each is shifted by up to 4 pixels in each
        direction, so that the boxes of 20x20 pixels around the digits share at least 80 % of their area.

        Args:
            index: ``[B]`` int64, on the digits' device.
            seed: of the run.
            epoch: which pass it is.
            train: of the training digits, or of the test digits.

        Returns:
            Images ``[B, 1, 36, 36]``, the two digits alone ``[B, 2, 36, 36]``, and their labels ``[B, 2]``.
        """
        images, labels = self.tensors[:2] if train else self.tensors[2:]
        first = index % len(images)
        second = random_integers(len(images), index, seed, epoch, 3)
        for attempt in range(64):  # one tenth has the same class at each attempt
            same = labels[second] == labels[first]
            if not same.any():
                break
            second = torch.where(same, random_integers(len(images), index, seed, epoch, 100 + attempt), second)
        moves = torch.tensor(_moves(), device=images.device)
        down, right, down_2, right_2 = moves[random_integers(len(moves), index, seed, epoch, 4)].unbind(1)
        alone = torch.stack([_placed(images[first], down, right), _placed(images[second], down_2, right_2)], 1)
        return alone.amax(1, keepdim=True), alone, torch.stack([labels[first], labels[second]], 1)


def multi_mnist(root: str | os.PathLike[str], *, download: bool = False) -> MultiMNIST:
    """Pairs of MNIST digits; ``root`` and ``download`` as in :func:`mnist`, whose errors it raises.

    Returns:
        A :class:`MultiMNIST`.
    """
    return MultiMNIST(mnist(root, download=download))


def _moves() -> list[tuple[int, int, int, int]]:
    """All shifts of two digits by 0..8 pixels whose boxes of 20x20 pixels overlap by at least 80 %."""
    places = range(2 * MARGIN + 1)
    near = [(a, b) for a in places for b in places]
    return [(a, c, b, d) for a, b in near for c, d in near if (20 - abs(a - b)) * (20 - abs(c - d)) >= 0.8 * 20 * 20]


def _placed(images: Tensor, down: Tensor, right: Tensor) -> Tensor:
    """``[B, 1, 28, 28]`` on ``[B, 36, 36]``, each at its own place."""
    size = images.shape[2]
    canvas = images.new_zeros(len(images), size + 2 * MARGIN, size + 2 * MARGIN)
    batch, pixels = torch.arange(len(images), device=images.device), torch.arange(size, device=images.device)
    rows, columns = pixels + down[:, None], pixels + right[:, None]
    canvas[batch[:, None, None], rows[:, :, None], columns[:, None, :]] = images[:, 0]
    return canvas
