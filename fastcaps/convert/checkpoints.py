"""Conversion of checkpoints of public capsule networks; nothing in them is ever executed."""

import math
import os
import pickle
import re
import warnings
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastcaps._reading import check_zip, one_line
from fastcaps.convert.recipes import Recipe, find_recipe
from fastcaps.models import CapsNet

LARGEST_STRIDE = 8  # pixels
PARAMETERS = ("weight", "bias")  # of a convolution or a linear layer
COUNTERS = ("total_ops", "total_params")  # what the profiler thop leaves in every module
SHOWN = 3  # names in a message


@dataclass(frozen=True)
class PublicNetwork:
    """Where a public network keeps what: prefixes of state-dict keys.

    Attributes:
        recipe: the name of its capsule layer's recipe.
        stem: the first convolution.
        primary: the second one; with ``{}`` in it several, which stand one after the other.
        layout: of its channels, as in :class:`fastcaps.PrimaryCapsules`.
        capsules: the capsule layer.
        decoder: the three linear layers of the decoder.
        eps: of the primary capsules' squash.
        not_kept: what a CapsNet cannot reproduce, in words.
        chooses: how it takes the class that it predicts and draws, in words; None: the longest capsule, as a CapsNet.
    """

    recipe: str
    stem: str
    primary: str
    layout: str
    capsules: str
    decoder: tuple[str, str, str] = ("decoder.0", "decoder.2", "decoder.4")
    eps: float = 0.0
    not_kept: str | None = None
    chooses: str | None = None


NETWORKS = {
    network.recipe: network
    for network in (
        PublicNetwork("capsule", "conv1", "primary", "capsule-major", "digits", eps=1e-8),
        PublicNetwork("xifengguo", "conv1", "primarycaps.conv2d", "flat", "digitcaps"),
        PublicNetwork("gram-ai", "conv1", "primary_capsules.capsules.{}", "dimension-major", "digit_capsules"),
        PublicNetwork(
            "adambielski", "conv1", "primaryCaps.conv", "capsule-major", "digitCaps",
            decoder=("reconstruction_net.fc1", "reconstruction_net.fc2", "reconstruction_net.fc3"),
        ),
        PublicNetwork(
            "higgsfield", "conv_layer.conv", "primary_capsules.capsules.{}", "flat", "digit_capsules",
            decoder=tuple(f"decoder.reconstraction_layers.{n}" for n in (0, 2, 4)),  # type: ignore[arg-type]
            chooses="by a softmax of the lengths over the batch, so that it depends on the other images",
        ),
        PublicNetwork(
            "cedrickchee", "conv1.conv0", "primary.conv_units.{}", "dimension-major", "digits",
            decoder=("decoder.fc1", "decoder.fc2", "decoder.fc3"),
            not_kept="its primary capsules are squashed over the capsules instead of over each pose",
        ),
        PublicNetwork("danielhavir", "conv1", "primary.conv", "flat", "digits"),
    )
}  # fmt: skip


