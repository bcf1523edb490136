"""fastcaps: fused, exact routing for capsule networks."""

from fastcaps._version import __version__
from fastcaps.functional import length, squash
from fastcaps.routing import RoutingTrace, dynamic_routing, route_votes, routing_trace

__all__ = ["RoutingTrace", "__version__", "dynamic_routing", "length", "route_votes", "routing_trace", "squash"]
