"""Routers, the routing decision and grouped experts: the sparse half of every layer."""

from tiny_onn.routing.experts import GroupedExperts
from tiny_onn.routing.heads import RoutedHeads
from tiny_onn.routing.mixture import MixtureOfExperts, SharedExpert
from tiny_onn.routing.routers import (
    ROUTERS,
    AffineRouter,
    CosineRouter,
    CrossAttentionRouter,
    LinearRouter,
    MLPRouter,
    QuadraticRouter,
    Routing,
    route,
)

__all__ = [
    "ROUTERS",
    "AffineRouter",
    "CosineRouter",
    "CrossAttentionRouter",
    "GroupedExperts",
    "LinearRouter",
    "MLPRouter",
    "MixtureOfExperts",
    "QuadraticRouter",
    "RoutedHeads",
    "Routing",
    "SharedExpert",
    "route",
]
