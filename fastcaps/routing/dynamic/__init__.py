"""Dynamic routing by agreement (Sabour et al. 2017)."""

from fastcaps.routing.dynamic.api import dynamic_routing, route_votes
from fastcaps.routing.dynamic.trace import RoutingTrace, routing_trace

__all__ = ["RoutingTrace", "dynamic_routing", "route_votes", "routing_trace"]
