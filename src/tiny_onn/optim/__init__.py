"""ARS2-Neo: orthogonalised, energy-scaled, sharpness-aware updates. Needs nothing but torch."""

from tiny_onn.optim.ars2_neo import ARS2Neo
from tiny_onn.optim.newton_schulz import orthogonalize
from tiny_onn.optim.param_groups import param_groups

__all__ = ["ARS2Neo", "orthogonalize", "param_groups"]
