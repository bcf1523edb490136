"""Settings of a training run and the file that keeps them."""

import dataclasses
import difflib
import os
import reprlib
import typing
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from fastcaps._deprecated import renamed_arguments
from fastcaps._reading import read_json
from fastcaps.models.convolutions import default_kernel_size
from fastcaps.routing.backend import BACKENDS

DATA = ("digits", "digits-100", "digits-1000", "mnist", "fashion-mnist", "cifar10", "multi-mnist", "image-folder")
MODELS = ("capsnet", "cnn")
LOSSES = ("margin", "spread", "cross-entropy", "focal")
SAMPLINGS = ("uniform", "balanced")
SCHEDULES = ("exponential", "cosine", "constant")
PRECISIONS = ("32", "64", "bf16-mixed")
ACCELERATORS = ("auto", "cpu", "gpu")

# What may change when a run is resumed; everything else decides what is computed.
FREE = {"root", "download", "epochs", "checkpoint_seconds", "accelerator", "devices", "nodes", "compile", "backend"}
# Names of version 0.1; its files are read for good, its option and its argument until 0.3.
RENAMED = {"iterations": "num_iterations"}
# What the images decide where it is not set.
BY_IMAGES = {"kernel_size", "primary_stride", "shift", "flip"}


def _setting(default: Any, text: str, choices: tuple[str, ...] | None = None) -> Any:
    return dataclasses.field(default=default, metadata={"help": text, "choices": choices})


