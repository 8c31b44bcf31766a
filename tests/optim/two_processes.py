"""What two gloo processes do for test_distributed.py: each check returns plain figures.

Run as ``python two_processes.py RANK FOLDER``; the figures of all checks go to FOLDER/RANK.pt.
"""

import copy
import sys
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)
from torch.nn.parallel import DistributedDataParallel

from tiny_onn.optim import ARS2Neo, param_groups

sys.path.append(str(Path(__file__).parents[1]))
from two_ranks import save_figures

STEPS = 12


class Mixed(nn.Module):
    """Parameters of every kind and of awkward sizes."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.up = nn.Linear(6, 9)
        self.experts = nn.Parameter(torch.randn(3, 9, 5) / 3)
        self.more_experts = nn.Parameter(torch.randn(4, 5, 5) / 3)
        self.norm = nn.LayerNorm(5)
        self.down = nn.Linear(5, 1)

    def forward(self, ids):
        x = torch.tanh(self.up(self.embed(ids)))
        x = torch.einsum("nd,edo->no", x, self.experts) / 3
        x = x + torch.einsum("nd,edo->no", torch.tanh(x), self.more_experts) / 4
        return self.down(self.norm(x)).squeeze(-1)


def data():
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(11, (STEPS, 16), generator=generator)
    return ids, torch.randn(STEPS, 16, generator=generator)


def train(model, optimizer, share, steps=range(STEPS)):
    """Train on a share of every batch; the passes of each step."""
    ids, targets = data()
    passes = []
    for t in steps:
        count = [0]

        def closure(t=t, count=count):
            count[0] += 1
            optimizer.zero_grad()
            loss = (model(ids[t, share]) - targets[t, share]).square().mean()
            loss.backward()
            return loss

        optimizer.step(closure)
        passes.append(count[0])
    return passes


def weights(model):
    found = []
    for p in model.parameters():
        found.append(p.full_tensor() if isinstance(p, DTensor) else p.detach())
    return torch.cat([p.detach().flatten() for p in found])


def make(mode="off", **options):
    torch.manual_seed(0)
    model = Mixed()
    options = {"lr": 0.02, "sam": mode, "rho": 0.05, "sync_every": 5} | options
    return model, lambda m: ARS2Neo(param_groups(m), **options)


def alone(mode, **options):
    model, build = make(mode, **options)
    optimizer = build(model)
    return model, optimizer, train(model, optimizer, slice(None))


def half(rank):
    return slice(8 * rank, 8 * rank + 8)


def ddp(rank, mode, shared):
    """Distance to a single process, and what must be equal on both ranks."""
    single, _, passes_alone = alone(mode)
    group = dist.group.WORLD if shared else None
    model, build = make(mode, process_group=group)
    model = DistributedDataParallel(model)
    optimizer = build(model.module)
    passes = train(model, optimizer, half(rank))
    moments = [optimizer.second_moment(p).clone() for p in model.module.parameters()]
    return {
        "distance": float((weights(model.module) - weights(single)).abs().max()),
        "passes": passes,
        "passes_alone": passes_alone,
        "weights": weights(model.module),
        "moments": torch.cat([v.flatten() for v in moments]),
        "phi": optimizer.diagnostics["phi"],
    }


def fsdp(rank, mode):
    """The same with parameters that ``fully_shard`` has spread."""
    single, single_optimizer, passes_alone = alone(mode)
    model, build = make(mode)
    fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
    optimizer = build(model)
    passes = train(model, optimizer, half(rank))
    figures, expected = optimizer.diagnostics, single_optimizer.diagnostics
    return {
        "distance": float((weights(model) - weights(single)).abs().max()),
        "passes": passes,
        "passes_alone": passes_alone,
        "weights": weights(model),
        "sharded": all(isinstance(p, DTensor) for p in model.parameters()),
        "local_experts": model.experts.to_local().shape[0],
        "diagnostics": [figures["grad_norm"], *figures["update_rms"]],
        "expected": [expected["grad_norm"], *expected["update_rms"]],
    }


def fsdp_tensor_scope(rank):
    single, _, _ = alone("sync", perturb_scope="tensor")
    model, build = make("sync", perturb_scope="tensor")
    fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
    train(model, build(model), half(rank))
    return {"distance": float((weights(model) - weights(single)).abs().max())}


def checkpoint(rank, folder):
    """A run broken off, saved with torch.distributed.checkpoint, and gone on with."""
    whole, build = make("adaptive")
    fully_shard(whole, mesh=init_device_mesh("cpu", (2,)))
    unbroken = build(whole)
    train(whole, unbroken, half(rank))
    first, build = make("adaptive")
    fully_shard(first, mesh=init_device_mesh("cpu", (2,)))
    optimizer = build(first)
    train(first, optimizer, half(rank), range(5))
    model_state, optimizer_state = get_state_dict(first, optimizer)
    dcp.save({"model": model_state, "optimizer": optimizer_state}, checkpoint_id=folder / "dcp")
    torch.manual_seed(7)
    second = Mixed()
    fully_shard(second, mesh=init_device_mesh("cpu", (2,)))
    resumed = build(second)
    model_state, optimizer_state = get_state_dict(second, resumed)
    state = {"model": model_state, "optimizer": optimizer_state}
    dcp.load(state, checkpoint_id=folder / "dcp")
    set_state_dict(
        second,
        resumed,
        model_state_dict=state["model"],
        optim_state_dict=state["optimizer"],
    )
    train(second, resumed, half(rank), range(5, STEPS))
    return {
        "equal": torch.equal(weights(second), weights(whole)),
        "syncs": (resumed.diagnostics["syncs"], unbroken.diagnostics["syncs"]),
        "copies": copy.deepcopy(resumed.diagnostics) == resumed.diagnostics,
    }


def tensor_parallel(rank):
    """The refusals, as text."""
    found = []
    for names in (("tp",), None):
        model = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 4))
        mesh = init_device_mesh("cpu", (2,), mesh_dim_names=names)
        parallelize_module(model, mesh, {"0": ColwiseParallel(), "1": RowwiseParallel()})
        try:
            ARS2Neo(model.parameters())
        except ValueError as error:
            found.append(str(error))
    return {"errors": found}


def checks():
    found = {
        "tensor_parallel": lambda rank, folder: tensor_parallel(rank),
        "checkpoint": checkpoint,
        "fsdp-tensor": lambda rank, folder: fsdp_tensor_scope(rank),
    }
    for mode in ("off", "sync", "delayed", "adaptive"):
        found[f"fsdp-{mode}"] = lambda rank, folder, mode=mode: fsdp(rank, mode)
        for work in ("each", "shared"):
            shared = work == "shared"
            found[f"ddp-{mode}-{work}"] = lambda rank, folder, mode=mode, shared=shared: ddp(
                rank, mode, shared
            )
    return found


if __name__ == "__main__":
    save_figures(checks())
