"""Image data for tests: small files of MNIST's format, and where the real ones are."""

import gzip
import os
import struct
from pathlib import Path

import torch

from fastcaps.data import datasets

# The four files of MNIST; tests that need them are skipped where they are not.
MNIST = Path(os.environ.get("FASTCAPS_MNIST", Path(__file__).parents[3] / "shared" / "data" / "mnist"))
NAMES = list(datasets.MNIST.files)


def idx(array: torch.Tensor) -> bytes:
    header = bytes([0, 0, 8, array.dim()]) + struct.pack(f">{array.dim()}I", *array.shape)
    return header + bytes(array.flatten().int().tolist())


def small_mnist(folder: Path, zipped=True, **replaced: bytes) -> dict[str, bytes]:
    """Four small files; returns their contents."""
    generator = torch.Generator().manual_seed(0)
    contents = {}
    for part, n in (("train", 6), ("t10k", 4)):
        contents[f"{part}-images-idx3-ubyte"] = idx(torch.randint(256, (n, 5, 4), generator=generator))
        contents[f"{part}-labels-idx1-ubyte"] = idx(torch.arange(n) % 10)
    contents = {f"{k}.gz" if zipped else k: gzip.compress(v) if zipped else v for k, v in contents.items()}
    for name, content in (contents | replaced).items():
        (folder / name).write_bytes(content)
    return contents | replaced
