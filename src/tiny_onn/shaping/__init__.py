"""Routing shaping: losses and monitors for the routes of a mixture of experts."""

from tiny_onn.shaping.balance import LoadBalanceShaper
from tiny_onn.shaping.fisher import FisherShaper, fisher_cost
from tiny_onn.shaping.monitor import RoutingStatistics, routing_statistics
from tiny_onn.shaping.shaper import SHAPERS, RoutingShaper

__all__ = [
    "SHAPERS",
    "FisherShaper",
    "LoadBalanceShaper",
    "RoutingShaper",
    "RoutingStatistics",
    "fisher_cost",
    "routing_statistics",
]
