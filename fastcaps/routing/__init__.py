"""Routing algorithms: each is a function ``(poses, weight, ...) -> poses``."""

from fastcaps.routing.dynamic import dynamic_routing, route_votes
from fastcaps.routing.trace import RoutingTrace, routing_trace

__all__ = ["RoutingTrace", "dynamic_routing", "route_votes", "routing_trace"]
