"""Atomic writes: a file is there whole or not at all. And the lock that tells a writer that lives from a dead one."""

import contextlib
import errno
import os
import re
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import IO, BinaryIO

try:
    import fcntl
except ModuleNotFoundError:  # Windows
    fcntl = None  # type: ignore[assignment]

# Of a write, where the system does not say which file was written.
DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS)


def lock(file: IO[bytes]) -> bool:
    """Lock an open file until it is closed, which the end of the process does, too; False: another holds it.

    Raises:
        OSError: the system or the file system knows no locks.
    """
    if fcntl is None:
        raise OSError(errno.ENOTSUP, "this system has no flock", file.name)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


@contextlib.contextmanager
def named(path: str | os.PathLike[str]) -> Iterator[None]:
    """Let a full or failing disk say which file it is about: ``write`` and ``fsync`` do not tell."""
    try:
        yield
    except OSError as error:
        if error.filename is None and error.errno in DISK_ERRORS:
            error.filename = os.fspath(path)
        raise


@contextlib.contextmanager
def whole_file(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """Write a file to the side; at the end see it on the disk and rename it. What was there before stays until then.

    The name to the side, ``NAME.RANDOM.partial``, is of this write alone. What killed processes have left under such
    names is removed.

    Args:
        path: the file; its folder must be there.

    Yields:
        The open binary file. An exception inside the block leaves ``path`` as it was.

    Raises:
        OSError: it cannot be written; the file is as it was.
    """
    path = Path(path)
    with named(path):
        _remove_partials(path)
        partial, file = _open_partial(path)
        try:
            with file:
                yield file
                file.flush()
                os.fsync(file.fileno())
                if fcntl is not None:  # still locked: nobody takes it for one of a dead process
                    os.replace(partial, path)
            if fcntl is None:  # Windows renames no open file
                os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)


def _open_partial(path: Path) -> tuple[Path, BinaryIO]:
    """A new file beside ``path``, locked: it is not taken for one of a dead process."""
    while True:
        partial = path.with_name(f"{path.name}.{secrets.token_hex(4)}.partial")
        file = partial.open("xb")
        try:
            if lock(file) and partial.exists():
                return partial, file
        except OSError:
            return partial, file  # where there are no locks, nobody removes files of others
        file.close()  # it was removed before it was locked


def _remove_partials(path: Path) -> None:
    """Remove what processes that are no more have written to the side for ``path``."""
    ours = re.compile(re.escape(path.name) + r"(\.[0-9a-f]+)?\.partial")  # 0.1 had none, or its process's number
    partials: list[Path] = []
    with contextlib.suppress(OSError):  # a folder that may be written but not listed
        partials = [file for file in path.parent.iterdir() if ours.fullmatch(file.name)]
    for partial in partials:
        with contextlib.suppress(OSError), partial.open("r+b") as file:  # gone, or not ours, or there are no locks
            if lock(file):
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
