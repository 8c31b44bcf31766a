"""Grokking (arXiv:2201.02177): addition modulo a prime, learnt from a share of all pairs.

Shapes: N pairs, T = 3 tokens (a, b, equals), D width, p the prime.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tiny_onn.studies.optimizers import build, step
from tiny_onn.studies.runs import Figures, Settings, Stopwatch

GOAL = 0.99
"""Held-out accuracy that counts as grokked."""

WEIGHT_DECAY = 1.0
"""Decoupled weight decay, what grokking hangs on; the same for every optimizer."""

BATCH = 512

EVERY = 2
"""Epochs between two looks at the held-out pairs."""


class ModularAddition(nn.Module):
    """A one-layer transformer: 4 heads of 32, width 128, MLP of 512, without normalisation."""

    def __init__(self, prime: int, width: int = 128, heads: int = 4, mlp: int = 512) -> None:
        super().__init__()
        self.heads = heads
        self.embed = nn.Embedding(prime + 1, width)
        self.position = nn.Embedding(3, width)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        self.up = nn.Linear(width, mlp)
        self.down = nn.Linear(mlp, width)
        self.head = nn.Linear(width, prime, bias=False)
        for table in (self.embed, self.position):
            nn.init.normal_(table.weight, std=width**-0.5)

    def get_output_embeddings(self) -> nn.Module:
        """The head, which :func:`tiny_onn.optim.param_groups` leaves to AdamW."""
        return self.head

    def forward(self, tokens_NT: Tensor) -> Tensor:
        """Logits ``[N, p]`` of the sum, read at the last token, which sees all three."""
        x_NTD = self.embed(tokens_NT) + self.position.weight
        q, k, v = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for part in self.qkv(x_NTD).chunk(3, -1)
        )
        seen = F.scaled_dot_product_attention(q[:, :, -1:], k, v).transpose(1, 2).flatten(2)
        x_ND = x_NTD[:, -1] + self.out(seen[:, 0])
        x_ND = x_ND + self.down(F.relu(self.up(x_ND)))
        return self.head(x_ND)


def addition(prime: int, share: float, seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``tokens [N, 3], sums [N]`` to train on, and the same held out."""
    a, b = torch.cartesian_prod(torch.arange(prime), torch.arange(prime)).unbind(1)
    tokens = torch.stack([a, b, torch.full_like(a, prime)], dim=1)
    sums = (a + b) % prime
    order = torch.randperm(len(a), generator=torch.Generator().manual_seed(seed))
    train, test = order[: int(share * len(a))], order[int(share * len(a)) :]
    return tokens[train], sums[train], tokens[test], sums[test]


def run(settings: Settings) -> Figures:
    """Train until held-out accuracy reaches the goal, or the epochs are over.

    Args:
        settings: ``arm, lr, rho, coin_rate, prime, share, epochs, seed``.

    Returns:
        ``epochs, seconds, passes`` until the goal (None if it was not reached), ``accuracy`` at
        the end, ``curve`` of held-out accuracy at every look, ``sync_rate``, second passes a step.
    """
    seed = settings["seed"]
    tokens, sums, held_tokens, held_sums = addition(settings["prime"], settings["share"], seed)
    torch.manual_seed(seed)
    model = ModularAddition(settings["prime"])
    optimizer = build(
        settings["arm"],
        model,
        lr=settings["lr"],
        rho=settings["rho"],
        weight_decay=WEIGHT_DECAY,
        betas=(0.9, 0.98),
        coin_rate=settings["coin_rate"],
        seed=seed,
    )
    passes = steps = 0
    curve: list[float] = []
    reached: dict[str, Any] = {"epochs": None, "seconds": None, "passes": None}
    watch, testing = Stopwatch(), 0.0
    for epoch in range(1, settings["epochs"] + 1):
        for batch in torch.randperm(len(tokens)).split(BATCH):
            passes += step(optimizer, partial(_loss, model, tokens[batch], sums[batch]))
            steps += 1
        if epoch % EVERY and epoch < settings["epochs"]:
            continue
        before = watch.seconds
        curve.append(_accuracy(model, held_tokens, held_sums))
        testing += watch.seconds - before
        if curve[-1] >= GOAL:
            reached = {"epochs": epoch, "seconds": watch.seconds - testing, "passes": passes}
            break
    return reached | {
        "accuracy": curve[-1],
        "curve": [round(x, 4) for x in curve],
        "sync_rate": passes / steps - 1,
    }


def _loss(model: nn.Module, tokens: Tensor, sums: Tensor) -> Tensor:
    return F.cross_entropy(model(tokens), sums)


@torch.inference_mode()
def _accuracy(model: nn.Module, tokens: Tensor, sums: Tensor) -> float:
    return float((model(tokens).argmax(-1) == sums).float().mean())
