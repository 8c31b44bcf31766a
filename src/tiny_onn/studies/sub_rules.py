"""A task made of four sub-rules, in which it is known who should do what: each quadrant of the
first two features has a linear map of its own.

Shapes: N tokens, D features, G rules.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tiny_onn.optim import ARS2Neo, param_groups
from tiny_onn.routing import GroupedExperts, MixtureOfExperts, MLPRouter
from tiny_onn.shaping import RoutingMonitor, RoutingShaper
from tiny_onn.studies.runs import Figures, Settings, Stopwatch
from tiny_onn.studies.signal import CostRecorder, mean_of

FEATURES, RULES, EXPERTS, CHOSEN, BATCH, HELD = 16, 4, 8, 2, 256, 4096
LEARNING_RATE = 1e-2
PROBE_EVERY = 20


def rules() -> Tensor:
    """The rules' maps ``[G, D, D]``, the same in every run."""
    generator = torch.Generator().manual_seed(7)
    return torch.randn(RULES, FEATURES, FEATURES, generator=generator) / FEATURES**0.5


def sample(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Inputs and targets ``[N, D]``, and each token's rule ``[N]``."""
    x = torch.randn(count, FEATURES, generator=generator)
    rule = (x[:, 0] > 0).long() + 2 * (x[:, 1] > 0).long()
    return x, torch.einsum("noi,ni->no", rules()[rule], x), rule


def make_model() -> MixtureOfExperts:
    """One routed site with half as many rules as experts."""
    return MixtureOfExperts(
        MLPRouter(FEATURES, EXPERTS, 32),
        GroupedExperts(EXPERTS, FEATURES, intermediate_size=FEATURES),
        CHOSEN,
    )


def run(settings: Settings) -> Figures:
    """Train with one strategy, and look at error, routes and, if asked, the costs on the way.

    Args:
        settings: ``strategy, options, w_meta, seed, steps, seconds`` (None for no bound),
            ``record`` (bool).

    Returns:
        ``held_out_loss`` (mean squared error over the targets' variance), ``steps, seconds``,
        the monitor's figures (``jitter`` is the mean over the run), and the recorder's.
    """
    torch.manual_seed(settings["seed"])
    train, held = (torch.Generator().manual_seed(2 * settings["seed"] + i) for i in range(2))
    model = make_model()
    optimizer = ARS2Neo(param_groups(model), lr=LEARNING_RATE)
    shaper = RoutingShaper(model, settings["strategy"], settings["w_meta"], **settings["options"])
    recorder = CostRecorder(model, shaper.sites) if settings["record"] else None
    monitor = RoutingMonitor(CHOSEN, num_groups=RULES)
    probe, target, rule = sample(HELD, held)
    watch, spent, steps = Stopwatch(), 0.0, 0
    jitters: list[float | None] = []
    while steps < settings["steps"] and spent < (settings["seconds"] or float("inf")):
        start = watch.seconds
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * (1 - max(_share(settings, steps, spent), 0.0))
        x, y, _ = sample(BATCH, train)
        optimizer.zero_grad()
        loss, logits = _loss(model, x, y)
        if recorder is not None:
            recorder.note([logits.detach()], optimizer, loss)
        meta = shaper.calculate_meta_loss([logits], optimizer, None, loss)
        (loss + meta).backward()
        optimizer.step()
        steps += 1
        spent += watch.seconds - start
        if steps % PROBE_EVERY == 0:
            monitor.probe([model.router(probe).detach()])
            jitters.append(monitor.summary().get("jitter"))
    with torch.no_grad():
        loss, logits = _loss(model, probe, target)
        monitor.update([logits], groups=rule)
    return (
        {"held_out_loss": float(loss / target.var()), "steps": steps, "seconds": spent}
        | monitor.summary()
        | {"jitter": mean_of(jitters)}
        | (recorder.figures() if recorder is not None else {})
    )


def _share(settings: Settings, steps: int, spent: float) -> float:
    by_time = spent / settings["seconds"] if settings["seconds"] else 0.0
    return max(steps / settings["steps"], by_time)


def _loss(model: MixtureOfExperts, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """The mean squared error, and the router's logits of the same pass."""
    seen: list[Tensor] = []
    hook = model.router.register_forward_hook(lambda *call: seen.append(call[2]))
    loss = nn.functional.mse_loss(model(x), y)
    hook.remove()
    return loss, seen[0]
