"""Rules that send a token to one of four experts, and one router trained to follow one of them.

Shapes: N tokens, D = 16 Gaussian features, E = 4 experts, W width of a learned projection.

Every label is a function of the token alone, so that an accuracy of 1 can be reached. By symmetry
each expert of ``xor`` and ``nested`` gets a quarter of the tokens; of ``linear`` and ``prototype``,
which are drawn at random, the largest gets a third on average.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from tiny_onn.routing import ROUTERS
from tiny_onn.studies.runs import Figures, Settings, Stopwatch

FEATURES = 16
EXPERTS = 4
BATCH = 256
WEIGHT_SEED = 1_000_000

NEAR = 0.05
"""Within this share of each other, two counts of parameters match."""

PROTOTYPE_NORMS = (1.0, 1.25, 1.5, 1.75)

Rule = Callable[[Tensor], Tensor]
"""From tokens ``[N, D]`` to the expert of each, int64 ``[N]``."""


def linear(generator: Generator) -> Rule:
    """The largest of four random linear functions."""
    weight_ED = torch.randn(EXPERTS, FEATURES, generator=generator)
    return lambda x_ND: (x_ND @ weight_ED.T).argmax(-1)


def xor(generator: Generator) -> Rule:
    """Two bits: whether features 0 and 1 differ in sign, and whether features 2 and 3 do."""
    return lambda x_ND: 2 * _differ(x_ND, 0, 1).long() + _differ(x_ND, 2, 3).long()


def prototype(generator: Generator) -> Rule:
    """The nearest of four prototypes, in random directions and of norms 1 to 1.75."""
    directions = F.normalize(torch.randn(EXPERTS, FEATURES, generator=generator), dim=-1)
    prototypes_ED = directions * torch.tensor(PROTOTYPE_NORMS)[:, None]
    return lambda x_ND: torch.cdist(x_ND, prototypes_ED).argmin(-1)


def nested(generator: Generator) -> Rule:
    """If features 0 and 1 differ in sign: expert 0 or 1, by the sign of feature 2. Otherwise:
    expert 2 or 3, by whether features 3 and 4 lie outside a circle that holds half of them."""
    half = math.sqrt(2 * math.log(2))

    def rule(x_ND: Tensor) -> Tensor:
        outside = x_ND[:, 3:5].norm(dim=-1) > half
        sign = x_ND[:, 2] > 0
        return torch.where(_differ(x_ND, 0, 1), sign.long(), 2 + outside.long())

    return rule


def _differ(x_ND: Tensor, i: int, j: int) -> Tensor:
    return (x_ND[:, i] > 0) ^ (x_ND[:, j] > 0)


RULES: dict[str, Callable[[Generator], Rule]] = {
    "linear": linear,
    "xor": xor,
    "prototype": prototype,
    "nested": nested,
}


class Projected(nn.Module):
    """A router that reads W learned linear functions of the token: more parameters, no new kind
    of decision for a router that is linear in its input."""

    def __init__(self, router: str, width: int) -> None:
        super().__init__()
        self.projection = nn.Linear(FEATURES, width, bias=False)
        nn.init.normal_(self.projection.weight, std=1 / math.sqrt(FEATURES))
        self.router = ROUTERS[router](width, EXPERTS)

    def forward(self, x_ND: Tensor) -> Tensor:
        return self.router(self.projection(x_ND))


def build(router: str, variant: str) -> nn.Module:
    """A router as it is, or ``matched`` in size to the MLP router.

    A router within 5 % of the MLP router's parameters stays as it is; another one gets a learned
    projection, of the width that brings it nearest.
    """
    plain = ROUTERS[router](FEATURES, EXPERTS)
    goal = parameters(ROUTERS["mlp"](FEATURES, EXPERTS))
    if variant == "as_is" or abs(parameters(plain) - goal) <= NEAR * goal:
        return plain
    candidates = [Projected(router, width) for width in range(1, FEATURES + 1)]
    return min(candidates, key=lambda module: abs(parameters(module) - goal))


def parameters(module: nn.Module) -> int:
    """How many numbers a module learns."""
    return sum(p.numel() for p in module.parameters())


def sample(rule: str, counts: tuple[int, ...], seed: int) -> list[tuple[Tensor, Tensor]]:
    """Samples ``(tokens [N, D], experts [N])`` of these sizes, all of one rule."""
    generator = torch.Generator().manual_seed(seed)
    label = RULES[rule](generator)
    drawn = [torch.randn(count, FEATURES, generator=generator) for count in counts]
    return [(x, label(x)) for x in drawn]


@contextmanager
def one_thread(seed: int) -> Iterator[None]:
    """Compute with one thread, from this seed, and leave threads and random state as they were."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            yield
    finally:
        torch.set_num_threads(threads)


def run(settings: Settings) -> Figures:
    """Train one router as a classifier, and score it on tokens that it hasn't seen.

    Args:
        settings: ``router, variant, rule, lr, train, test, epochs, seed``; the seed draws rule,
            tokens, weights and batches.

    Returns:
        ``accuracy``, ``logit_entropy`` (nats, mean over fresh tokens), ``training_cpu_s``,
        ``parameters``, and ``majority``, the share of the most frequent expert.
    """
    seed, epochs = settings["seed"], settings["epochs"]
    # Another seed than the rule's: from the same one a router's weights would start as the rule's.
    with one_thread(WEIGHT_SEED + seed):
        (x, label), (fresh, truth) = sample(
            settings["rule"], (settings["train"], settings["test"]), seed
        )
        module = build(settings["router"], settings["variant"])
        optimizer = torch.optim.Adam(module.parameters(), lr=settings["lr"], fused=True)
        watch = Stopwatch()
        for epoch in range(epochs):
            for group in optimizer.param_groups:
                group["lr"] = settings["lr"] * (1 - epoch / epochs)
            for batch in torch.randperm(len(x)).split(BATCH):
                optimizer.zero_grad()
                F.cross_entropy(module(x[batch]), label[batch]).backward()
                optimizer.step()
        seconds = watch.seconds
        with torch.inference_mode():
            logits_NE = module(fresh)
    log_p = logits_NE.log_softmax(-1)
    return {
        "accuracy": float((logits_NE.argmax(-1) == truth).float().mean()),
        "logit_entropy": float(-(log_p.exp() * log_p).sum(-1).mean()),
        "training_cpu_s": seconds,
        "parameters": parameters(module),
        "majority": float(truth.bincount(minlength=EXPERTS).max() / len(truth)),
    }
