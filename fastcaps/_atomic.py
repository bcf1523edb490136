"""Atomic writes: a file is there whole or not at all."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO


@contextmanager
def whole_file(path: str | os.PathLike[str], *, suffix: str = ".partial") -> Iterator[BinaryIO]:
    """Write a file to the side; at the end see it on the disk and rename it. What was there before stays until then.

    Args:
        path: the file; its folder must be there.
        suffix: of the name to the side. What a killed process leaves under it, the next write replaces.

    Yields:
        The open binary file. An exception inside the block leaves ``path`` as it was.

    Raises:
        OSError: it cannot be written; the file is as it was.
    """
    path = Path(path)
    partial = path.with_name(f"{path.name}{suffix}")
    try:
        with partial.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def write_whole(path: str | os.PathLike[str], content: bytes | memoryview) -> None:
    """Write a whole file by :func:`whole_file`.

    Args:
        path: the file; its folder must be there.
        content: all of it.

    Raises:
        OSError: it cannot be written; the file is as it was.
    """
    with whole_file(path) as file:
        file.write(content)
