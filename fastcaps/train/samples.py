"""The data set of a run, and the batches that a network is trained and tested on."""

import hashlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from fastcaps import data as datasets
from fastcaps.data import Dataset, MultiMNIST
from fastcaps.data.augment import augment
from fastcaps.train.settings import Settings

TEST_BATCH = 256


def load_data(settings: Settings) -> Dataset | MultiMNIST:
    """The data set that the settings name.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file is not what it should be.
        OSError: a download failed.
    """
    if settings.data == "digits":
        return datasets.digits()
    if settings.data == "image-folder":
        return datasets.image_folder(settings.root)
    load: Callable[..., Dataset | MultiMNIST] = getattr(datasets, settings.data.replace("-", "_"))
    return load(settings.root, download=settings.download)


def single(data: Dataset | MultiMNIST) -> Dataset:
    """The images as they are, or those that are made into pairs."""
    return data.digits if isinstance(data, MultiMNIST) else data


def image_shape(data: Dataset | MultiMNIST) -> tuple[int, int, int]:
    """``(C, H, W)`` of what the network sees."""
    C, H, W = single(data).train_images.shape[1:]
    return (C, H + 8, W + 8) if isinstance(data, MultiMNIST) else (C, H, W)


def fingerprint(data: Dataset | MultiMNIST) -> dict[str, Any]:
    """What tells this data set from another: sizes, names, and a digest of all images and labels."""
    tensors, names = single(data)[:4], single(data).class_names
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(tensor.contiguous().numpy().data)
    return {
        "image_shape": list(image_shape(data)),
        "classes": data.num_classes,
        "class names": list(names),
        "training images": len(tensors[1]),
        "test images": len(tensors[3]),
        "sha256": digest.hexdigest(),
    }


class Samples:
    """Batches of a data set on a device: images ``[B, C, H, W]``, labels ``[B, K]``, what to draw ``[B, K, C, H, W]``.

    K is the number of things in an image: 2 for overlapping digits, else 1.
    """

    def __init__(self, data: Dataset | MultiMNIST, settings: Settings, device: torch.device | str = "cpu") -> None:
        train_images, train_labels, test_images, test_labels = (x.to(device) for x in single(data)[:4])
        self.single = Dataset(train_images, train_labels, test_images, test_labels, *single(data)[4:])
        self.pairs = MultiMNIST(self.single) if isinstance(data, MultiMNIST) else None
        self.seed, self.shift, self.flip = settings.seed, settings.shift or 0, bool(settings.flip)

    def train(self, index: Tensor, epoch: int) -> tuple[Tensor, Tensor, Tensor]:
        """Training samples, augmented as is right for this epoch; pairs are shifted already."""
        there = index.to(self.device)
        if self.pairs is not None:
            images, alone, labels = self.pairs.batch(there, seed=self.seed, epoch=epoch)
            return images, labels, alone[:, :, None]
        images, labels = self.single.train_images[there], self.single.train_labels[there]
        if self.shift or self.flip:
            images = augment(images, index, seed=self.seed, epoch=epoch, shift=self.shift, flip=self.flip)
        return images, labels[:, None], images[:, None]

    def test(self, index: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Test samples, the same at every call."""
        index = index.to(self.device)
        if self.pairs is not None:
            images, alone, labels = self.pairs.batch(index, seed=0, epoch=0, train=False)
            return images, labels, alone[:, :, None]
        images = self.single.test_images[index]
        return images, self.single.test_labels[index][:, None], images[:, None]

    def tests(self, rank: int = 0, world: int = 1) -> "DataLoader[Any]":
        """This process's share of the test set, in order."""
        parts = torch.arange(len(self.single.test_labels))[rank::world].split(TEST_BATCH)
        # A generator of its own: a DataLoader draws a seed, and would draw it from the one that dropout uses.
        generator = torch.Generator()
        return DataLoader(_Mapped(self.test, parts), batch_size=None, generator=generator)

    @property
    def device(self) -> torch.device:
        """Where the images are."""
        return self.single.train_images.device


class _Mapped(torch.utils.data.Dataset[Any]):
    def __init__(self, function: Callable[[Tensor], Any], parts: tuple[Tensor, ...]) -> None:
        self.function, self.parts = function, parts

    def __len__(self) -> int:
        return len(self.parts)

    def __getitem__(self, n: int) -> Any:
        return self.function(self.parts[n])
