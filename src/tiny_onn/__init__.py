"""Tiny-ONN: sparse, self-organising transformers that solve ARC tasks on ordinary hardware.

The parts: ``tiny_onn.optim`` (ARS2-Neo), ``tiny_onn.routing`` and ``tiny_onn.shaping`` (mixtures
of experts and FARS), ``tiny_onn.models``, ``tiny_onn.arc``. Nothing heavy is imported here.
"""

__version__ = "0.1.0"
