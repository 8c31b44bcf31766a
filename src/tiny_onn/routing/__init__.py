"""Routers, the routing decision and grouped experts: the sparse half of every layer."""

from tiny_onn.routing.experts import GroupedExperts
from tiny_onn.routing.mixture import MixtureOfExperts
from tiny_onn.routing.routers import (
    ROUTERS,
    CosineRouter,
    CrossAttentionRouter,
    LinearRouter,
    MLPRouter,
    Routing,
    route,
)

__all__ = [
    "ROUTERS",
    "CosineRouter",
    "CrossAttentionRouter",
    "GroupedExperts",
    "LinearRouter",
    "MLPRouter",
    "MixtureOfExperts",
    "Routing",
    "route",
]
