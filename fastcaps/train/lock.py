"""The lock of a run's folder: one run at a time writes there."""

import contextlib
import os
import platform
import warnings
from collections.abc import Iterator
from datetime import datetime, timezone
from pathlib import Path
from typing import BinaryIO

from fastcaps._atomic import lock, named

NAME = "run.lock"


@contextlib.contextmanager
def locked(out: Path) -> Iterator[None]:
    """Hold a folder, which is made if it is not there; the end of the process lets go of it, however it ends.

    Readers are not kept out. At the end the lock's file is gone, and the folder if it was made here and is empty.

    Args:
        out: folder of the run.

    Raises:
        BlockingIOError: a run is going on there; the message names it.
        OSError: the folder cannot be made or written.
    """
    made = [folder for folder in (out, *out.parents) if not folder.exists()]
    try:
        out.mkdir(parents=True, exist_ok=True)
        with _held(out / NAME):
            yield
    finally:
        with contextlib.suppress(OSError):  # not empty
            for folder in made:
                folder.rmdir()


@contextlib.contextmanager
def _held(path: Path) -> Iterator[None]:
    """Hold a file, and remove it afterwards."""
    with _locked_file(path) as file:
        with named(path):
            file.truncate(0)
            file.write(f"process {os.getpid()} on {platform.node()} since {_now()}".encode())
            file.flush()
        try:
            yield
        finally:
            if _is_at(path, file):  # not if the folder was moved, and another one has its name
                path.unlink()


def _locked_file(path: Path) -> BinaryIO:
    """The file, open and locked."""
    while True:
        file = path.open("a+b")
        try:
            ours = lock(file)
        except OSError as error:
            text = f"{path.parent} cannot be locked ({error.strerror}): a second run there would not be noticed"
            warnings.warn(text, RuntimeWarning, stacklevel=2)
            return file
        if not ours:
            with file:
                holder = _holder(file)
            raise BlockingIOError(f"a run is going on in {path.parent} ({holder}): wait for it, or give another --out")
        if _is_at(path, file):
            return file
        file.close()  # the run that held it has just removed it


def _is_at(path: Path, file: BinaryIO) -> bool:
    """Whether an open file is the one of this name."""
    with contextlib.suppress(OSError):
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    return False


def _holder(file: BinaryIO) -> str:
    """What the holder has written: ``process 4711 on host since ...``."""
    file.seek(0)
    text = file.read(300).decode(errors="replace")
    return text if text and text.isprintable() else "another process"


def _now() -> str:
    return datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M:%S UTC")
