"""Routing algorithms: each is a function ``(poses, weight, ...) -> poses``."""

from fastcaps.routing.dynamic import RoutingTrace, dynamic_routing, route_votes, routing_trace

__all__ = ["RoutingTrace", "dynamic_routing", "route_votes", "routing_trace"]
