"""The base class of the networks: files without pickle, and what training asks of a network."""

import dataclasses
import hashlib
import inspect
import json
import os
import reprlib
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from fastcaps._atomic import write_whole
from fastcaps._checks import axes_hint, check_like, check_positive
from fastcaps._reading import one_line, parsed_json
from fastcaps._version import __version__
from fastcaps.layers import CapsuleLayer
from fastcaps.routing import RoutingTrace, dynamic_routing
from fastcaps.routing.conventions import Convention

if TYPE_CHECKING:
    from typing_extensions import Self

METADATA = "fastcaps"  # under this key a file says what it holds
CHECKSUM = "sha256"  # and under this one, of what
OF_A_MACHINE = {"backend", "device", "dtype"}  # options that are decided where a file is read
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
LARGE = 50_000_000  # parameters, from which on a network warns: the paper's has 8 million


class Network(nn.Module):
    """An image classifier that can be trained by ``fastcaps train`` and kept in a file with its configuration.

    A subclass sets the attributes and defines ``forward``, :meth:`probabilities` and :meth:`training_loss`; one with
    routing defines :meth:`trace`.

    Attributes:
        config: the arguments that it was made with.
        image_shape: ``(C, H, W)``.
        num_classes: J.
        presence_threshold: the probability from which a class counts as present; None: one always is, as all
            probabilities add to 1.
        kind: the model in :data:`fastcaps.train.settings.MODELS` whose settings it is trained with.
        former_defaults: what arguments were in files that do not name them yet.
    """

    presence_threshold: float | None = None
    kind: str = "capsnet"
    former_defaults: ClassVar[dict[str, Any]] = {}
    config: dict[str, Any]
    image_shape: tuple[int, int, int]
    num_classes: int

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the parameters, which images must have."""
        return next(self.parameters()).dtype

    def summary(self) -> str:
        """Kind and sizes in a few words."""
        return type(self).__name__

    def num_parameters(self) -> int:
        """Number of parameters."""
        return sum(parameter.numel() for parameter in self.parameters())

    def probabilities(self, images: Tensor) -> Tensor:
        """How likely each class is, ``[B, J]`` in [0, 1], for images ``[B, C, H, W]``."""
        raise NotImplementedError

    def training_loss(
        self,
        images: Tensor,
        labels: Tensor,
        targets: Tensor,
        *,
        loss: str | None = None,
        reconstruction_weight: float = 0.0,
        class_weights: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The loss of a batch, and the scores by which its classes are chosen.

        Args:
            images: ``[B, C, H, W]``, dtype of the parameters.
            labels: ``[B, K]`` int64, the classes of the K things in each image.
            targets: ``[B, K, C, H, W]``, what a decoder should draw for each of them.
            loss: a name of :data:`fastcaps.train.settings.LOSSES`; None: the network's own.
            reconstruction_weight: of the summed squared error of the decoder.
            class_weights: ``[J]``, as in :func:`fastcaps.losses.margin_loss`; None: all 1.

        Returns:
            A scalar and ``[B, J]``, both in float32 at least.
        """
        raise NotImplementedError

    def trace(self, images: Tensor) -> RoutingTrace | None:
        """What the routing of the class capsules does with images ``[B, C, H, W]``; None: there is no routing."""
        return None

    def save(self, path: str | os.PathLike[str], *, run: dict[str, Any] | None = None) -> None:
        """Write parameters and configuration to a safetensors file: whole or not at all, and readable without pickle.

        Args:
            path: the file, ``.safetensors`` by custom; one that is there is replaced.
            run: what else the file should say of itself: anything that JSON knows.

        Raises:
            TypeError: the routing is a function of one's own, which a file cannot hold.
            OSError: it cannot be written.

        Example:
            >>> import tempfile
            >>> from fastcaps import CapsNet
            >>> with tempfile.TemporaryDirectory() as folder:
            ...     CapsNet((1, 8, 8), 10, kernel_size=3).save(f"{folder}/model.safetensors")
            ...     CapsNet.load(f"{folder}/model.safetensors").num_classes
            10
        """
        from safetensors.torch import save

        config = {name: value for name, value in self.config.items() if name not in OF_A_MACHINE}
        routing = config.get("routing")
        if isinstance(routing, Convention):
            config["routing"] = dataclasses.asdict(routing)
        elif routing is not None:
            raise TypeError(f"routing={routing!r} cannot be saved: only what fastcaps knows can")
        described = {"model": type(self).__name__, "version": __version__, "config": config}
        text = json.dumps(described | ({"run": run} if run else {}))
        state = {name: value.detach().cpu().contiguous() for name, value in self.state_dict().items()}
        write_whole(path, save(state, {METADATA: text, CHECKSUM: _checksum(text, state)}))

    @classmethod
    def load(cls, path: str | os.PathLike[str], device: torch.device | str = "cpu") -> "Self":
        """A network that :meth:`save` or ``fastcaps convert`` wrote.

        Args:
            path: the file.
            device: where its parameters go.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it is no safetensors file, is damaged, or not of such a network.

        Example:
            >>> import tempfile
            >>> from fastcaps import CapsNet
            >>> with tempfile.TemporaryDirectory() as folder:
            ...     CapsNet((1, 8, 8), 10, kernel_size=3, detach=True).save(f"{folder}/model.safetensors")
            ...     CapsNet.load(f"{folder}/model.safetensors").capsules.routing_options
            {'detach': True}
        """
        described, name = describe(path), os.fspath(path)
        if described["model"] not in (names := [kind.__name__ for kind in (cls, *cls.__subclasses__())]):
            wanted = " or ".join(name for name in names if name != "Network")
            raise ValueError(f"{name!r} holds a fastcaps model {described['model']!r}, not a {wanted}")
        (kind,) = (kind for kind in (cls, *cls.__subclasses__()) if kind.__name__ == described["model"])
        state = _read_state(name)
        config = {name: value for name, value in described["config"].items() if name not in OF_A_MACHINE}
        try:
            if "routing" in config:
                config["routing"] = Convention(**config["routing"])
            options = kind.former_defaults | config
            with torch.device("meta"), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                planned = kind(**options)  # no size in the configuration takes memory before the weights fit it
            _check_flags(config, kind)
            _check_shapes(state, planned.state_dict())
            network = kind(**options)
        except (TypeError, ValueError, OverflowError, RuntimeError) as error:  # of constructors, by what is wrong
            raise ValueError(f"{name!r}: weights and configuration do not fit: {one_line(error)}") from error
        network.load_state_dict(state, assign=True)
        return network.to(device, next(iter(state.values())).dtype)


