"""What two gloo processes do for test_shaping_distributed.py."""

import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from tiny_onn.optim import ARS2Neo, param_groups
from tiny_onn.routing import GroupedExperts, LinearRouter, MixtureOfExperts
from tiny_onn.shaping import RoutingShaper

sys.path.append(str(Path(__file__).parents[1]))
from two_ranks import save_figures

STEPS, TOKENS, D, E = 4, 32, 8, 3


class Routed(nn.Module):
    """A routed block between two layers, which gives the router's logits along."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(D, D)
        self.block = MixtureOfExperts(
            LinearRouter(D, E), GroupedExperts(E, D, intermediate_size=8, implementation="loop"), 2
        )
        self.seen = []
        self.block.router.register_forward_hook(lambda *call: self.seen.append(call[2]))

    def forward(self, x):
        self.seen.clear()
        return self.block(torch.tanh(self.up(x))), *self.seen


OPTIMIZERS = {
    "ars2neo": lambda model: ARS2Neo(param_groups(model), lr=0.02),
    "adamw": lambda model: torch.optim.AdamW(model.parameters(), lr=0.01, fused=True),
}


def train(model, optimizer, shaper, share):
    """Train on a share of every batch, and return the costs at the end."""
    batches = torch.randn(STEPS, TOKENS, D, generator=torch.Generator().manual_seed(1))
    for batch in batches:
        optimizer.zero_grad()
        x = batch[share]
        out, logits = model(x)
        main = F.mse_loss(out, x.roll(1, -1))
        (main + shaper.calculate_meta_loss([logits], optimizer, None, main)).backward()
        optimizer.step()
    (strategy,) = shaper.strategies.values()
    return strategy.costs(shaper.sites, optimizer)[0] if hasattr(strategy, "costs") else None


def weights(model):
    whole = (p.full_tensor() if isinstance(p, DTensor) else p for p in model.parameters())
    return torch.cat([p.detach().flatten() for p in whole])


def run(kind, strategy, make, rank):
    torch.manual_seed(0)
    alone, model = Routed(), Routed()
    model.load_state_dict(alone.state_dict())
    shapers = [RoutingShaper(m, strategy, w_meta=1.0) for m in (alone, model)]
    costs_alone = train(alone, make(alone), shapers[0], slice(None))
    outer = model
    if kind == "ddp":
        outer = DistributedDataParallel(model)
    else:
        fully_shard(model.block, mesh=init_device_mesh("cpu", (2,)))
        fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
    half = slice(TOKENS // 2 * rank, TOKENS // 2 * (rank + 1))
    costs = train(outer, make(model), shapers[1], half)
    figures = {"distance": float((weights(model) - weights(alone)).abs().max())}
    if costs is None:
        bias, bias_alone = model.block.selection_bias, alone.block.selection_bias
        return figures | {"bias": bias, "bias_alone": bias_alone}
    return figures | {"costs": costs, "costs_alone": costs_alone}


def checks():
    return {
        f"{kind}-{strategy}-{name}": lambda rank, folder, a=(kind, strategy, make): run(*a, rank)
        for kind in ("ddp", "fsdp")
        for strategy in ("fars", "bias")
        for name, make in OPTIMIZERS.items()
    }


if __name__ == "__main__":
    save_figures(checks())
