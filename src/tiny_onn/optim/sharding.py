"""Parameters spread over processes: whose part is where, and matrices orthogonalised in shares.

Two layouts are known. Replicated (DistributedDataParallel): every process holds every parameter,
and with a process group each orthogonalises its share of the matrices. Sharded on the first
dimension (``fully_shard``): a stack of experts falls into whole experts, which stay where they
are; a matrix falls into rows, which are gathered, orthogonalised in shares, and kept in part.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

Group = Any
"""A process group, or None for this process alone."""


Total = Callable[[Tensor], Tensor]
"""Adds numbers ``[P]``, one for the local part of each parameter, up over the processes."""


def is_distributed(x: Tensor) -> bool:
    """Whether a tensor is a DTensor; asked without importing them."""
    return hasattr(x, "device_mesh")


def local(x: Any) -> Tensor:
    """The part of a tensor that lies in this process, by reference."""
    return x.to_local() if is_distributed(x) else x


def shard_group(p: Any) -> Group:
    """The processes over which a parameter's parts are spread."""
    if not is_distributed(p):
        return None
    sharded = [i for i, placement in enumerate(p.placements) if placement.is_shard()]
    return p.device_mesh.get_group(sharded[0]) if sharded else None


def check_layout(p: Any) -> None:
    """Refuse layouts other than whole copies and parts along the first dimension.

    Raises:
        ValueError: naming tensor parallelism where the mesh does.
    """
    if not is_distributed(p):
        return
    names = p.device_mesh.mesh_dim_names or ()
    placed = f"{tuple(p.placements)} on mesh dimensions {tuple(names)}, shape {tuple(p.shape)}"
    kinds = [type(placement).__name__ for placement in p.placements]
    shards = [x for x in p.placements if x.is_shard()]
    if any("tp" in name or "tensor" in name for name in names) or any(x.dim for x in shards):
        raise ValueError(
            f"tensor parallelism is not supported, only DistributedDataParallel and fully_shard on "
            f"the first dimension. Got {placed}"
        )
    if len(shards) > 1 or not set(kinds) <= {"Shard", "Replicate"}:
        raise ValueError(f"parameters may be sharded over one mesh dimension. Got {placed}")


def over_processes(sums: Tensor, parameters: Sequence[Tensor]) -> Tensor:
    """Add up what each process found for its parts of the parameters.

    Args:
        sums: one number for each parameter ``[P]``, summed over the local part.
        parameters: the P parameters; a replicated one counts once.
    """
    groups = {id(group): group for group in map(shard_group, parameters) if group is not None}
    for key, group in groups.items():
        mine = [id(shard_group(p)) == key for p in parameters]
        chosen = torch.tensor(mine, device=sums.device)
        parts = torch.where(chosen, sums, 0)
        dist.all_reduce(parts, group=group)
        sums = torch.where(chosen, parts, sums)
    return sums


def here(sums: Tensor) -> Tensor:
    """The total where every parameter lies whole in this process."""
    return sums


def total_of(parameters: Sequence[Tensor]) -> Total:
    """How to add up over the processes that hold parts of these parameters."""
    if any(map(is_distributed, parameters)):
        return partial(over_processes, parameters=parameters)
    return here


class Layout:
    """Where the matrices of one parameter lie, and who helps to orthogonalise them.

    Args:
        p: the parameter.
        replicas: the processes that hold copies of plain parameters.

    Attributes:
        helpers: the processes that all hold what :meth:`whole` returns.
    """

    def __init__(self, p: Any, replicas: Group) -> None:
        self._p = p
        group = shard_group(p)
        # Whole experts stay where they are: each process has matrices of its own.
        self._in_rows = group is not None and p.ndim != 3
        self.helpers: Group = group if self._in_rows else None
        if not is_distributed(p):
            self.helpers = replicas

    def whole(self, part: Tensor) -> Tensor:
        """Whole matrices, from a tensor laid out like the parameter."""
        if not self._in_rows:
            return part
        from torch.distributed.tensor import DTensor

        p = self._p
        spread = DTensor.from_local(
            part, p.device_mesh, p.placements, shape=p.shape, stride=p.stride(), run_check=False
        )
        return spread.full_tensor()

    def part(self, whole: Tensor) -> Tensor:
        """The inverse of :meth:`whole`, without communication."""
        if not self._in_rows:
            return whole
        from torch.distributed.tensor import distribute_tensor

        p = self._p
        spread = distribute_tensor(whole, p.device_mesh, p.placements, src_data_rank=None)
        return spread.to_local()


def in_shares(
    work: Callable[[Tensor], Tensor], batch: Tensor, group: Group, turn: int = 0
) -> Tensor:
    """``work(batch)``, of which each process of the group computes a share.

    Args:
        work: maps each matrix of a batch ``[B, m, n]`` by itself.
        batch: the same in every process.
        turn: which process takes the first share, so that small batches don't all go to one.
    """
    if group is None:
        return work(batch)
    size, rank = dist.get_world_size(group), dist.get_rank(group)
    each = -(len(batch) // -size)
    start = (rank + turn) % size * each
    share = batch.new_zeros(each, *batch.shape[1:])
    mine = batch[start : start + each]
    if len(mine):
        share[: len(mine)] = work(mine)
    shares = batch.new_empty(size, each, *batch.shape[1:])
    dist.all_gather(list(shares), share, group=group)
    return shares.roll(turn, dims=0).flatten(0, 1)[: len(batch)]
