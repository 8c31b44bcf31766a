"""Routing shaping: losses and monitors for the routes of a mixture of experts."""

from tiny_onn.shaping.adapters import ShapedRouting, shape_routing
from tiny_onn.shaping.balance import LoadBalanceShaper, SelectionBiasShaper, ZLossShaper
from tiny_onn.shaping.expert_sites import ExpertSite, find_expert_sites
from tiny_onn.shaping.fisher import FisherShaper, fisher_cost
from tiny_onn.shaping.monitor import RoutingMonitor, RoutingStatistics, routing_statistics
from tiny_onn.shaping.shaper import SHAPERS, RoutingShaper
from tiny_onn.shaping.sites import Routes, Site
from tiny_onn.shaping.surprise import SurpriseShaper
from tiny_onn.shaping.trainer import RoutingShapingMixin

__all__ = [
    "SHAPERS",
    "ExpertSite",
    "FisherShaper",
    "LoadBalanceShaper",
    "Routes",
    "RoutingMonitor",
    "RoutingShaper",
    "RoutingShapingMixin",
    "RoutingStatistics",
    "SelectionBiasShaper",
    "ShapedRouting",
    "Site",
    "SurpriseShaper",
    "ZLossShaper",
    "find_expert_sites",
    "fisher_cost",
    "routing_statistics",
    "shape_routing",
]
