"""Module paths and arguments of version 0.1, which work until 0.3 with a DeprecationWarning."""

import functools
import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import inspect
import sys
import warnings
from collections.abc import Callable, Sequence
from types import ModuleType
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
            stacklevel=2,  # Python skips the frames of the import system
        )

        def __getattr__(name: str) -> Any:
            for place in places:
                found = importlib.import_module(place)
                if hasattr(found, name):
                    return getattr(found, name)
            raise AttributeError(f"module {old!r} has no attribute {name!r}")

        module.__getattr__ = __getattr__  # type: ignore[method-assign]


def install_moved_modules() -> None:
    """Let ``import`` find the old paths, after everything that is really there."""
    if not any(isinstance(finder, MovedModules) for finder in sys.meta_path):
        sys.meta_path.append(MovedModules())


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

    Several names in a tuple stand for one argument, a tuple of their values.
    """

    def decorate(function: F) -> F:
        kinds = [parameter.kind for parameter in inspect.signature(function).parameters.values()]
        positional = kinds.count(inspect.Parameter.POSITIONAL_OR_KEYWORD)

        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
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