def _read_state(name: str) -> dict[str, Tensor]:
    """The tensors of a file, which must be those that were written."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(name, "pt") as file:
            state = {key: file.get_tensor(key).clone() for key in file.keys()}  # noqa: SIM118 - no mapping
            metadata = file.metadata() or {}
    except (SafetensorError, RuntimeError, TypeError) as error:  # RuntimeError, TypeError: dtypes unknown to torch
        raise ValueError(f"{name!r} is not a whole safetensors file: {one_line(error)}") from error
    for key, value in state.items():
        if value.dtype not in DTYPES:
            raise ValueError(f"{name!r}: {key} is {value.dtype}, which no network of fastcaps has")
    # Version 0.1 wrote no checksum.
    if CHECKSUM in metadata and metadata[CHECKSUM] != _checksum(metadata.get(METADATA, ""), state):
        raise ValueError(f"{name!r} is damaged, or was changed by another program: its checksum is of other contents")
    return state


def _checksum(text: str, state: dict[str, Tensor]) -> str:
    """The SHA-256 of what a file says and holds."""
    digest = hashlib.sha256(text.encode())
    for name, value in sorted(state.items()):
        digest.update(f"{name} {value.dtype} {list(value.shape)}".encode())
        digest.update(value.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _check_flags(config: dict[str, Any], kind: type[Network]) -> None:
    """Raise unless what is true or false by default is so in a configuration; constructors take 0 and "no" as well."""
    for function in (kind, CapsuleLayer, dynamic_routing):
        for name, parameter in inspect.signature(function).parameters.items():
            if isinstance(parameter.default, bool) and not isinstance(config.get(name, False), bool):
                raise ValueError(f"{name} must be true or false, got {reprlib.repr(config[name])}")


def _check_shapes(state: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    """Raise unless the tensors of a file have the names and shapes of a network's."""
    if other := state.keys() ^ wanted.keys():
        raise ValueError(f"one of both lacks {', '.join(sorted(other))}")
    for name, value in state.items():
        if value.shape != wanted[name].shape:
            raise ValueError(f"{name} is {list(value.shape)}, not {list(wanted[name].shape)}")


