"""Reading of files that may be damaged, or edited by somebody: a ValueError of one line names the file."""

import json
import os
import struct
import zipfile
import zlib
from pathlib import Path
from typing import Any


def read_json(path: str | os.PathLike[str]) -> Any:
    """What a JSON file holds.

    Raises:
        OSError: it cannot be read.
        ValueError: it is not JSON.
    """
    return parsed_json(Path(path).read_bytes(), os.fspath(path))


def parsed_json(text: str | bytes, where: str) -> Any:
    """What a JSON text says; ``where`` names it in the message.

    Raises:
        ValueError: it is not JSON.
    """
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:  # ValueError: also bytes that are no text, and endless numbers
        raise ValueError(f"{where} is not JSON: {one_line(error)}") from error


def check_zip(path: str | os.PathLike[str]) -> None:
    """Raise unless a zip archive is whole, and each of its members has its CRC-32: ``torch.load`` looks at none.

    Raises:
        OSError: it cannot be read.
        ValueError: it is no zip archive, or damaged.
    """
    with Path(path).open("rb") as file:
        try:
            with zipfile.ZipFile(file) as archive:
                changed = archive.testzip()
        # ValueError, RuntimeError, OSError: of headers that name another encoding, encryption, or place in the file
        except (zipfile.BadZipFile, struct.error, zlib.error, EOFError, ValueError, RuntimeError, OSError) as error:
            raise ValueError(f"{os.fspath(path)} is damaged: {one_line(error)}") from error
    if changed is not None:
        raise ValueError(f"{os.fspath(path)} is damaged: what it holds under {changed!r} is not what was written there")


def one_line(error: BaseException) -> str:
    """The message of an error in one line."""
    return " ".join(str(error).split()) or type(error).__name__
