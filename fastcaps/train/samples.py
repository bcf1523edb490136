"""The data set of a run and its samples on a device."""

import hashlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from fastcaps import data as datasets
from fastcaps.data import Dataset, MultiMNIST
from fastcaps.train.settings import Settings

TEST_BATCH = 256
MULTI_DIGIT = {"digits-100": 2, "digits-1000": 3}  # how many digits stand side by side


def load_data(settings: Settings) -> Dataset | MultiMNIST:
    """The data set that the settings name.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file is not what it should be.
        OSError: a download failed.
    """
    if settings.data == "digits":
        return datasets.digits()
    if settings.data in MULTI_DIGIT:
        return datasets.multi_digit(MULTI_DIGIT[settings.data])
    if settings.data == "image-folder":
        return datasets.image_folder(settings.root, size=settings.image_height_width())
    load: Callable[..., Dataset | MultiMNIST] = getattr(datasets, settings.data.replace("-", "_"))
    return load(settings.root, download=settings.download)


def fingerprint(data: Dataset | MultiMNIST) -> dict[str, Any]:
    """What tells this data set from another: sizes, names, and a digest of all images and labels."""
    digest = hashlib.sha256()
    for tensor in data.tensors:
        digest.update(tensor.contiguous().numpy().data)
    return {
        "image_shape": list(data.image_shape),
        "classes": data.num_classes,
        "class names": list(data.class_names),
        "training images": data.num_train,
        "test images": data.num_test,
        "sha256": digest.hexdigest(),
    }


def training_counts(data: Dataset | MultiMNIST) -> Tensor:
    """How many training images each class has, ``[J]`` int64; of pairs, how many digits they are made of."""
    return data.tensors[1].cpu().bincount(minlength=data.num_classes)


def class_weights(data: Dataset | MultiMNIST, settings: Settings) -> Tensor | None:
    """The weights of the classes in the loss of training, ``[J]`` float32; None: all 1.

    Balanced weights are N / (J n) for a class with n of the N training images: all classes count the same, and the mean
    over the training images is 1.

    Raises:
        ValueError: the settings name more or fewer weights than there are classes.
    """
    if settings.class_weights == "none":
        return None
    if settings.class_weights == "balanced":
        counts = training_counts(data)
        return counts.sum() / (counts > 0).sum() / counts.clamp(min=1)
    weights = settings.class_weight_numbers() or []
    if len(weights) != data.num_classes:
        raise ValueError(f"--class-weights has {len(weights)} numbers, but there are {data.num_classes} classes")
    return torch.tensor(weights)


class Samples:
    """Samples of a data set on a device: images ``[B, C, H, W]``, labels ``[B, K]``, targets ``[B, K, C, H, W]``.

    K is the number of things in an image: 2 for overlapping digits, else 1. Targets are what a decoder should draw.

    Args:
        data: the data set.
        settings: resolved; seed and augmentation are used.
        device: where the samples are.
    """

    def __init__(self, data: Dataset | MultiMNIST, settings: Settings, device: torch.device | str = "cpu") -> None:
        self.data = data.to(device)
        self.seed, self.shift, self.flip = settings.seed, settings.shift or 0, bool(settings.flip)

    def train(self, index: Tensor, epoch: int) -> tuple[Tensor, Tensor, Tensor]:
        """Training samples of these indices ``[B]`` int64, augmented as is right for this epoch."""
        return self.data.train(index, seed=self.seed, epoch=epoch, shift=self.shift, flip=self.flip)

    def test(self, index: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Test samples of these indices ``[B]`` int64, the same at every call."""
        return self.data.test(index)

    def tests(self, rank: int = 0, world: int = 1) -> "DataLoader[Any]":
        """Batches of the test set in order: the share of process ``rank`` of ``world``."""
        parts = torch.arange(self.data.num_test)[rank::world].split(TEST_BATCH)
        # A generator of its own: a DataLoader draws a seed, and would draw it from the one that dropout uses.
        generator = torch.Generator()
        return DataLoader(_Mapped(self.test, parts), batch_size=None, generator=generator)


class _Mapped(torch.utils.data.Dataset[Any]):
    def __init__(self, function: Callable[[Tensor], Any], parts: tuple[Tensor, ...]) -> None:
        self.function, self.parts = function, parts

    def __len__(self) -> int:
        return len(self.parts)

    def __getitem__(self, n: int) -> Any:
        return self.function(self.parts[n])