def read_state_dict(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """The tensors of a checkpoint: a safetensors file, or a torch file read with ``weights_only=True``.

    Args:
        path: the file. A state dict may lie in it under ``state_dict``, ``model_state_dict``, ``model`` or ``net``.

    Returns:
        The state dict, on the CPU, without the prefixes that data-parallel and compiled wrappers add.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it holds something other than a state dict, or could only be read by executing what it says.
    """
    name = os.fspath(path)
    if not Path(path).is_file():
        raise FileNotFoundError(f"there is no file {name!r}")
    try:
        if name.endswith(".safetensors"):
            from safetensors.torch import load_file

            state: Any = load_file(name)
        else:
            if zipfile.is_zipfile(name):  # what torch wrote before version 1.6 is none, and has no checksum
                check_zip(name)
            state = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        found = re.search(r"(?:Unsupported|unsupported GLOBAL) [^\n]*", str(error))  # torch adds advice against safety
        raise ValueError(
            f"{name!r} holds more than tensors, and reading it could execute what it says: refused"
            f"{f' ({found[0]})' if found else ''}. If you trust it, load it where it was written and save "
            "model.state_dict()"
        ) from error
    except Exception as error:  # truncated, or no checkpoint at all: many libraries have their own errors
        raise ValueError(
            f"{name!r} cannot be read as a checkpoint: {type(error).__name__}: {one_line(error)}"
        ) from error
    for key in ("state_dict", "model_state_dict", "model", "net"):
        if isinstance(state, Mapping) and isinstance(state.get(key), Mapping):
            state = state[key]
    if not isinstance(state, Mapping) or not state or not all(isinstance(v, Tensor) for v in state.values()):
        raise ValueError(f"{name!r} holds no state dict (names with tensors) but {type(state).__name__}")
    cleaned = {re.sub(r"^(module\.|_orig_mod\.)+", "", str(key)): value for key, value in state.items()}
    if len(cleaned) < len(state):
        raise ValueError(f"{name!r} holds the same names with and without the prefixes module. and _orig_mod.")
    return cleaned


def convert_checkpoint(
    state: Mapping[str, Tensor],
    recipe: str,
    *,
    num_iterations: int = 3,
    image_shape: Sequence[int] | None = None,
    fix: bool = False,
) -> CapsNet:
    """A :class:`fastcaps.CapsNet` that computes what a public network does, from its state dict.

    Counters that a profiler left, and a prefix that all names share, are left out with a warning.

    Args:
        state: the state dict, as :func:`read_state_dict` gives it.
        recipe: whose network it is, a key of ``NETWORKS``.
        num_iterations: as the network's own constructor counts them: it does not stand in a checkpoint.
        image_shape: ``(C, H, W)``; None: square images, of the size that the decoder draws.
        fix: whether wrong routing becomes the paper's, and what cannot be kept is changed. The accuracy must then be
            measured again.

    Returns:
        The network. What it does otherwise than the paper, it does too (see ``repr`` of its ``capsules``), but for
        ``norm_eps`` (xifengguo, danielhavir), which is left out with a warning: unlike
        :func:`fastcaps.convert.replace_capsules`, nothing here can tell whether it matters. A warning also says where
        the network chooses its class otherwise than by the longest capsule (higgsfield).

    Raises:
        ValueError: the recipe is unknown, keys are missing or left over (:class:`OtherNetwork`), sizes do not fit, or
            what the network does cannot be reproduced and ``fix`` is False.
    """
    if recipe not in NETWORKS:
        raise ValueError(f"recipe must be one of {', '.join(map(repr, NETWORKS))}, got {recipe!r}")
    network, layer = NETWORKS[recipe], find_recipe(recipe)
    if network.not_kept and not fix:
        raise ValueError(f"a CapsNet cannot reproduce {recipe!r}: {network.not_kept}; fix=True (--fix) changes that")
    state, left_out = _tidied(state)
    # adambielski's network may stand alone, or in one that reconstructs as well
    parts = _parts({key.removeprefix("capsnet."): value for key, value in state.items()}, network, layer)
    # Where J and D_out share an axis, the prior tells J.
    sizes = {} if layer.out_capsules is None else {"J": parts["capsules.prior"].shape[-1]}
    weight = layer.parsed_axes()["weight"].canonical(parts["capsules.weight"], sizes)
    parts["capsules.weight"] = weight
    options: dict[str, Any] = {"detach": layer.detach} if layer.detach else {}
    options |= {"eps": layer.eps} if layer.eps else {}
    if layer.convention.effects and not fix:
        options["routing"] = layer.convention
    converted = CapsNet(
        **_sizes(parts, network, weight.shape, image_shape),
        num_iterations=num_iterations + layer.offset,
        learn_prior=layer.prior is not None,
        primary_layout=network.layout,
        primary_eps=network.eps,
        bias=False,
        decoder="decoder.layers.0.weight" in parts,
        **options,
    ).to(weight.dtype)
    wrong = [
        f"{name} is {list(parts[name].shape)}, not {list(ours.shape)}"
        for name, ours in converted.state_dict().items()
        if parts[name].shape != ours.shape
    ]
    if wrong:
        raise ValueError(f"the checkpoint is not of the network that {recipe!r} stands for: {'; '.join(wrong)}")
    converted.load_state_dict(parts)
    for note in (*left_out, *_what_changes(network, layer)):
        warnings.warn(note, stacklevel=2)
    return converted


def _what_changes(network: PublicNetwork, layer: Recipe) -> Iterator[str]:
    """What a conversion does not keep although it can be made."""
    if layer.norm_eps:
        text = f"the {layer.norm_eps:g} that squash of {layer.name!r} adds to the norm is left out: it matters only to"
        yield f"{text} capsules that are about as short, and the accuracy tells"
    if network.chooses:
        text = f"the network of {layer.name!r} chooses the class that it predicts and draws {network.chooses}"
        yield f"{text}; here the longest capsule is the class, which can be another one"


def _tidied(state: Mapping[str, Tensor]) -> tuple[Mapping[str, Tensor], list[str]]:
    """The state dict without a profiler's counters and without a prefix of all names, and what was left out."""
    notes = []
    counters = [key for key in state if key.rpartition(".")[2] in COUNTERS]
    if counters:
        notes.append(f"{len(counters)} counters of a profiler ({', '.join(COUNTERS)}) are left out")
        state = {key: value for key, value in state.items() if key not in counters}
    prefix = ""
    while len({key.partition(".")[0] for key in state}) == 1 and all("." in key for key in state):
        prefix += next(iter(state)).partition(".")[0] + "."
        state = {key.partition(".")[2]: value for key, value in state.items()}
    if prefix:
        notes.append(f"the prefix {prefix} that all names share is left out")
    return state, notes


def way_out(state: Mapping[str, Tensor]) -> str:
    """What to do with the checkpoint of an unknown network, in two lines; the first says where its capsules may be."""
    found = _capsule_weights(state, square=False) or _capsule_weights(state, square=True)
    named = shortened([f"{key} {list(state[key].shape)}" for key in sorted(found, key=lambda key: -state[key].numel())])
    return (
        f"what may be the weight of a capsule layer: {named}\n"
        "write a FILE.py with a function that builds the model and loads the file into it; then `fastcaps doctor "
        "FILE.py:FUNCTION` examines it, and fastcaps.convert.replace_capsules(model, sample) converts its layers"
    )


def _capsule_weights(state: Mapping[str, Tensor], square: bool) -> list[str]:
    """The tensors with an axis for each of I, J, D_out and D_in, or two on one; ``square``: kernels of convolutions."""
    return [
        key
        for key, value in state.items()
        if value.is_floating_point()
        and len([size for size in value.shape if size != 1]) in (3, 4)
        and (square or value.shape[-1] != value.shape[-2])
        and f"{key.removesuffix('weight')}bias" not in state
    ]


def shortened(names: Sequence[str]) -> str:
    """The first of these names, and how many there are besides."""
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return f"{', '.join(names[:SHOWN]) or 'none'}{more}"


def what_fix_changes(recipe: str) -> list[str]:
    """What a network does that is not the paper's, in words."""
    layer = find_recipe(recipe)
    not_kept = NETWORKS[recipe].not_kept
    return [*layer.convention.effects, *([not_kept] if not_kept else [])]


class OtherNetwork(ValueError):
    """A checkpoint has other names than the network that it was said to be of."""


def _parts(state: Mapping[str, Tensor], network: PublicNetwork, layer: Recipe) -> dict[str, Tensor]:
    """The checkpoint's tensors by the names of a CapsNet."""
    keys = _keys(state, network, layer)
    wanted = [key for group in keys.values() for key in group]
    missing, unexpected = [key for key in wanted if key not in state], [key for key in state if key not in wanted]
    if missing or unexpected:
        raise OtherNetwork(
            f"the checkpoint is not of the network that {network.recipe!r} stands for; "
            f"missing: {shortened(missing)}; unexpected: {shortened(unexpected)}\n{way_out(state)}"
        )
    for name, group in keys.items():
        for key in group:
            _check_tensor(key, state[key], _rank(name, layer))
    return {name: torch.cat([state[key] for key in group]) for name, group in keys.items()}


def _check_tensor(key: str, tensor: Tensor, rank: int) -> None:
    """Refuse what no capsule network holds: sizes are divided by each other, and a network has one dtype."""
    if not tensor.is_floating_point() or tensor.layout != torch.strided:
        raise ValueError(f"{key} must be a dense floating-point tensor, got {tensor.dtype}, {tensor.layout}")
    if tensor.dim() != rank:
        raise ValueError(f"{key} must have {rank} axes, got {list(tensor.shape)}")
    if not tensor.numel():
        raise ValueError(f"{key} must have no axis of size 0, got {list(tensor.shape)}")


def _keys(state: Mapping[str, Tensor], network: PublicNetwork, layer: Recipe) -> dict[str, list[str]]:
    """The checkpoint's keys of each tensor of a CapsNet; several stand one after the other on the first axis."""
    pattern = re.escape(network.primary).replace(re.escape("{}"), r"(\d+)")
    convolutions = sum(re.fullmatch(pattern + r"\.weight", key) is not None for key in state)
    modules = {
        "stem": [network.stem],
        "primary.conv": [network.primary.format(n) for n in range(max(1, convolutions))],
    }
    if any(key.startswith(tuple(f"{name}." for name in network.decoder)) for key in state):
        modules |= {f"decoder.layers.{2 * n}": [name] for n, name in enumerate(network.decoder)}
    keys = {f"{ours}.{kind}": [f"{n}.{kind}" for n in names] for ours, names in modules.items() for kind in PARAMETERS}
    keys["capsules.weight"] = [f"{network.capsules}.{layer.weight}"]
    if layer.prior is not None:
        keys["capsules.prior"] = [f"{network.capsules}.{layer.prior}"]
    return keys


def _rank(name: str, layer: Recipe) -> int:
    """How many axes a tensor of the checkpoint has, by its name in a CapsNet."""
    module, _, kind = name.rpartition(".")
    if module == "capsules":
        return len(layer.parsed_axes()[kind].axes.groups)
    if kind == "bias":
        return 1
    return 4 if module in ("stem", "primary.conv") else 2


def _sizes(
    parts: Mapping[str, Tensor], network: PublicNetwork, weight: Sequence[int], image_shape: Sequence[int] | None
) -> dict[str, Any]:
    """The sizes of the CapsNet; the stride follows from the number of capsules."""
    (S, C, kernel_size, _), channels = parts["stem.weight"].shape, parts["primary.conv.weight"].shape[0]
    I, J, D_out, D_in = weight
    if image_shape is None:
        if "decoder.layers.4.weight" not in parts:
            raise ValueError("without a decoder the checkpoint does not tell the size of the images: give image_shape")
        pixels = parts["decoder.layers.4.weight"].shape[0] // C
        image_shape = (C, math.isqrt(pixels), math.isqrt(pixels))
    types, left = channels // D_in, [size - (2 * kernel_size - 1) for size in image_shape[1:]]
    strides = [n for n in range(1, LARGEST_STRIDE + 1) if types * math.prod(size // n + 1 for size in left) == I]
    if not strides or min(left) < 0:
        raise ValueError(
            f"no stride makes {I} capsules of images {tuple(image_shape)}, kernels of {kernel_size} and {types} types"
        )
    return {
        "image_shape": tuple(image_shape),
        "num_classes": J,
        "stem_channels": S,
        "kernel_size": kernel_size,
        "types": types,
        "primary_dim": D_in,
        "primary_stride": 2 if 2 in strides else strides[0],  # 2 in all of these networks; small ones leave a choice
        "capsule_dim": D_out,
    }