@dataclasses.dataclass
class Settings:
    """Settings of one training run; each is an option of ``fastcaps train``.

    None leaves a setting to the data or the model; :meth:`resolved` fills it in.

    Raises:
        ValueError: a setting has the wrong type or range, or does not go with another.

    Example:
        >>> Settings(data="mnist", epochs=5).resolved((1, 28, 28)).kernel_size
        9
    """

    data: str = _setting("digits", "data set", DATA)
    root: str = _setting("data", "folder with the files of the data set")
    download: bool = _setting(False, "fetch missing or broken files into --root")
    image_size: str = _setting(
        "", "pixels that the images of a folder are scaled to: HEIGHTxWIDTH, or one number for both; unset: as they are"
    )
    sampling: str = _setting("uniform", "every image equally often, or every class", SAMPLINGS)
    model: str = _setting("capsnet", "capsule network, or the paper's convolutional baseline", MODELS)
    stem: int = _setting(256, "channels of the first convolution")
    kernel_size: int | None = _setting(
        None,
        "kernel size of both convolutions in pixels; unset: 9, or 3 where 9 does not fit; 1 along a height of 1",
    )
    stem_stride: int = _setting(1, "stride of the first convolution in pixels")
    primary_stride: int | None = _setting(
        None, "stride of the second convolution in pixels; unset: 2, or 1 for images below 17 pixels"
    )
    types: int = _setting(32, "primary capsule types")
    primary_dim: int = _setting(8, "pose size of the primary capsules")
    hidden_capsules: str = _setting("", "capsule layers in between, as COUNTxPOSE-SIZE: 64x8,32x16")
    capsule_dim: int = _setting(16, "pose size of the class capsules")
    num_iterations: int = _setting(3, "routing iterations")
    bias: bool | None = _setting(None, "learned bias of the capsule layers; unset: yes for a capsule network")
    loss: str | None = _setting(
        None, "classification loss; unset: margin for a capsule network, cross-entropy for the baseline", LOSSES
    )
    class_weights: str = _setting(
        "none", "weights of the classes in the loss of training: none, balanced, or a number for each, as 1,1,2.5"
    )
    reconstruction: float | None = _setting(
        None,
        "weight of the decoder's summed squared error, 0 for no decoder; unset: 0.0005 for a capsule network",
    )
    shift: int | None = _setting(
        None, "augmentation: largest shift in pixels; unset: 2 for 28x28, 0 for small images and pairs"
    )
    flip: bool | None = _setting(None, "augmentation: mirror half of the images; unset: yes for colour images")
    epochs: int | None = _setting(None, "passes over the training data; unset: 10, or 30 for the digits")
    batch_size: int = _setting(128, "samples of one step, over all processes")
    accumulate: int = _setting(1, "gradient accumulation: parts of a process's share of a batch")
    lr: float = _setting(0.001, "learning rate of Adam at the start")
    schedule: str = _setting("exponential", "learning rate: times 0.9 an epoch, down to 0, or constant", SCHEDULES)
    precision: str = _setting("32", "bits of the arithmetic", PRECISIONS)
    compile: bool = _setting(False, "compile the step by torch.compile")
    backend: str | None = _setting(None, "backend of the routing; unset: the fastest that can run", BACKENDS)
    accelerator: str = _setting("auto", "device to run on", ACCELERATORS)
    devices: int | None = _setting(
        None, "processes on each machine, a device each; unset: the number of torchrun or SLURM, or 1"
    )
    nodes: int | None = _setting(None, "machines; unset: the number of torchrun or SLURM, or 1")
    seed: int = _setting(0, "seed of weights, order and augmentation")
    checkpoint_seconds: float = _setting(60.0, "time between checkpoints; one more follows each epoch")

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            self._check_kind(field)
        self._check_ranges()
        self.capsule_layers()
        self.image_height_width()
        self.class_weight_numbers()
        self._check_combinations()

    def _check_kind(self, field: "dataclasses.Field[Any]") -> None:
        value, kind = getattr(self, field.name), kind_of(field)
        if type(value) is int and kind is float and abs(value) < 2**53:
            setattr(self, field.name, value := float(value))
        if value is None and type(None) in typing.get_args(field.type):
            return
        if type(value) is not kind:
            raise ValueError(f"{option(field.name)} must be {_KINDS[kind]}, got {reprlib.repr(value)}")
        if field.metadata["choices"]:
            nearest(str(value), field.metadata["choices"], option(field.name))

    def _check_ranges(self) -> None:
        least = {"shift": 0, "seed": 0} | dict.fromkeys(_COUNTS, 1)
        for name, smallest in least.items():
            value = getattr(self, name)
            if value is not None and not smallest <= value < 2**31:
                raise ValueError(f"{option(name)} must be from {smallest} to {2**31 - 1}, got {value}")
        if not 0 <= self.checkpoint_seconds < float("inf"):
            raise ValueError(f"--checkpoint-seconds must not be negative, got {self.checkpoint_seconds}")
        if not 0 < self.lr < float("inf"):
            raise ValueError(f"--lr must be positive, got {self.lr}")
        if self.reconstruction is not None and not 0 <= self.reconstruction < float("inf"):
            raise ValueError(f"--reconstruction must not be negative, got {self.reconstruction}")

    def _check_combinations(self) -> None:
        cnn = self.model == "cnn"
        for field in dataclasses.fields(self):
            if cnn and field.name in _CAPSNET and getattr(self, field.name) != field.default:
                raise ValueError(f"{option(field.name)} is for --model capsnet: the baseline is the paper's")
        if cnn and (self.loss not in (None, "cross-entropy") or self.reconstruction):
            raise ValueError("--model cnn is trained with --loss cross-entropy and without --reconstruction")
        if self.data == "multi-mnist" and (cnn or self.loss not in (None, "margin", "focal")):
            raise ValueError("--data multi-mnist, two digits each, wants --model capsnet and --loss margin or focal")
        if self.image_size and self.data != "image-folder":
            raise ValueError("--image-size is for --data image-folder: the images of other data sets have one size")
        if self.data == "multi-mnist" and (self.shift or self.flip):
            raise ValueError("--data multi-mnist has no --shift or --flip: pairs are shifted already")

    def capsule_layers(self) -> list[tuple[int, int]]:
        """``hidden_capsules`` in numbers: (capsules, pose size) of each layer.

        Raises:
            ValueError: it is malformed.
        """
        try:
            layers = [tuple(map(int, layer.split("x"))) for layer in self.hidden_capsules.split(",") if layer]
            sizes = [(count, size) for count, size in layers]
        except ValueError:
            sizes = [(0, 0)]
        if any(min(layer) < 1 for layer in sizes):
            wanted = "must be like 64x8,32x16: capsules x pose size"
            raise ValueError(f"--hidden-capsules {wanted}, got {self.hidden_capsules!r}")
        return sizes

    def image_height_width(self) -> tuple[int, int] | None:
        """``image_size`` in numbers: (height, width); None: unset.

        Raises:
            ValueError: it is malformed.
        """
        if not self.image_size:
            return None
        try:
            sizes = [int(size) for size in self.image_size.split("x")]
        except ValueError:
            sizes = []
        if len(sizes) not in (1, 2) or not 1 <= min(sizes) <= max(sizes) < 2**14:
            wanted = f"like 28 or 32x48, height x width, below {2**14}"
            raise ValueError(f"--image-size must be {wanted}, got {self.image_size!r}")
        return sizes[0], sizes[-1]

    def class_weight_numbers(self) -> list[float] | None:
        """``class_weights`` in numbers; None: ``"none"`` or ``"balanced"``.

        Raises:
            ValueError: it is malformed.
        """
        if self.class_weights in ("none", "balanced"):
            return None
        try:
            weights = [float(weight) for weight in self.class_weights.split(",")]
        except ValueError:
            weights = []
        if not weights or not all(0 <= weight < float("inf") for weight in weights) or not any(weights):
            wanted = "must be none, balanced, or a number for each class, as 1,1,2.5"
            raise ValueError(f"--class-weights {wanted}, got {self.class_weights!r}")
        return weights

    def resolved(self, image_shape: tuple[int, int, int]) -> "Settings":
        """The same with a value for everything that the model or the images decide.

        Args:
            image_shape: ``(C, H, W)``.
        """
        C, H, W = image_shape
        capsules, pairs = self.model == "capsnet", self.data == "multi-mnist"
        small = min((size for size in (H, W) if size > 4), default=1) < 17  # a signal's height of 1 says nothing
        kernel_size = min(default_kernel_size(size, self.stem_stride) for size in (H, W))
        defaults: dict[str, Any] = {
            "kernel_size": kernel_size if capsules and kernel_size > 1 else None,  # None: CapsNet's, axis by axis
            "primary_stride": (1 if small else 2) if capsules else None,
            "bias": True if capsules else None,
            "loss": "margin" if capsules else "cross-entropy",
            "reconstruction": 0.0005 if capsules else 0.0,
            "shift": 0 if small or pairs else round(min(H, W) / 14),
            "flip": C == 3,
            "epochs": 30 if self.data == "digits" else 10,
        }
        unset = {name: value for name, value in defaults.items() if getattr(self, name) is None}
        return dataclasses.replace(self, **unset)

    def loss_options(self) -> dict[str, Any]:
        """What :meth:`fastcaps.models.Network.training_loss` is told beside the batch."""
        return {"loss": self.loss, "reconstruction_weight": self.reconstruction or 0.0}


