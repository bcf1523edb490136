"""Targets of ``fastcaps doctor``: a function that builds a model, or a checkpoint."""

import importlib.util
import inspect
import itertools
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from fastcaps._deprecated import warn_renamed
from fastcaps.convert.checkpoints import (
    NETWORKS,
    OtherNetwork,
    PublicNetwork,
    convert_checkpoint,
    read_state_dict,
    way_out,
)
from fastcaps.convert.failure import explain_failure
from fastcaps.convert.modules import full_copy, random_state_kept
from fastcaps.convert.recipes import find_recipe
from fastcaps.doctor import examine, iter_findings
from fastcaps.doctor.finding import BATCH_MATES, INPUT_SQUASH, ITERATIONS, WRONG, ZERO_CAPSULES, Finding
from fastcaps.doctor.watch import Watch
from fastcaps.models import CapsNet
from fastcaps.models.network import describe

RENAMED = {"margin": "margin_loss", "reconstruction": "reconstruction_loss"}  # keys of 0.1
USUAL = ((1, 28, 28), (3, 32, 32), (1, 32, 32), (3, 28, 28))  # images that are tried
BATCH = (5, 7, 11, 13)  # samples: the first number that is no other size, so that the batch axis can be told


def load_target(target: str) -> dict[str, Any]:
    """``model.py:build`` as arguments of :func:`examine`; ``build()`` gives a model, (model, sample), or a dict.

    Raises:
        ValueError: there is no such file or function, or it returns something else.
    """
    file, _, name = target.rpartition(":")
    if not Path(file).is_file():
        raise ValueError(f"there is no file {file!r} (wanted: FILE.py:FUNCTION, or a checkpoint)")
    if Path(file).suffix != ".py":
        raise ValueError(f"{file} is no .py file (wanted: FILE.py:FUNCTION, or a checkpoint)")
    build = getattr(_imported(Path(file)), name, None)
    if not callable(build):
        raise ValueError(f"{file} has no function {name!r}")
    try:
        inspect.signature(build).bind()
    except TypeError as error:
        raise ValueError(f"{name} must be a function without arguments: {error}") from error
    built = build()
    if isinstance(built, nn.Module):
        return {"model": built}
    if isinstance(built, tuple) and len(built) == 2 and isinstance(built[0], nn.Module):
        return {"model": built[0], "sample": built[1]}
    known = list(inspect.signature(examine).parameters)
    if isinstance(built, Mapping) and isinstance(built.get("model"), nn.Module) and set(built) <= {*known, *RENAMED}:
        for key in RENAMED.keys() & built.keys():
            warn_renamed(f"key {key!r} of what {name}() returns", repr(RENAMED[key]))
        return {RENAMED.get(str(key), str(key)): value for key, value in built.items()}
    raise ValueError(f"{name}() must return a module, (module, sample), or a dict with {', '.join(known)}")


def _imported(file: Path) -> ModuleType:
    name = f"_fastcaps_doctor_{file.stem}"  # a file called random.py must not become everybody's random
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(file.parent.resolve()))
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise ValueError(f"{file} cannot be imported: {type(error).__name__}: {error}") from error
    return module


def random_sample(model: nn.Module, image_shape: Sequence[int] | None) -> Tensor:
    """Random images in [0, 1] for a model: of the given shape, or else of the first of 28x28 and 32x32 that it takes.

    Raises:
        ValueError: no shape was given, and it takes none of these.
    """
    first = next(iter(model.parameters()), torch.empty(0))
    sizes = {n for p in model.parameters() if not is_lazy(p) for n in p.shape}
    B = next((n for n in BATCH if n not in sizes), BATCH[0])

    def images(shape: Sequence[int]) -> Tensor:
        return torch.rand(B, *shape, generator=torch.Generator().manual_seed(0)).to(first.device, first.dtype)

    if image_shape:
        return images(image_shape)
    furthest, reason = -1, ""
    for shape in USUAL:
        watch = Watch(full_copy(model).eval())
        try:
            with torch.no_grad(), random_state_kept():
                watch.run((images(shape),), {})
            return images(shape)
        except Exception as error:
            if len(watch.calls) > furthest:
                furthest, reason = len(watch.calls), f"{shape} comes furthest: {explain_failure(error, watch.model)}"
    raise ValueError(f"the model takes none of these images; give --image-shape C H W. Of {USUAL} {reason}")


