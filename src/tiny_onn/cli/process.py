"""What the process is told before torch is loaded: how threads wait, and to keep its memory."""

from __future__ import annotations

import ctypes
import os

TRIM_THRESHOLD, MMAP_MAX = -1, -4
"""Parameters of glibc's ``mallopt``."""


def tune() -> None:
    """Settings under which torch trains fastest on a CPU; the environment's own go first."""
    # A thread that waits for the others spins a moment (some microseconds) and then sleeps. One
    # that sleeps at once makes small products up to twice as slow; one that goes on spinning makes
    # everything two to five times as slow as soon as another program wants its core.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    # oneDNN compiles each bfloat16 product of a new shape, in about a millisecond, and keeps 1,024
    # of them; a model of many experts has more than that in use.
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "4096")
    keep_memory()


def keep_memory() -> bool:
    """Have freed memory used again, where the C library is glibc; else do nothing.

    glibc gives large blocks back at once, so that each training step would ask for hundreds of
    megabytes anew, page by page: a quarter of the time of a step with 64 experts.

    Returns:
        Whether there was anything to set.
    """
    if any(name.startswith("MALLOC_") for name in os.environ):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return False
    largest = 2**31 - 1
    return bool(mallopt(MMAP_MAX, 0) and mallopt(TRIM_THRESHOLD, largest))
