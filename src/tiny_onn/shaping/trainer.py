"""Routing shaping inside ``transformers.Trainer``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from tiny_onn.shaping.adapters import ShapedRouting, shape_routing

if TYPE_CHECKING:
    from transformers import Trainer
else:
    # The library takes seconds to import; the class that is mixed in brings it along.
    Trainer = object


STATE_FILE = "routing_shaping.json"
"""What the strategies remember, in a checkpoint's folder."""


class RoutingShapingMixin(Trainer):
    """Adds the shaping loss of a mixture of experts to the loss that a ``Trainer`` minimises::

        class ShapedTrainer(RoutingShapingMixin, Trainer):
            pass

        trainer = ShapedTrainer(model, args, shaping={"strategy": "fars"}, train_dataset=...)

    The tokens of the batch's ``attention_mask`` count. The logged ``loss`` contains the shaping
    loss, which is also logged as ``shaping_loss`` (the mean over the micro-batches of this
    process); evaluation is left alone. A micro-batch weighs one over their number in an update,
    also where the library weighs its own loss by the number of labels. A model's own auxiliary
    loss is added where its config says so (``output_router_logits=True``); to shape in its place,
    leave that off. What a strategy remembers is saved in the Trainer's checkpoints.

    Args:
        shaping: arguments of :func:`~tiny_onn.shaping.shape_routing` other than model and
            optimizer.

    Raises:
        ValueError: what :func:`~tiny_onn.shaping.shape_routing` raises, when the trainer is made;
            in training, if ``nn.DataParallel`` splits the batch (start one process a GPU).
    """

    def __init__(self, *args: Any, shaping: dict[str, Any] | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._shaping_options = dict(shaping or {})
        self._unlogged: tuple[Tensor | float, int] = (0.0, 0)
        self._loaded: dict[str, Any] = {}
        self.shaping: ShapedRouting = self._shape()

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """The Trainer's loss and, in training, the shaping loss."""
        if not model.training:
            return super().compute_loss(
                model, inputs, return_outputs, num_items_in_batch=num_items_in_batch
            )
        if self.args.n_gpu > 1:
            raise ValueError(
                "Routing shaping needs one process a GPU (torchrun). nn.DataParallel splits the "
                f"batch over {self.args.n_gpu} GPUs in one"
            )
        if (self.shaping.model, self.shaping.optimizer) != (self.model, self.optimizer):
            # Training starts: the optimizer is made now, and the model may be made or sharded.
            self.shaping.remove()
            self.shaping = self._shape()
        loss, outputs = super().compute_loss(
            model, inputs, return_outputs=True, num_items_in_batch=num_items_in_batch
        )
        scaled = self._is_scaled(num_items_in_batch)
        parts = self.current_gradient_accumulation_steps if scaled else 1
        term = self.shaping.loss(inputs.get("attention_mask"), main_loss=loss * parts)
        total, count = self._unlogged
        self._unlogged = (total + term.detach(), count + 1)
        loss = loss + term / parts
        return (loss, outputs) if return_outputs else loss

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Log ``shaping_loss`` beside the training loss."""
        total, count = self._unlogged
        if "loss" in logs and count:
            logs["shaping_loss"] = float(total) / count
            self._unlogged = (0.0, 0)
        super().log(logs, *args, **kwargs)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        if self.args.should_save:
            state = json.dumps(self.shaping.shaper.state_dict())
            Path(output_dir, STATE_FILE).write_text(state, encoding="utf-8")

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None and Path(checkpoint, STATE_FILE).is_file():
            self._loaded = json.loads(Path(checkpoint, STATE_FILE).read_text(encoding="utf-8"))

    def _shape(self) -> ShapedRouting:
        shaping = shape_routing(self.model, self.optimizer, **self._shaping_options)
        shaping.shaper.load_state_dict(self._loaded)
        return shaping

    def _is_scaled(self, num_items_in_batch: Any) -> bool:
        """Whether the Trainer takes the loss for one that is already divided by the number of
        micro-batches, and doesn't divide it again."""
        said = getattr(self, "loss_is_scaled_for_ga", None)
        if said is not None:
            return bool(said)
        counted = self.model_accepts_loss_kwargs and num_items_in_batch is not None
        return counted or self.compute_loss_func is not None
