"""The contents of a layer beside its parameters, and what a call changes of them."""

import hashlib
from collections import deque
from types import FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn

PLAIN = (bool, int, float, complex, str, bytes, type(None))  # compared by value; all else by identity and content
TORCHS_OWN = {*vars(nn.Module())}  # the attributes that every module has


def held(layer: nn.Module) -> dict[str, Any]:
    """What a layer holds beside its parameters, by name; containers and objects are looked into."""
    found: dict[str, Any] = {}
    seen = set()

    def look(name: str, value: Any) -> None:
        parts = _parts(value)
        if parts is None:
            found[name] = value
        elif id(value) not in seen:
            seen.add(id(value))
            for key, part in parts.items():
                look(f"{name}{key}", part)

    for prefix, module in layer.named_modules():
        for name, value in {**vars(module), **module._buffers}.items():
            if name not in TORCHS_OWN:
                look(".".join(filter(None, (prefix, name))), value)
    return found


def _parts(value: Any) -> dict[str, Any] | None:
    """What a container or an object holds; None: it is looked at as a whole."""
    if isinstance(value, dict):
        return {f"[{key!r}]": part for key, part in value.items()}
    if isinstance(value, (list, tuple, deque)):
        return {f"[{n}]": part for n, part in enumerate(value)}
    if isinstance(value, (Tensor, type, FunctionType, MethodType, ModuleType)) or not hasattr(value, "__dict__"):
        return None
    return {f".{name}": part for name, part in vars(value).items()}


def contents(layer: nn.Module) -> dict[str, tuple[Any, Any]]:
    """What a layer holds, parameters included, each as its object and its content: both tell what ``forward`` sets."""
    parameters = {n: (p, _digest(p)) for n, p in layer.named_parameters()}
    others = {n: (None, v) if isinstance(v, PLAIN) else (v, _content(v)) for n, v in held(layer).items()}
    return {**parameters, **others}


def _digest(parameter: Tensor) -> bytes:
    """A fingerprint of the entries, bit by bit: a copy of a large weight would take as much memory as the weight."""
    entries = parameter.detach().cpu().contiguous().flatten().view(torch.uint8)
    return hashlib.blake2b(entries.numpy().data).digest()


def _content(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value._version
    if isinstance(value, (set, frozenset)):
        return set(value)
    return value.tobytes() if hasattr(value, "tobytes") else None


def differences(before: dict[str, tuple[Any, Any]], after: dict[str, tuple[Any, Any]]) -> list[str]:
    """The attributes that are not what they were."""
    nothing = (object(), None)
    names = set()
    for name in before.keys() | after.keys():
        (a, was), (b, now) = before.get(name, nothing), after.get(name, nothing)
        if a is not b or (was,) != (now,):  # in a tuple NaN is equal to itself
            names.add(name.partition("[")[0])
    return sorted(names)
