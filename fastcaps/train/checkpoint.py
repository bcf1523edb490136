"""Checks of what a checkpoint holds, before anything is taken from it."""

import reprlib
from collections.abc import Collection
from typing import Any

import lightning
from packaging.version import InvalidVersion, Version
from torch import Tensor

PARTS = {
    "epoch": int, "global_step": int, "pytorch-lightning_version": str, "state_dict": dict, "loops": dict,
    "callbacks": dict, "optimizer_states": list, "lr_schedulers": list, "batches": dict, "fastcaps": dict,
}  # fmt: skip
MIGRATED = "legacy_pytorch-lightning_version"  # Lightning adds it to what an older version wrote, before we see it
OLDEST = Version("2.5")  # Lightning's version that fastcaps has always needed
# Parts of a group of parameters and of a schedule that all versions of torch write, and need.
GROUP = ("lr", "betas", "eps", "weight_decay", "amsgrad", "maximize", "params")
SCHEDULE = ("base_lrs", "last_epoch", "lr_lambdas")


def check_parts(checkpoint: Any, where: str) -> None:
    """Raise unless a checkpoint has the parts that a run writes.

    Raises:
        ValueError: one is missing or of another kind; the message names it and ``where``.
    """
    if not isinstance(checkpoint, dict) or "fastcaps" not in checkpoint:
        raise ValueError(f"{where} is not of a run of fastcaps train")
    for name, kind in PARTS.items():
        if not isinstance(checkpoint.get(name), kind):
            raise ValueError(f"{where}: {name!r} must be a {kind.__name__}, got {_shown(checkpoint.get(name))}")
    try:
        version = Version(checkpoint["pytorch-lightning_version"])
    except InvalidVersion as error:
        raise ValueError(f"{where}: {error}") from error
    if version < OLDEST:
        raise ValueError(f"{where} is of Lightning {version}; fastcaps has written none before {OLDEST}")


def check_state(checkpoint: dict[str, Any], like: dict[str, Any], where: str) -> None:
    """Raise unless the state in a checkpoint is built like that of the run which takes it.

    Args:
        checkpoint: which :func:`check_parts` has found right.
        like: the parts of a checkpoint of this run, with a state of the optimizer for each parameter.
        where: the file, for messages.

    Raises:
        ValueError: something is missing, or of another kind, shape or dtype, or out of range.
    """
    given = checkpoint["state_dict"]
    if other := given.keys() ^ like["state_dict"].keys():
        raise ValueError(f"{where}: the network differs in {', '.join(sorted(map(str, other)))}")
    like = like | {
        "optimizer_states": [_optimizer_like(checkpoint["optimizer_states"], like["optimizer_states"][0], where)],
        "lr_schedulers": [_schedule_like(checkpoint["lr_schedulers"], like["lr_schedulers"][0], where)],
    }
    if MIGRATED in checkpoint or checkpoint["pytorch-lightning_version"] != lightning.__version__:
        del like["loops"]  # of another version, whose state Lightning knows how to read
    for name, part in like.items():
        _check_like(checkpoint[name], part, f"{where}: {name}")
    if "loops" in like:
        begun = checkpoint["loops"]["fit_loop"]["epoch_progress"]["current"]["processed"]
        if begun != checkpoint["batches"]["epoch"]:
            raise ValueError(
                f"{where}: its loops are in epoch {begun}, its batches in {checkpoint['batches']['epoch']}"
            )


def _optimizer_like(given: list[Any], like: dict[str, Any], where: str) -> dict[str, Any]:
    """What an optimizer's state must be like: other versions of torch write other options."""
    _check_like(given, [{"state": {}, "param_groups": [{}]}], f"{where}: optimizer_states")
    (group,), (own,) = given[0]["param_groups"], like["param_groups"]
    own = own | {"weight_decay": float(own["weight_decay"])}
    return {"state": _those(like["state"], given[0]["state"]), "param_groups": [_those(own, group, GROUP)]}


def _schedule_like(given: list[Any], like: dict[str, Any], where: str) -> dict[str, Any]:
    _check_like(given, [{}], f"{where}: lr_schedulers")
    return _those(like, given[0], SCHEDULE)


def _those(like: dict[Any, Any], given: dict[Any, Any], needed: Collection[Any] = ()) -> dict[Any, Any]:
    """The parts that are given or needed."""
    return {name: part for name, part in like.items() if name in given or name in needed}


def _check_like(value: Any, like: Any, name: str) -> None:
    """Raise unless a value has the parts of another, each of its kind; no number is negative or NaN."""
    if isinstance(like, dict):
        if not isinstance(value, dict) or like.keys() - value.keys():
            wanted = ", ".join(map(str, like)) or "a dict"
            raise ValueError(f"{name} must have {wanted}, got {_shown(value)}")
        for key, part in like.items():
            _check_like(value[key], part, f"{name}[{key!r}]")
    elif isinstance(like, (list, tuple)):
        if not isinstance(value, (list, tuple)) or len(value) != len(like):
            raise ValueError(f"{name} must be a list of {len(like)}, got {_shown(value)}")
        for n, part in enumerate(like):
            _check_like(value[n], part, f"{name}[{n}]")
    elif isinstance(like, Tensor):
        _check_tensor(value, like, name)
    elif isinstance(like, (bool, str)) or like is None:
        if type(value) is not type(like):
            raise ValueError(f"{name} must be a {type(like).__name__}, got {_shown(value)}")
    elif type(value) not in {type(like), int} or not value >= 0:
        raise ValueError(f"{name} must be a {type(like).__name__} that is not negative, got {_shown(value)}")


def _check_tensor(value: Any, like: Tensor, name: str) -> None:
    if not isinstance(value, Tensor) or (value.shape, value.dtype) != (like.shape, like.dtype):
        raise ValueError(f"{name} must be {list(like.shape)} {like.dtype}, got {_shown(value)}")


def _shown(value: Any) -> str:
    """A value in a few words of one line."""
    return f"{list(value.shape)} {value.dtype}" if isinstance(value, Tensor) else reprlib.repr(value)
