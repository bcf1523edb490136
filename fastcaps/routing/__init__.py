"""Routing algorithms: each is a function ``(poses, weight, ...) -> poses``."""

from fastcaps.routing.backend import BackendUnavailable
from fastcaps.routing.dynamic import RoutingTrace, dynamic_routing, route_votes, routing_trace

__all__ = ["BackendUnavailable", "RoutingTrace", "dynamic_routing", "route_votes", "routing_trace"]
