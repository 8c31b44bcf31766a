"""The random state that both passes of a sharpness-aware step start from."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class RandomState:
    """The default generators' state at construction, on the CPU and on the parameters' devices."""

    def __init__(self, parameters: Sequence[Tensor]) -> None:
        self._cpu = torch.get_rng_state()
        devices = {p.device for p in parameters if p.device.type == "cuda"}
        self._cuda = {device: torch.cuda.get_rng_state(device) for device in devices}

    def restore(self) -> None:
        """Set the generators back."""
        torch.set_rng_state(self._cpu)
        for device, state in self._cuda.items():
            torch.cuda.set_rng_state(state, device)