def examine_checkpoint(path: Path, image_shape: Sequence[int] | None) -> tuple[str, Iterator[Finding]]:
    """Whose network a checkpoint is, and what is known and found to be wrong with it, one finding after another.

    Args:
        path: a file of :meth:`fastcaps.CapsNet.save`, or a state dict of one of the networks that ``fastcaps convert``
            knows.
        image_shape: ``(C, H, W)``, where the checkpoint does not tell.

    Raises:
        ValueError: it is neither.
    """
    if path.suffix == ".py":
        raise ValueError(f"which function of {path} builds the model? {path}:FUNCTION")
    ours = ""
    if path.suffix == ".safetensors":
        try:
            describe(path)
        except ValueError as error:  # somebody else's safetensors file, or a damaged one of ours
            ours = f"; for fastcaps, {error}"
        else:
            return "a fastcaps.CapsNet", _examine_our_file(path, image_shape)
    state = read_state_dict(path)
    for name, network in NETWORKS.items():
        try:
            findings = _examine_public(state, network, image_shape)
        except OtherNetwork:
            continue
        how = " with --fix" if network.not_kept else ""
        return f"the network of {name}, run as it is converted{how}", findings
    names = ", ".join(NETWORKS)
    raise ValueError(f"{str(path)!r} is of no network that is known ({names}){ours}\n{way_out(state)}")


def _examine_our_file(path: Path, image_shape: Sequence[int] | None) -> Iterator[Finding]:
    """The findings of a file of :meth:`fastcaps.CapsNet.save`."""
    network = CapsNet.load(path)
    if image_shape and tuple(image_shape) != tuple(network.image_shape):
        raise ValueError(f"{path} is of a network for images {network.image_shape}, not --image-shape")
    return iter_findings(network, random_sample(network, network.image_shape))


def _examine_public(
    state: Mapping[str, Tensor], network: PublicNetwork, image_shape: Sequence[int] | None
) -> Iterator[Finding]:
    """The findings of a public network's state dict, and what is known of that network."""
    with warnings.catch_warnings():  # what the conversion leaves out is not looked for here
        warnings.simplefilter("ignore", UserWarning)
        converted = convert_checkpoint(state, network.recipe, image_shape=image_shape, fix=network.not_kept is not None)
    known = list(_known(network, converted.capsules.num_iterations))
    findings = iter_findings(converted, random_sample(converted, converted.image_shape))
    # Where the conversion differs from the network, what was computed of it says nothing of the network.
    checks = {finding.check for finding in known}
    return itertools.chain(known, (finding for finding in findings if finding.check not in checks))


def _known(network: PublicNetwork, num_iterations: int) -> Iterator[Finding]:
    """What is known of a network and cannot be computed from its conversion."""
    recipe = find_recipe(network.recipe)
    if not recipe.eps and not recipe.norm_eps:
        s = torch.zeros(2)
        value = (s * s).sum() / (1 + (s * s).sum()) * s / (s * s).sum().sqrt()
        text = f"its squash divides by the norm alone (known of this network): at 0 that is {value[0].item()}"
        yield Finding(ZERO_CAPSULES, "", WRONG, text, "fastcaps.CapsNet computes 0 there")
    if recipe.offset:
        text = f"with iterations = 3 it couples {num_iterations} times (known of this network)"
        yield Finding(ITERATIONS, "", WRONG, text, "count the couplings")
    if network.not_kept:
        fix, how = "convert it with --fix, and train it on", "(known of this network, not computed)"
        yield Finding(INPUT_SQUASH, "", WRONG, f"{network.not_kept} {how}", fix)
        if recipe.logits == "batch":
            text = f"the routing logits are averaged over the batch {how}"
            yield Finding(BATCH_MATES, "", WRONG, text, fix)
