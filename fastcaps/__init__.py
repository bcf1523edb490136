"""fastcaps: fused, exact routing for capsule networks."""

from fastcaps import losses
from fastcaps._version import __version__
from fastcaps.functional import length, squash
from fastcaps.layers import CapsuleLayer, PrimaryCapsules
from fastcaps.models import CapsNet, CapsNetOutput, Decoder
from fastcaps.ready import selftest, warmup
from fastcaps.routing import RoutingTrace, dynamic_routing, route_votes, routing_trace

__all__ = [
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
