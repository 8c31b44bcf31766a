"""MNIST-1D (arXiv:2011.14439): ten classes of 40 samples each, an MLP and a small CNN."""

from __future__ import annotations

from functools import cache, partial

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tiny_onn.studies.optimizers import build, step
from tiny_onn.studies.runs import Figures, Settings, Stopwatch

BATCH = 100

WEIGHT_DECAY = 0.01


def mlp() -> nn.Module:
    """40 - 100 - 100 - 10."""
    return nn.Sequential(
        nn.Linear(40, 100), nn.ReLU(), nn.Linear(100, 100), nn.ReLU(), nn.Linear(100, 10)
    )


def cnn() -> nn.Module:
    """Three strided convolutions of 25 channels, and a linear head."""
    return nn.Sequential(
        nn.Unflatten(1, (1, 40)),
        nn.Conv1d(1, 25, 5, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv1d(25, 25, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv1d(25, 25, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(125, 10),
    )


MODELS = {"mlp": mlp, "cnn": cnn}


@cache
def examples() -> dict[str, tuple[Tensor, Tensor]]:
    """Inputs ``[N, 40]`` and labels ``[N]``: 3,000 to train on, 1,000 to tune on, 1,000 to report.

    The package makes them itself from a seed; nothing is downloaded.
    """
    from mnist1d.data import get_dataset_args, make_dataset

    before = np.random.get_state()
    made = make_dataset(get_dataset_args())
    np.random.set_state(before)
    x, y = torch.tensor(made["x"], dtype=torch.float32), torch.tensor(made["y"])
    held = torch.tensor(made["x_test"], dtype=torch.float32), torch.tensor(made["y_test"])
    return {"train": (x[:3000], y[:3000]), "tune": (x[3000:], y[3000:]), "report": held}


def run(settings: Settings) -> Figures:
    """Train for so many steps, or so many passes, with the rate falling linearly to zero.

    Args:
        settings: ``model, arm, lr, rho, coin_rate, seed``, ``part`` ("tune" or "report", where it
            is scored), ``budget`` and ``unit`` ("steps" or "passes").

    Returns:
        ``accuracy`` and ``loss`` held out, ``steps, passes, seconds, sync_rate``.
    """
    seed, by_passes = settings["seed"], settings["unit"] == "passes"
    x, y = examples()["train"]
    torch.manual_seed(seed)
    model = MODELS[settings["model"]]()
    optimizer = build(
        settings["arm"],
        model,
        lr=settings["lr"],
        rho=settings["rho"],
        weight_decay=WEIGHT_DECAY,
        coin_rate=settings["coin_rate"],
        seed=seed,
    )
    rates = [group["lr"] for group in optimizer.param_groups]
    steps = passes = 0
    watch = Stopwatch()
    while (spent := passes if by_passes else steps) < settings["budget"]:
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * (1 - spent / settings["budget"])
        batch = torch.randint(len(x), (BATCH,))
        passes += step(optimizer, partial(_loss, model, x[batch], y[batch]))
        steps += 1
    seconds = watch.seconds
    held_x, held_y = examples()[settings["part"]]
    with torch.inference_mode():
        logits = model(held_x)
    return {
        "accuracy": float((logits.argmax(-1) == held_y).float().mean()),
        "loss": float(F.cross_entropy(logits, held_y)),
        "steps": steps,
        "passes": passes,
        "seconds": seconds,
        "sync_rate": passes / steps - 1,
    }


def _loss(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(model(x), y)