class _Each(Settings):
    """Settings of which each is right by itself: options may still change what they are together."""

    def _check_combinations(self) -> None:
        pass


Settings.__init__ = renamed_arguments(**RENAMED)(Settings.__init__)  # type: ignore[method-assign]

_KINDS = {bool: "true or false", int: "a whole number", float: "a number", str: "a text"}
_SIZES = (
    "stem",
    "kernel_size",
    "stem_stride",
    "primary_stride",
    "types",
    "primary_dim",
    "capsule_dim",
    "num_iterations",
)
_CAPSNET = (*_SIZES, "hidden_capsules", "bias", "backend")
_COUNTS = (*_SIZES, "epochs", "batch_size", "accumulate", "devices", "nodes")


def kind_of(field: "dataclasses.Field[Any]") -> type:
    """bool, int, float or str."""
    return next(kind for kind in _KINDS if kind in (field.type, *typing.get_args(field.type)))


def option(name: str) -> str:
    """The command-line option of a setting."""
    return "--" + name.replace("_", "-")


def hint(name: str, known: Iterable[str]) -> str:
    """What to add to a message that ``name`` is unknown: the most similar known name, if one is similar."""
    similar = difflib.get_close_matches(name, known, 1, 0.5)
    return f"; did you mean {similar[0]!r}?" if similar else ""


