"""Random but seeded edits of what files hold, and what a reader may say of them."""

import contextlib
import copy
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

HOSTILE = [
    None, True, -1, 0, 3, 2**31, 2**70, 10**400, 0.5, float("nan"), float("inf"), "", "x", "a\nb", "\0", [], [1], [[]],
    {}, {"x": 1},
]  # fmt: skip


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Each container in a value with each of its keys."""
    for key in value.keys() if isinstance(value, dict) else range(len(value)):
        yield value, key
        if isinstance(value[key], (dict, list)):
            yield from _places(value[key])


def edited(value: Any, seed: int, hostile: list[Any] | None = None) -> tuple[Any, str]:
    """A copy of nested dicts and lists in which one part is replaced, removed or added, and what was done."""
    rng, made = random.Random(seed), copy.deepcopy(value)
    container, key = rng.choice(list(_places(made)))
    action = rng.choice(["replace"] * 4 + ["remove", "add"])
    new = copy.deepcopy(rng.choice(hostile or HOSTILE))
    if action == "replace":
        container[key] = new
    elif action == "remove":
        del container[key]
    elif isinstance(container, dict):
        container["unknown"] = new
    else:
        container.append(new)
    return made, f"seed {seed}: {action} {key!r}" + (f" {new!r}" if action != "remove" else "")


def damaged(content: bytes, seed: int) -> bytes:
    """A file's content with one byte changed, cut off, or with something more at its end."""
    rng = random.Random(seed)
    at, kind = rng.randrange(len(content)), rng.choice(["change"] * 6 + ["cut", "more"])
    if kind == "change":
        return content[:at] + bytes([content[at] ^ rng.randrange(1, 256)]) + content[at + 1 :]
    return content[:at] if kind == "cut" else content + rng.randbytes(1 + at % 100)


@contextlib.contextmanager
def fine_or_a_line_about(path: Path, edit: str) -> Iterator[None]:
    """Whatever was done to a file: nothing is raised, or a ValueError or OSError of one line that names it."""
    try:
        yield
    except (ValueError, OSError) as error:
        text = str(error)
        assert str(path) in text, f"{edit}: {text}"
        assert len(text.splitlines()) == 1, f"{edit}: {text}"
    except Exception as error:
        raise AssertionError(f"{edit}: {type(error).__name__}: {error}") from error