def describe(path: str | os.PathLike[str]) -> dict[str, Any]:
    """What the file of a :class:`Network` says of itself: ``model``, ``version``, ``config``, and ``run`` if given.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no safetensors file, or not one of fastcaps.

    Example:
        >>> import tempfile
        >>> from fastcaps import CapsNet
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     CapsNet((1, 8, 8), 10, kernel_size=3).save(f"{folder}/model.safetensors", run={"seed": 0})
        ...     describe(f"{folder}/model.safetensors")["run"]
        {'seed': 0}
    """
    from safetensors import SafetensorError, safe_open

    if not Path(path).is_file():
        raise FileNotFoundError(f"there is no file {os.fspath(path)!r}")
    try:
        with safe_open(path, "pt") as file:
            text = (file.metadata() or {}).get(METADATA, "{}")
    except SafetensorError as error:
        raise ValueError(f"{os.fspath(path)!r} is not a whole safetensors file: {one_line(error)}") from error
    described = parsed_json(text, f"what {os.fspath(path)!r} says of itself")
    parts = {"model": str, "config": dict, "run": dict}
    known = isinstance(described, dict) and {"model", "config"} <= described.keys()
    if not known or not all(isinstance(described[part], kind) for part, kind in parts.items() if part in described):
        raise ValueError(f"{os.fspath(path)!r} does not say that it holds a network of fastcaps")
    return described


def at_least_float32(x: Tensor) -> Tensor:
    """The same in float32 where it is in half precision: a loss in bfloat16 would have two digits."""
    return x if x.dtype == torch.float64 else x.float()


def only_labels(labels: Tensor) -> Tensor:
    """Labels ``[B]`` of ``[B, 1]``.

    Raises:
        ValueError: there are several in an image.
    """
    if labels.shape[1] != 1:
        raise ValueError(f"this loss knows one class in an image, labels [B, 1], got {tuple(labels.shape)}: use margin")
    return labels[:, 0]


def check_images(images: Tensor, image_shape: tuple[int, int, int], parameter: Tensor) -> None:
    """Raise unless ``images`` is ``[B, *image_shape]`` of the dtype of ``parameter``."""
    check_like("images", images, "[B, C, H, W]", parameter)
    if images.dim() != 4 or images.shape[1:] != image_shape:
        wanted = ", ".join(map(str, image_shape))
        hint = axes_hint("images", images.shape, image_shape)
        raise ValueError(f"images must be [B, C, H, W] = [B, {wanted}], got {tuple(images.shape)}{hint}")


def check_image_shape(image_shape: Sequence[int]) -> tuple[int, int, int]:
    """``(C, H, W)``; raise unless it is three positive ints."""
    if not isinstance(image_shape, (tuple, list, torch.Size)) or len(image_shape) != 3:
        raise ValueError(f"image_shape must be (C, H, W), got {image_shape!r}")
    C, H, W = image_shape
    check_positive(**{"image_shape's C": C, "image_shape's H": H, "image_shape's W": W})
    return C, H, W


def warn_if_channels_last(image_shape: tuple[int, int, int]) -> None:
    """Ask whether ``(H, W, C)`` was given for ``(C, H, W)``: 1, 3 or 4 stand last, and first a number of rows."""
    C, H, W = image_shape
    if W in (1, 3, 4) and min(C, H) > 4:
        warnings.warn(
            f"image_shape {image_shape} means {C} channels of {H} x {W} pixels; "
            f"are the channels last? Then write {(W, C, H)}",
            stacklevel=3,
        )


def warn_if_large(parts: Mapping[str, Iterable[nn.Module]], less: Mapping[str, str]) -> None:
    """Warn of a network with many parameters, and say which part holds them.

    Args:
        parts: the modules of each part, perhaps on the meta device.
        less: what makes each part smaller.
    """
    counts = {
        part: sum(p.numel() for module in modules for p in module.parameters()) for part, modules in parts.items()
    }
    total, largest = sum(counts.values()), max(counts, key=counts.__getitem__)
    if total > LARGE:
        warnings.warn(
            f"this network has {total / 1e6:,.0f} million parameters, {counts[largest] / 1e6:,.0f} million of them in "
            f"the {largest}; to make it smaller: {less[largest]}",
            stacklevel=3,
        )