def nearest(name: str, known: Sequence[str], what: str) -> None:
    """Raise a ValueError with the most similar known name unless ``name`` is known."""
    if name not in known:
        raise ValueError(f"{what} {name!r} is unknown{hint(name, known)} (there are {', '.join(known)})")


def read_settings(path: str | os.PathLike[str], options: Mapping[str, Any]) -> dict[str, Any]:
    """The settings in a run's ``config.json``, or in a file of one's own that names some of them, and options over it.

    A run says every setting. Where the options name another model or data set, what these decide is left open again.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not JSON, or names what is no setting.
    """
    read = read_json(path)
    of_run = isinstance(read, dict) and "settings" in read
    settings = settings_of_run(read["settings"], str(path)) if of_run else known_settings(read, str(path))
    decided = {"model": {*_CAPSNET, "loss", "reconstruction"}, "data": BY_IMAGES | {"image_size"}}
    if "," in settings.get("class_weights", ""):  # of the classes of that data set
        decided["data"] |= {"class_weights"}
    for name in decided if of_run else ():
        if name in options and options[name] != settings.get(name):
            settings = {key: value for key, value in settings.items() if key not in decided[name]}
    return settings | dict(options)


def known_settings(given: Any, where: str) -> dict[str, Any]:
    """Settings from a file, under their names of today.

    Raises:
        ValueError: it is no mapping, names what is no setting, or a value is wrong by itself.
    """
    if not isinstance(given, dict):
        raise ValueError(f"{where} is not a JSON object of settings: {reprlib.repr(given)}")
    settings = {RENAMED.get(str(name), str(name)): value for name, value in given.items()}
    for name in settings:
        nearest(name, [field.name for field in dataclasses.fields(Settings)], f"{where}: setting")
    try:
        _Each(**settings)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
    return settings


def run_config(read: Any, where: str) -> dict[str, Any]:
    """What a run was told, from its ``config.json`` or a checkpoint: settings, and what its data were.

    Raises:
        ValueError: it is not of a run.
    """
    if not isinstance(read, dict) or not isinstance(read.get("data"), dict):
        raise ValueError(f"{where} is not of a run of fastcaps train")
    return {"settings": dataclasses.asdict(run_settings(read.get("settings"), where)), "data": read["data"]}


def run_settings(given: Any, where: str) -> Settings:
    """All settings of a run, from a file.

    Raises:
        ValueError: as :func:`known_settings`, or one does not go with another.
    """
    settings = settings_of_run(given, where)
    try:
        return Settings(**settings)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def settings_of_run(given: Any, where: str) -> dict[str, Any]:
    """The settings that a run's file says, and those added since with the value they had then.

    Raises:
        ValueError: as :func:`known_settings`.
    """
    settings = known_settings(given, where)
    if settings.get("model") == "capsnet":
        settings.setdefault("bias", False)
    return settings


def changes(before: Mapping[str, Any], now: Mapping[str, Any], free: Iterable[str] = ()) -> list[str]:
    """The differences between two mappings, a text each, but for the names in ``free``."""
    names = [name for name in {**before, **now} if name not in set(free)]
    return [
        f"{name} was {before.get(name)!r} and is now {now.get(name)!r}"
        for name in names
        if before.get(name) != now.get(name)
    ]
