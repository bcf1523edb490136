"""Module paths and arguments of version 0.1, which work until 0.3 with a DeprecationWarning."""

import dataclasses
import functools
import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import inspect
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from types import FrameType, ModuleType
from typing import Any, TypeVar

F = TypeVar("F", bound=Callable[..., Any])

MOVED = {  # the old path: where its names are now
    "fastcaps.batches": ("fastcaps.train.batches", "fastcaps.data.augment"),
    "fastcaps.callbacks": ("fastcaps.train.callbacks",),
    "fastcaps.checkpoints": ("fastcaps.convert.checkpoints",),
    "fastcaps.contents": ("fastcaps.convert.contents",),
    "fastcaps.conventions": ("fastcaps.routing.conventions",),
    "fastcaps.doctor.losses": ("fastcaps.doctor.loss_checks",),
    "fastcaps.evaluation": ("fastcaps.train.evaluation", "fastcaps.models.capsnet", "fastcaps.train._renamed"),
    "fastcaps.figures": ("fastcaps.train.figures",),
    "fastcaps.files": ("fastcaps._atomic",),
    "fastcaps.layouts": ("fastcaps._axes",),
    "fastcaps.network": ("fastcaps.models.network",),
    "fastcaps.ready": ("fastcaps.exactness", "fastcaps.preload"),
    "fastcaps.recipes": ("fastcaps.convert.recipes", "fastcaps.convert.converted", "fastcaps.convert.diagnosis"),
    "fastcaps.report": ("fastcaps.train.report", "fastcaps.train.show"),
    "fastcaps.routing.dynamic_ops": ("fastcaps.routing.dynamic.ops",),
    "fastcaps.routing.dynamic_reference": ("fastcaps.routing.dynamic.reference",),
    "fastcaps.routing.dynamic_triton": (
        "fastcaps.routing.dynamic.triton.launch",
        "fastcaps.routing.dynamic.triton.parameters",
    ),
    "fastcaps.routing.dynamic_triton_kernels": (
        "fastcaps.routing.dynamic.triton.sweeps",
        "fastcaps.routing.dynamic.triton.gradients",
    ),
    "fastcaps.routing.dynamic_triton_tuning": ("fastcaps.routing.dynamic.triton.tuning",),
    "fastcaps.routing.dynamic_triton_vectors": ("fastcaps.routing.dynamic.triton.vectors",),
    "fastcaps.routing.trace": ("fastcaps.routing.dynamic.trace",),
    "fastcaps.samples": ("fastcaps.train.samples", "fastcaps.train._renamed"),
    "fastcaps.settings": ("fastcaps.train.settings",),
    "fastcaps.sources": ("fastcaps.data.sources",),
    "fastcaps.timing": ("fastcaps.benchmarking", "fastcaps.measure"),
    "fastcaps.training": ("fastcaps.train.run", "fastcaps.train.module"),
    "fastcaps.verification": ("fastcaps.convert.comparison", "fastcaps.convert.modules", "fastcaps.convert.cases"),
}


