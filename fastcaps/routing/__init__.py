"""Routing algorithms: each is a function ``(poses, weight, ...) -> poses``."""

from typing import Any

from fastcaps._deprecated import moved_module
from fastcaps.routing.backend import BackendUnavailable
from fastcaps.routing.dynamic import RoutingTrace, dynamic_routing, route_votes, routing_trace

__all__ = ["BackendUnavailable", "RoutingTrace", "dynamic_routing", "route_votes", "routing_trace"]


def __getattr__(name: str) -> Any:
    return moved_module("fastcaps.routing", name)
