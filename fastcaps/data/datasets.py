"""Published data sets as tensors, one function each."""

import functools
import hashlib
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from fastcaps._deprecated import FormerTuple
from fastcaps.data.augment import augment
from fastcaps.data.sources import (
    CIFAR10,
    CIFAR10_FILES,
    FASHION_MNIST,
    MNIST,
    WHOSE_LABELS,
    Source,
    fetch,
    find_file,
    first_whole,
    not_found,
    read_idx,
    read_members,
)

CIFAR10_ROWS = 10_000  # of each file


@dataclass(frozen=True, eq=False)
class Dataset(FormerTuple):
    """Images with one class each, as tensors on one device.

    Attributes:
        train_images: ``[N, C, H, W]`` float32 in [0, 1].
        train_labels: ``[N]`` int64, class indices.
        test_images: ``[M, C, H, W]``, as ``train_images``.
        test_labels: ``[M]``, as ``train_labels``.
        num_classes: J.
        class_names: J names, or none; image folders have them.

    Example:
        >>> data = Dataset(torch.rand(6, 1, 8, 8), torch.arange(6), torch.rand(2, 1, 8, 8), torch.arange(2), 6)
        >>> data.image_shape, data.num_train, data.num_test
        ((1, 8, 8), 6, 2)
    """

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor
    num_classes: int
    class_names: tuple[str, ...] = ()

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Training images and labels, test images and labels."""
        return self.train_images, self.train_labels, self.test_images, self.test_labels

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """``(C, H, W)``."""
        C, H, W = self.train_images.shape[1:]
        return C, H, W

    @property
    def num_train(self) -> int:
        """Number of training samples."""
        return len(self.train_labels)

    @property
    def num_test(self) -> int:
        """Number of test samples."""
        return len(self.test_labels)

    @property
    def device(self) -> torch.device:
        """Where the images are."""
        return self.train_images.device

    def to(self, device: torch.device | str) -> "Dataset":
        """The same on another device."""
        train_images, train_labels, test_images, test_labels = (tensor.to(device) for tensor in self.tensors)
        return Dataset(train_images, train_labels, test_images, test_labels, self.num_classes, self.class_names)

    def train(
        self, index: Tensor, *, seed: int, epoch: int, shift: int = 0, flip: bool = False
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Training samples, augmented: a pure function of index, seed and epoch.

        Args:
            index: ``[B]`` int64; best on the CPU, see :func:`augment`. ``n + num_train`` is image ``n`` again, but
                augmented in another way.
            seed: of the run.
            epoch: which pass over the data it is.
            shift: as in :func:`augment`.
            flip: as in :func:`augment`.

        Returns:
            Images ``[B, C, H, W]``, labels ``[B, 1]`` and what a decoder should draw, ``[B, 1, C, H, W]``.

        Example:
            >>> images, labels, targets = digits().train(torch.arange(4), seed=0, epoch=0, shift=1)
            >>> images.shape, labels.shape, targets.shape
            (torch.Size([4, 1, 8, 8]), torch.Size([4, 1]), torch.Size([4, 1, 1, 8, 8]))
        """
        there = index.to(self.device) % self.num_train
        images = self.train_images[there]
        if shift or flip:
            images = augment(images, index, seed=seed, epoch=epoch, shift=shift, flip=flip)
        return images, self.train_labels[there][:, None], images[:, None]

    def test(self, index: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Test samples of these indices ``[B]`` int64; returns what :meth:`train` does."""
        index = index.to(self.device)
        images = self.test_images[index]
        return images, self.test_labels[index][:, None], images[:, None]


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


def mnist(root: str | os.PathLike[str], *, download: bool = False) -> Dataset:
    """Handwritten digits, 60,000 and 10,000 images of 28x28 pixels (LeCun, Cortes and Burges).

    Args:
        root: the folder with the four idx files, each as it is or as ``.gz``; ``root/mnist`` and ``root/MNIST/raw`` are
            looked into as well.
        download: fetch what is missing or broken from the published address, into ``root/mnist``; checksums are those
            published.

    Returns:
        A :class:`Dataset` with images ``[60000, 1, 28, 28]`` and ``[10000, 1, 28, 28]``.

    Raises:
        FileNotFoundError: a file is missing; the message names all of them and where they were looked for.
        ValueError: a file has the wrong type or size, a download the wrong checksum, a label is out of range, or it is
            Fashion-MNIST, whose files have the same names.
        OSError: the download failed.
    """
    return _idx_dataset(Path(root), ("mnist", "", "MNIST/raw"), MNIST, 10, download)


def fashion_mnist(root: str | os.PathLike[str], *, download: bool = False) -> Dataset:
    """Zalando's articles, 60,000 and 10,000 images of 28x28 pixels (Xiao, Rasul and Vollgraf 2017).

    Args:
        root: as in :func:`mnist`; here ``root/fashion-mnist`` and ``root/FashionMNIST/raw`` are looked into as well.
        download: as in :func:`mnist`, into ``root/fashion-mnist``.

    Returns:
        A :class:`Dataset` with images ``[60000, 1, 28, 28]`` and ``[10000, 1, 28, 28]``.

    Raises:
        FileNotFoundError: as in :func:`mnist`.
        ValueError: as in :func:`mnist`.
        OSError: the download failed.
    """
    return _idx_dataset(Path(root), ("fashion-mnist", "", "FashionMNIST/raw"), FASHION_MNIST, 10, download)


def cifar10(root: str | os.PathLike[str], *, download: bool = False) -> Dataset:
    """Colour photographs of 10 kinds of things, 50,000 and 10,000 of 32x32 pixels (Krizhevsky 2009), binary version.

    Args:
        root: the folder with ``data_batch_1.bin`` ... ``test_batch.bin``, or with ``cifar-10-binary.tar.gz``.
        download: fetch the archive from the published address into ``root`` if it is missing or broken.

    Returns:
        A :class:`Dataset` with images ``[50000, 3, 32, 32]`` and ``[10000, 3, 32, 32]``.

    Raises:
        FileNotFoundError: a file is missing; the message names all of them and where they were looked for.
        ValueError: a file has the wrong size or checksum, or a label is out of range.
        OSError: the download failed.
    """
    images, labels = zip(*_cifar10_parts(Path(root), download), strict=True)
    return Dataset(torch.cat(images[:5]), torch.cat(labels[:5]), images[5], labels[5], 10)


def _cifar10_parts(root: Path, download: bool) -> list[tuple[Tensor, Tensor]]:
    """Images and labels of the six files: plain, from the archive, or from a download where these are broken."""
    (archive,), folders = CIFAR10.files, [root, root / "cifar-10-batches-bin"]
    plain = [path for name in CIFAR10_FILES if (path := find_file(name, folders))]
    zipped = find_file(archive, folders)

    def fetched() -> list[bytes]:
        fetch(CIFAR10, archive, root)
        return read_members(root / archive, CIFAR10_FILES)

    readers: list[Callable[[], list[bytes]]] = []
    if len(plain) == len(CIFAR10_FILES):
        readers.append(lambda: [path.read_bytes() for path in plain])
    if zipped is not None:
        readers.append(lambda: read_members(zipped, CIFAR10_FILES))
    if download:
        readers.append(fetched)
    if not readers:
        raise not_found([*CIFAR10_FILES, f"or {archive} with all of them"], folders)

    def parts(read: Callable[[], list[bytes]]) -> list[tuple[Tensor, Tensor]]:
        return [_cifar10_images(name, content) for name, content in zip(CIFAR10_FILES, read(), strict=True)]

    return first_whole([functools.partial(parts, read) for read in readers])


def _cifar10_images(name: str, content: bytes) -> tuple[Tensor, Tensor]:
    """Images and labels of one file: rows of a label and 3 x 32 x 32 pixels."""
    if len(content) != CIFAR10_ROWS * 3073:
        raise ValueError(f"{name} must have {CIFAR10_ROWS} x 3073 bytes, got {len(content)}")
    rows = torch.frombuffer(bytearray(content), dtype=torch.uint8).view(CIFAR10_ROWS, 3073)
    return rows[:, 1:].reshape(-1, 3, 32, 32).float() / 255, _labels(rows[:, 0], 10, name)


def _idx_dataset(root: Path, places: Sequence[str], source: Source, num_classes: int, download: bool) -> Dataset:
    train, labels, test, test_labels_file = _idx_files(source, [root / place for place in places], download)
    train_images, train_labels = _idx_part(train, labels, num_classes)
    test_images, test_labels = _idx_part(test, test_labels_file, num_classes)
    whose = WHOSE_LABELS.get(hashlib.md5(train_labels.byte().numpy().data, usedforsecurity=False).hexdigest())
    if whose not in (None, places[0]):
        raise ValueError(f"{labels[0]} is of {whose}, not of {places[0]}")
    if train_images.shape[1:] != test_images.shape[1:]:
        raise ValueError(f"{train[0]} and {test[0]} hold images of different sizes")
    return Dataset(train_images, train_labels, test_images, test_labels, num_classes)


def _idx_files(source: Source, folders: Sequence[Path], download: bool) -> list[tuple[Path, Tensor]]:
    """Training images and labels, test images and labels, each plain or zipped, with the file it was found in.

    A download, into the first folder, is for what is missing or broken.
    """

    def read(path: Path, fetched: bool = False) -> tuple[Path, Tensor]:
        if fetched:
            fetch(source, path.name, path.parent)
        return path, read_idx(path)

    readers, missing = [], []
    for name in source.files:
        places = [folder / own for own in (name.removesuffix(".gz"), name) for folder in folders]
        local = [functools.partial(read, path) for path in places if path.is_file()]
        readers.append([*local, *([functools.partial(read, folders[0] / name, fetched=True)] if download else [])])
        if not readers[-1]:
            missing.append(f"{name} (or without .gz)")
    if missing:
        raise not_found(missing, folders)
    return [first_whole(several) for several in readers]


def _idx_part(images: tuple[Path, Tensor], labels: tuple[Path, Tensor], num_classes: int) -> tuple[Tensor, Tensor]:
    (images_file, x), (labels_file, y) = images, labels
    if x.dim() != 3 or y.dim() != 1 or len(x) != len(y):
        shapes = f"{list(x.shape)} and {list(y.shape)}"
        raise ValueError(f"{images_file} must hold images [N, H, W] and {labels_file} labels [N], got {shapes}")
    if not x.numel():
        raise ValueError(f"{images_file} holds no image")
    return x[:, None].float() / 255, _labels(y, num_classes, str(labels_file))


def _labels(labels: Tensor, num_classes: int, name: str) -> Tensor:
    if len(labels) and int(labels.max()) >= num_classes:
        raise ValueError(f"{name}: labels must be below {num_classes}, got {int(labels.max())}")
    return labels.long()
