"""Datasets as tensors, one function each; files are checked, and fetched on demand."""

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from fastcaps.data.augment import random_integers
from fastcaps.data.sources import (
    CIFAR10,
    CIFAR10_FILES,
    FASHION_MNIST,
    MNIST,
    WHOSE_LABELS,
    Source,
    fetch,
    find_file,
    not_found,
    read_idx,
    read_members,
)


class Dataset(NamedTuple):
    """Images ``[N, C, H, W]`` float32 in [0, 1] and labels ``[N]`` int64, for training and for testing.

    ``class_names`` are those of an image folder; elsewhere there are none.
    """

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor
    num_classes: int
    class_names: tuple[str, ...] = ()


IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp")


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
        download: fetch what is missing from the published address, into ``root/mnist``; checksums are those published.

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
        download: fetch the archive from the published address into ``root`` if it is missing.

    Returns:
        A :class:`Dataset` with images ``[50000, 3, 32, 32]`` and ``[10000, 3, 32, 32]``.

    Raises:
        FileNotFoundError: a file is missing; the message names all of them and where they were looked for.
        ValueError: a file has the wrong size or checksum, or a label is out of range.
        OSError: the download failed.
    """
    folders = [Path(root), Path(root) / "cifar-10-batches-bin"]
    (archive,) = CIFAR10.files
    contents: list[bytes] = []
    there = [find_file(name, folders) for name in CIFAR10_FILES]
    if all(there):
        contents = [path.read_bytes() for path in there if path is not None]
    else:
        if download and not (Path(root) / archive).is_file():
            fetch(CIFAR10, archive, Path(root))
        path = find_file(archive, folders)
        if path is None:
            raise not_found([*CIFAR10_FILES, f"or {archive} with all of them"], folders)
        contents = read_members(path, CIFAR10_FILES)
    parts = []
    for name, content in zip(CIFAR10_FILES, contents, strict=True):
        if len(content) != 10_000 * 3073:
            raise ValueError(f"{name} must have 10000 x 3073 bytes, got {len(content)}")
        rows = torch.frombuffer(bytearray(content), dtype=torch.uint8).view(10_000, 3073)
        parts.append((rows[:, 1:].reshape(-1, 3, 32, 32).float() / 255, _labels(rows[:, 0], 10, name)))
    images, labels = zip(*parts, strict=True)
    return Dataset(torch.cat(images[:5]), torch.cat(labels[:5]), images[5], labels[5], 10)


def image_folder(root: str | os.PathLike[str], *, channels: int | None = None) -> Dataset:
    """Images of one's own: ``root/train/CLASS/*.png`` and ``root/test/CLASS/*.png`` (or jpg, bmp, webp).

    Args:
        root: the folder. The classes are the folders in ``train``, in alphabetical order.
        channels: 1 for grey, 3 for colour; None: 1 if all images are grey.

    Returns:
        A :class:`Dataset`.

    Raises:
        FileNotFoundError: a folder or its images are missing.
        ValueError: images have different sizes, or a class of ``test`` is not in ``train``.
        ModuleNotFoundError: Pillow is missing.
    """
    root = Path(root)
    for part in ("train", "test"):
        if not (root / part).is_dir():
            raise FileNotFoundError(f"there is no folder {str(root / part)!r} (wanted: {part}/CLASS/*.png)")
    folders = {
        part: {path.name for path in (root / part).iterdir() if path.is_dir() and not path.name.startswith(".")}
        for part in ("train", "test")
    }
    classes = sorted(folders["train"])
    unknown = folders["test"] - folders["train"]
    if unknown:
        raise ValueError(f"classes in test but not in train: {', '.join(sorted(unknown))}")
    found = {
        part: [
            (path, n)
            for n, name in enumerate(classes)
            for path in sorted((root / part / name).glob("*"))
            if path.suffix.lower() in IMAGE_SUFFIXES
        ]
        for part in ("train", "test")
    }
    for part, paths in found.items():
        if not paths:
            raise FileNotFoundError(f"there is no image in {str(root / part)!r} (wanted: {part}/CLASS/*.png)")
    if empty := set(range(len(classes))) - {n for _, n in found["train"]}:
        raise FileNotFoundError(f"there is no image in {str(root / 'train' / classes[min(empty)])!r}")
    images = {part: [read_image(path) for path, _ in paths] for part, paths in found.items()}
    everything = [*images["train"], *images["test"]]
    grey = channels == 1 or (channels is None and all(image.shape[0] == 1 for image in everything))
    first = found["train"][0][0]
    tensors = []
    for part, paths in found.items():
        for (path, _), image in zip(paths, images[part], strict=True):
            if image.shape[1:] != everything[0].shape[1:]:
                sizes = [f"{shape[2]}x{shape[1]}" for shape in (everything[0].shape, image.shape)]
                raise ValueError(f"all images must have one size: {first} has {sizes[0]} pixels, {path} {sizes[1]}")
        stacked = torch.stack([_with_channels(image, 1 if grey else 3) for image in images[part]])
        tensors += [stacked, torch.tensor([n for _, n in paths])]
    train_images, train_labels, test_images, test_labels = tensors
    return Dataset(train_images, train_labels, test_images, test_labels, len(classes), tuple(classes))


def read_image(
    path: str | os.PathLike[str], channels: int | None = None, size: tuple[int, int] | None = None
) -> Tensor:
    """A picture as a tensor, upright as its camera noted; what is transparent is white.

    Args:
        path: png, jpg, bmp or webp.
        channels: 1 for grey, 3 for colour; None: as the file has it.
        size: (height, width) in pixels it is scaled to; None: as the file has it.

    Returns:
        ``[1 or 3, H, W]`` float32 in [0, 1].

    Raises:
        ValueError: it cannot be read.
        ModuleNotFoundError: Pillow is missing.
    """
    try:
        from PIL import Image, ImageOps, UnidentifiedImageError
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("reading images needs Pillow: pip install pillow") from error
    try:
        with Image.open(path) as file:
            image: Image.Image = ImageOps.exif_transpose(file)
            if image.mode.startswith("I"):  # 16 bits, which convert() would clip at 255
                image = Image.fromarray((np.asarray(image, np.float32) / 257).round().clip(0, 255).astype(np.uint8))
            grey = image.mode in ("1", "L", "LA") if channels is None else channels == 1
            if image.has_transparency_data:
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
            picture = image.convert("L" if grey else "RGB")
            if size is not None:
                picture = picture.resize((size[1], size[0]))
            pixels = torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8)
    except (UnidentifiedImageError, OSError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path} is not an image that can be read: {error}") from error
    return pixels.view(picture.height, picture.width, -1).movedim(2, 0).float() / 255


def _with_channels(image: Tensor, channels: int) -> Tensor:
    if image.shape[0] == channels:
        return image
    return image.expand(3, -1, -1) if channels == 3 else image.mean(0, keepdim=True)


def _idx_dataset(root: Path, places: Sequence[str], source: Source, num_classes: int, download: bool) -> Dataset:
    folders = [root / place for place in places]
    names = list(source.files)
    if download:
        for name in names:
            if find_file(name, folders) is None and find_file(name.removesuffix(".gz"), folders) is None:
                fetch(source, name, folders[0])
    paths = [find_file(name.removesuffix(".gz"), folders) or find_file(name, folders) for name in names]
    if None in paths:
        missing = [name for name, path in zip(names, paths, strict=True) if path is None]
        raise not_found([f"{name} (or without .gz)" for name in missing], folders)
    tensors: list[Tensor] = []
    for images, labels in ((paths[0], paths[1]), (paths[2], paths[3])):
        assert images is not None
        assert labels is not None
        x, y = read_idx(images), read_idx(labels)
        if x.dim() != 3 or y.dim() != 1 or len(x) != len(y):
            raise ValueError(
                f"{images} must hold images [N, H, W] and {labels} labels [N], got {list(x.shape)} and {list(y.shape)}"
            )
        if not len(x):
            raise ValueError(f"{images} holds no image")
        tensors += [x[:, None].float() / 255, _labels(y, num_classes, str(labels))]
    whose = WHOSE_LABELS.get(hashlib.md5(tensors[1].byte().numpy().data, usedforsecurity=False).hexdigest())
    if whose not in (None, places[0]):
        raise ValueError(f"{paths[1]} is of {whose}, not of {places[0]}")
    if tensors[0].shape[1:] != tensors[2].shape[1:]:
        raise ValueError(f"{paths[0]} and {paths[2]} hold images of different sizes")
    train_images, train_labels, test_images, test_labels = tensors
    return Dataset(train_images, train_labels, test_images, test_labels, num_classes)


def _labels(labels: Tensor, num_classes: int, name: str) -> Tensor:
    if len(labels) and int(labels.max()) >= num_classes:
        raise ValueError(f"{name}: labels must be below {num_classes}, got {int(labels.max())}")
    return labels.long()


class MultiMNIST(NamedTuple):
    """Pairs of overlapping digits of different classes on 36x36 pixels, made on the fly (Sabour 2017, section 6).

    Attributes:
        digits: the single digits, a :class:`Dataset` of 28x28 pixels.
        num_classes: 10.
    """

    digits: Dataset
    num_classes: int = 10

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
        images, labels = self.digits[:2] if train else self.digits[2:4]
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
    near = [(a, b) for a in range(9) for b in range(9)]
    return [(a, c, b, d) for a, b in near for c, d in near if (20 - abs(a - b)) * (20 - abs(c - d)) >= 0.8 * 20 * 20]


def _placed(images: Tensor, down: Tensor, right: Tensor) -> Tensor:
    """``[B, 1, 28, 28]`` on ``[B, 36, 36]``, each at its own place."""
    size = images.shape[2]
    canvas = images.new_zeros(len(images), size + 8, size + 8)
    batch, pixels = torch.arange(len(images), device=images.device), torch.arange(size, device=images.device)
    rows, columns = pixels + down[:, None], pixels + right[:, None]
    canvas[batch[:, None, None], rows[:, :, None], columns[:, None, :]] = images[:, 0]
    return canvas
