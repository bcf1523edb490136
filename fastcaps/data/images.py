"""Image files and image folders as tensors."""

import os
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fastcaps._reading import one_line
from fastcaps.data.datasets import Dataset

PARTS = ("train", "test")
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp")


def image_folder(
    root: str | os.PathLike[str], *, channels: int | None = None, size: tuple[int, int] | None = None
) -> Dataset:
    """Images of one's own: ``root/train/CLASS/*.png`` and ``root/test/CLASS/*.png`` (or jpg, bmp, webp).

    Args:
        root: the folder. The classes are the folders in ``train``, in alphabetical order; hidden files and folders
            (``.DS_Store``, ``__MACOSX``) do not count.
        channels: 1 for grey, 3 for colour; None: 1 if all images are grey.
        size: (height, width) in pixels that all images are scaled to; None: as they are, which must be one size.

    Returns:
        A :class:`Dataset`.

    Raises:
        FileNotFoundError: a folder or its images are missing.
        ValueError: images have different sizes, or a class of ``test`` is not in ``train``.
        ModuleNotFoundError: Pillow is missing.

    Example:
        >>> import tempfile
        >>> from PIL import Image
        >>> with tempfile.TemporaryDirectory() as root:
        ...     for file in ("train/ant/1.png", "train/bee/1.png", "test/bee/2.png"):
        ...         Path(root, file).parent.mkdir(parents=True)
        ...         Image.new("L", (8, 8)).save(Path(root, file))
        ...     data = image_folder(root)
        >>> data.train_images.shape, data.class_names
        (torch.Size([2, 1, 8, 8]), ('ant', 'bee'))
    """
    root = Path(root)
    classes = _class_names(root)
    found = {part: _files(root / part, classes) for part in PARTS}
    if empty := set(range(len(classes))) - {label for _, label in found["train"]}:
        raise FileNotFoundError(f"there is no image in {str(root / 'train' / classes[min(empty)])!r}")
    images = {path: read_image(path, size=size) for files in found.values() for path, _ in files}
    _check_one_size(images)
    grey = channels == 1 or (channels is None and all(image.shape[0] == 1 for image in images.values()))
    stacked = [
        torch.stack([_with_channels(images[path], 1 if grey else 3) for path, _ in files]) for files in found.values()
    ]
    labels = [torch.tensor([label for _, label in files]) for files in found.values()]
    return Dataset(stacked[0], labels[0], stacked[1], labels[1], len(classes), tuple(classes))


def _class_names(root: Path) -> list[str]:
    for part in PARTS:
        if not (root / part).is_dir():
            raise FileNotFoundError(f"there is no folder {str(root / part)!r} (wanted: {part}/CLASS/*.png)")
    train, test = (
        {path.name for path in (root / part).iterdir() if path.is_dir() and not _hidden(path)} for part in PARTS
    )
    if unknown := test - train:
        raise ValueError(f"classes in test but not in train: {', '.join(sorted(unknown))}")
    return sorted(train)


def _hidden(path: Path) -> bool:
    """What systems and programs put beside one's own files: .DS_Store, ._1.png, .ipynb_checkpoints, __MACOSX."""
    return path.name.startswith(".") or path.name == "__MACOSX"


def _files(folder: Path, classes: Sequence[str]) -> list[tuple[Path, int]]:
    """The images in the folders of the classes, each with its label."""
    files = [
        (path, label)
        for label, name in enumerate(classes)
        for path in sorted((folder / name).glob("*"))
        if path.suffix.lower() in IMAGE_SUFFIXES and not _hidden(path)
    ]
    if not files:
        raise FileNotFoundError(f"there is no image in {str(folder)!r} (wanted: {folder.name}/CLASS/*.png)")
    return files


def _check_one_size(images: Mapping[Path, Tensor]) -> None:
    first, *others = images
    H, W = images[first].shape[1:]
    for path in others:
        h, w = images[path].shape[1:]
        if (h, w) != (H, W):
            raise ValueError(
                f"all images must have one size, or be scaled to one (size=, --image-size): "
                f"{first} has {W}x{H} pixels, {path} {w}x{h}"
            )


def read_image(
    path: str | os.PathLike[str], channels: int | None = None, size: tuple[int, int] | None = None
) -> Tensor:
    """An image file as a tensor, upright as its camera noted, on white where it is transparent.

    Args:
        path: png, jpg, bmp or webp.
        channels: 1 for grey, 3 for colour; None: as the file has it.
        size: (height, width) in pixels it is scaled to; None: as the file has it.

    Returns:
        ``[1 or 3, H, W]`` float32 in [0, 1].

    Raises:
        ValueError: it cannot be read.
        ModuleNotFoundError: Pillow is missing.

    Example:
        >>> import tempfile
        >>> from PIL import Image
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     Image.new("RGB", (6, 4), "red").save(f"{folder}/a.png")
        ...     read_image(f"{folder}/a.png").shape
        torch.Size([3, 4, 6])
    """
    try:
        from PIL import Image, ImageOps
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
    # OSError: also of what is no image at all; the others are what Pillow raises for damaged parts of one
    except (OSError, SyntaxError, TypeError, ValueError, struct.error, Image.DecompressionBombError) as error:
        raise ValueError(f"{path} is not an image that can be read: {one_line(error)}") from error
    return pixels.view(picture.height, picture.width, -1).movedim(2, 0).float() / 255


def _with_channels(image: Tensor, channels: int) -> Tensor:
    if image.shape[0] == channels:
        return image
    return image.expand(3, -1, -1) if channels == 3 else image.mean(0, keepdim=True)