class MovedModules(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds a module under its old path: an empty one, whose names are looked up where they are now."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        """A spec for a path of :data:`MOVED`; None for all others."""
        return importlib.machinery.ModuleSpec(fullname, self) if fullname in MOVED else None

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        """Python's own empty module."""
        return None

    def exec_module(self, module: ModuleType) -> None:
        """Warn, and let ``module.name`` look the name up."""
        old, places = module.__name__, MOVED[module.__name__]
        warnings.warn(
            f"{old} is now {' and '.join(places)}; the old path works until fastcaps 0.3",
            DeprecationWarning,
            stacklevel=_frames_to_the_user(),
        )

        def __getattr__(name: str) -> Any:
            modules = [importlib.import_module(place) for place in places]
            if name == "__all__":
                return sorted({public for found in modules for public in vars(found) if not public.startswith("_")})
            for found in modules:
                if hasattr(found, name):
                    return getattr(found, name)
            raise AttributeError(f"module {old!r} has no attribute {name!r}")

        module.__getattr__ = __getattr__  # type: ignore[method-assign]


def _frames_to_the_user() -> int:
    """The ``stacklevel``, for who calls this, of the import statement or attribute that asked for an old path."""
    level, frame = 1, sys._getframe(1)
    while frame.f_back is not None and _is_plumbing(frame):
        frame = frame.f_back
        level += not _is_bootstrap(frame)  # which Python skips as it counts
    return level


def _is_bootstrap(frame: FrameType) -> bool:
    return "importlib" in frame.f_code.co_filename and "_bootstrap" in frame.f_code.co_filename


def _is_plumbing(frame: FrameType) -> bool:
    of_package = frame.f_code.co_name == "__getattr__" and str(frame.f_globals.get("__name__")).startswith("fastcaps")
    return _is_bootstrap(frame) or of_package or frame.f_code.co_filename in (__file__, importlib.__file__)


def install_moved_modules() -> None:
    """Let ``import`` find the old paths, before files that an older version may have left."""
    if not any(isinstance(finder, MovedModules) for finder in sys.meta_path):
        sys.meta_path.insert(0, MovedModules())


def moved_module(package: str, name: str) -> ModuleType:
    """The module that ``package.name`` was: version 0.1 imported most of them.

    Raises:
        AttributeError: there was none of this name.
    """
    if f"{package}.{name}" not in MOVED:
        raise AttributeError(f"module {package!r} has no attribute {name!r}")
    return importlib.import_module(f"{package}.{name}")


class FormerTuple:
    """A dataclass that was a named tuple in version 0.1: it can still be unpacked, with a warning."""

    def _values(self) -> tuple[Any, ...]:
        warn_renamed(f"{type(self).__name__} as a tuple", "a dataclass with the same attributes", stacklevel=3)
        return tuple(getattr(self, field.name) for field in dataclasses.fields(self))  # type: ignore[arg-type]

    def __iter__(self) -> Iterator[Any]:
        return iter(self._values())

    def __getitem__(self, place: Any) -> Any:
        return self._values()[place]

    def __len__(self) -> int:
        return len(self._values())

    def _replace(self, **changes: Any) -> Any:
        warn_renamed("_replace", "dataclasses.replace")
        return dataclasses.replace(self, **changes)  # type: ignore[type-var]

    def _asdict(self) -> dict[str, Any]:
        warn_renamed("_asdict", "dataclasses.asdict")
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}  # type: ignore[arg-type]


def renamed_arguments(**names: str) -> Callable[[F], F]:
    """Let a function take keyword arguments under their old names, too: ``@renamed_arguments(old="new")``.

    Where both are given the old one counts: ``dataclasses.replace`` adds all new ones.
    """

    def decorate(function: F) -> F:
        what = function.__qualname__.removesuffix(".__init__")

        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            for old in names.keys() & kwargs.keys():
                warn_renamed(f"{what}: {old}=", f"{names[old]}=")
                kwargs[names[old]] = kwargs.pop(old)
            return function(*args, **kwargs)

        return call  # type: ignore[return-value]

    return decorate


def once_positional(*names: str | tuple[str, ...]) -> Callable[[F], F]:
    """Let a function take keyword-only arguments by position, too, in the order of ``names``.

    Several names in a tuple stand for one argument, a tuple of their values, that was called ``sizes``.
    """

    def decorate(function: F) -> F:
        kinds = [parameter.kind for parameter in inspect.signature(function).parameters.values()]
        positional = kinds.count(inspect.Parameter.POSITIONAL_OR_KEYWORD)

        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            if "sizes" in kwargs:
                args = (*args[:positional], kwargs.pop("sizes"), *args[positional:])
            for name, value in zip(names, args[positional:], strict=False):
                named = {name: value} if isinstance(name, str) else dict(zip(name, value, strict=True))
                new = ", ".join(f"{name}=" for name in named)
                if both := named.keys() & kwargs.keys():
                    raise TypeError(f"{function.__qualname__} got multiple values for {', '.join(both)}")
                warn_renamed(f"{function.__qualname__}: an argument by position", new)
                kwargs |= named
            return function(*args[:positional], *args[positional + len(names) :], **kwargs)

        return call  # type: ignore[return-value]

    return decorate


def warn_renamed(old: str, new: str, stacklevel: int = 2) -> None:
    """Warn that ``old`` is now ``new``; ``stacklevel`` 2 is the caller of this function's caller."""
    warnings.warn(
        f"{old} is now {new}; the old name works until fastcaps 0.3", DeprecationWarning, stacklevel=stacklevel + 1
    )
