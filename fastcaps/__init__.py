"""fastcaps: fused, exact routing for capsule networks."""

import importlib
from typing import TYPE_CHECKING, Any

from fastcaps import _deprecated
from fastcaps._version import __version__
from fastcaps.exactness import selftest
from fastcaps.functional import length, squash
from fastcaps.layers import CapsuleLayer, PrimaryCapsules
from fastcaps.models import CapsNet, CapsNetOutput, Decoder
from fastcaps.preload import warmup
from fastcaps.routing import BackendUnavailable, RoutingTrace, dynamic_routing, route_votes, routing_trace

if TYPE_CHECKING:
    from fastcaps import convert as convert
    from fastcaps import data as data
    from fastcaps import doctor as doctor
    from fastcaps import losses as losses
    from fastcaps import models as models
    from fastcaps import train as train

_deprecated.install_moved_modules()

_SUBPACKAGES = ("convert", "data", "doctor", "losses", "models", "train")  # imported by their first use

__all__ = [
    "BackendUnavailable",
    "CapsNet",
    "CapsNetOutput",
    "CapsuleLayer",
    "Decoder",
    "PrimaryCapsules",
    "RoutingTrace",
    "__version__",
    "dynamic_routing",
    "length",
    "losses",
    "route_votes",
    "routing_trace",
    "selftest",
    "squash",
    "warmup",
]


def __getattr__(name: str) -> Any:
    if name in _SUBPACKAGES:
        return importlib.import_module(f"fastcaps.{name}")
    return _deprecated.moved_module("fastcaps", name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_SUBPACKAGES})
