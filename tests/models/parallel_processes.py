"""One of two processes that share out a model by the library's plans, beside the whole model."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from torch.distributed.tensor import DTensor
from transformers.distributed import DistributedConfig

from tiny_onn.models import TinyOnnConfig, TinyOnnForCausalLM

sys.path.append(str(Path(__file__).parents[1]))
from two_ranks import save_figures

SHARES: dict[str, dict[str, Any]] = {
    "tensor": {"tp_size": 2},
    "tensor and experts": {"tp_size": 2, "ep_size": 2},
    "data and experts": {"fsdp_size": 2, "ep_size": 2},
    "data": {"fsdp_size": 2},
}
SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 8,
    "num_tasks": 2,
    "num_recurrences": 2,
    "halting": True,
    "router_aux_loss_coef": 0.1,
    "eos_token_id": None,
}


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def compare(shares: dict[str, Any], folder: Path) -> dict[str, Any]:
    """How far a model in two parts is from the model in one, and what was shared out."""
    single = TinyOnnForCausalLM.from_pretrained(folder / "model").train()
    parts = TinyOnnForCausalLM.from_pretrained(
        folder / "model", distributed_config=DistributedConfig(**shares)
    ).train()
    ids = torch.randint(0, 13, (2, 12), generator=torch.Generator().manual_seed(1))
    inputs = {"task_ids": torch.tensor([0, 1])}
    outputs = [m(ids, labels=ids, output_router_logits=True, **inputs) for m in (single, parts)]
    for output in outputs:
        output.loss.backward()
    pairs = list(zip(single.named_parameters(), parts.parameters(), strict=True))
    answers = [
        m.eval().generate(ids[:, :6], max_new_tokens=6, do_sample=False, **inputs)
        for m in (single, parts)
    ]
    return {
        "logits": float((outputs[0].logits - outputs[1].logits).detach().abs().max()),
        "gradients": max(
            float((p.grad - whole(q.grad)).norm() / (p.grad.norm() + 1e-6)) for (_, p), q in pairs
        ),
        "shared": [name for (name, _), q in pairs if isinstance(q, DTensor)],
        "answers": answers[0].tolist() == answers[1].tolist(),
    }


def check(shares: dict[str, Any]) -> Any:
    return lambda rank, folder: compare(shares, folder)


def data_parallel(rank: int, folder: Path) -> dict[str, Any]:
    """torch's data parallelism, of a model some of whose tables nobody asks."""
    model = TinyOnnForCausalLM(TinyOnnConfig(**SIZES)).train()
    parallel = torch.nn.parallel.DistributedDataParallel(model)
    ids = torch.randint(0, 13, (2, 12), generator=torch.Generator().manual_seed(rank))
    for _ in range(2):
        parallel(input_ids=ids, labels=ids).loss.backward()
    missing = [name for name, p in model.named_parameters() if p.grad is None]
    found = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
    return {"gradients": torch.cat(found), "missing": missing}


if __name__ == "__main__":
    save_figures({name: check(shares) for name, shares in SHARES.items()} | {"ddp": data_parallel})
