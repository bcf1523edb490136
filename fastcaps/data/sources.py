"""Files of published data sets: addresses, checksums, downloads and readers."""

import gzip
import hashlib
import http.client
import math
import os
import struct
import tarfile
import urllib.request
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from fastcaps._atomic import whole_file
from fastcaps._deprecated import FormerTuple

T = TypeVar("T")

BLOCK = 2**16  # bytes of a download that are read at once
TIMEOUT = 60  # seconds without a byte


@dataclass(frozen=True)
class Source(FormerTuple):
    """Where a data set is published.

    Attributes:
        address: ends in a slash.
        files: the MD5 sum of each file by its name.
    """

    address: str
    files: dict[str, str]


# MNIST and Fashion-MNIST have files of the same names: the MD5 sum of the 60,000 training labels tells them apart.
WHOSE_LABELS = {"e86ee40d66677c011a9abda399ec8c4d": "mnist", "3236f6424fc25388b2834cb19942cf7e": "fashion-mnist"}

MNIST = Source(
    "https://ossci-datasets.s3.amazonaws.com/mnist/",
    {
        "train-images-idx3-ubyte.gz": "f68b3c2dcbeaaa9fbdd348bbdeb94873",
        "train-labels-idx1-ubyte.gz": "d53e105ee54ea40749a09fcbcd1e9432",
        "t10k-images-idx3-ubyte.gz": "9fb629c4189551a2d022fa330f9573f3",
        "t10k-labels-idx1-ubyte.gz": "ec29112dd5afa0611ce80d1b7f02629c",
    },
)
FASHION_MNIST = Source(
    "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",
    {
        "train-images-idx3-ubyte.gz": "8d4fb7e6c68d591d4c3dfef9ec88bf0d",
        "train-labels-idx1-ubyte.gz": "25c81989df183df01b3e8a0aad5dffbe",
        "t10k-images-idx3-ubyte.gz": "bef4ecab320f06d8554ea6380940ec79",
        "t10k-labels-idx1-ubyte.gz": "bb300cfdad3c16e7a12a480ee83cd310",
    },
)
CIFAR10 = Source("https://www.cs.toronto.edu/~kriz/", {"cifar-10-binary.tar.gz": "c32a1d4ab5d03f1284b67883e8d87530"})
CIFAR10_FILES = [*(f"data_batch_{n}.bin" for n in range(1, 6)), "test_batch.bin"]


def read_idx(path: str | os.PathLike[str]) -> Tensor:
    """The unsigned bytes of an idx file, gzipped or not (LeCun's format: a magic number, big-endian sizes, the data).

    Args:
        path: the file; ``.gz`` is unpacked.

    Returns:
        A uint8 tensor of the file's shape.

    Raises:
        ValueError: it is not an idx file of unsigned bytes, or it has the wrong size, or its compression is broken.
    """
    try:
        content = Path(path).read_bytes()
        if str(path).endswith(".gz"):
            content = gzip.decompress(content)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ValueError(f"{path} is broken: {error}") from error
    if len(content) < 4 or content[:3] != b"\0\0\x08" or len(content) < 4 + 4 * content[3]:
        raise ValueError(
            f"{path} is not an idx file of unsigned bytes: it begins with {content[:4].hex() or 'nothing'}"
        )
    shape = struct.unpack(f">{content[3]}I", content[4 : 4 + 4 * content[3]])
    data = content[4 + 4 * content[3] :]
    if len(data) != math.prod(shape) or math.prod(max(size, 1) for size in shape) >= 2**63:
        raise ValueError(f"{path} says that it holds {' x '.join(map(str, shape))} bytes, but it holds {len(data)}")
    return torch.from_numpy(np.frombuffer(bytearray(data), np.uint8)).view(shape)


def find_file(name: str, folders: Iterable[Path]) -> Path | None:
    """The first of the folders' files with this name."""
    return next((folder / name for folder in folders if (folder / name).is_file()), None)


def not_found(names: Sequence[str], folders: Sequence[Path]) -> FileNotFoundError:
    """An error that says which files are not there, and where they were looked for."""
    places = ", ".join(str(folder) for folder in folders)
    return FileNotFoundError(f"missing: {', '.join(names)}; looked for in {places}; download=True (--download) fetches")


def first_whole(readers: Sequence[Callable[[], T]]) -> T:
    """What the first reader gives that does not find its file broken.

    Raises:
        ValueError: all are broken.
    """
    errors = []
    for read in readers:
        try:
            return read()
        except ValueError as error:
            errors.append(str(error))
    raise ValueError("; ".join(errors))


def read_members(archive: Path, names: Sequence[str]) -> list[bytes]:
    """Files of a tar archive by their last name; nothing is unpacked to the disk."""
    try:
        with tarfile.open(archive) as tar:
            files = {Path(member.name).name: member for member in tar.getmembers() if member.isfile()}
            missing = [name for name in names if name not in files]
            if missing:
                raise ValueError(f"{archive} lacks {', '.join(missing)}")
            contents = []
            for name in names:
                file = tar.extractfile(files[name])
                assert file is not None
                contents.append(file.read())
            return contents
    except (tarfile.TarError, EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ValueError(f"{archive} is broken: {error}") from error


def fetch(source: Source, name: str, root: Path) -> None:
    """Fetch one file; it appears under its name only when it is whole and has its checksum.

    Args:
        source: where the data set is published.
        name: of the file.
        root: the folder it goes into; made if it is not there.

    Raises:
        ValueError: it has another checksum.
        OSError: it cannot be fetched or written.
    """
    root.mkdir(parents=True, exist_ok=True)
    address = source.address + name
    digest = hashlib.md5(usedforsecurity=False)  # against accidents: the publishers give no other
    with whole_file(root / name) as file:
        for block in _blocks(address):
            digest.update(block)
            file.write(block)
        if digest.hexdigest() != source.files[name]:
            raise ValueError(f"{address} has the MD5 sum {digest.hexdigest()}, not {source.files[name]}: not kept")


def _blocks(address: str) -> Iterator[bytes]:
    """What a server sends, block by block; every failure of the network is an OSError that names the address."""
    try:
        with urllib.request.urlopen(address, timeout=TIMEOUT) as response:
            while block := response.read(BLOCK):
                yield block
            if missing := getattr(response, "length", 0):  # http.client takes an early end for the end of the file
                raise ConnectionError(f"it broke off with {missing} bytes to come")
    except (OSError, http.client.HTTPException, ValueError) as error:  # ValueError: a redirection to no address
        reason = " ".join(str(error).split()) or type(error).__name__
        raise OSError(f"{address} cannot be fetched: {reason}") from error
