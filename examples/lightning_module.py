"""ARS2-Neo under Lightning's automatic optimization, which hands the optimizer a closure.

python examples/lightning_module.py
"""

import logging

import pytorch_lightning as lightning
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from tiny_onn.optim import ARS2Neo, param_groups

logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)


class Regression(lightning.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.model = nn.Sequential(nn.Linear(8, 64), nn.GELU(), nn.Linear(64, 1))
        self.losses: list[float] = []
        self.passes = 0

    def training_step(self, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        x, y = batch
        loss = F.mse_loss(self.model(x), y)
        self.losses.append(float(loss.detach()))
        self.passes += 1
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return ARS2Neo(param_groups(self.model), lr=0.01, sam="adaptive")


lightning.seed_everything(0, verbose=False)
inputs = torch.randn(512, 8)
loader = DataLoader(TensorDataset(inputs, inputs[:, :1] * inputs[:, 1:2]), batch_size=64)
module = Regression()
trainer = lightning.Trainer(
    max_epochs=16,
    accelerator="cpu",
    gradient_clip_val=1.0,
    logger=False,
    enable_checkpointing=False,
    enable_progress_bar=False,
    enable_model_summary=False,
)
trainer.fit(module, loader)
steps = trainer.global_step
print(
    f"loss {module.losses[0]:.3f} -> {module.losses[-1]:.3f}, {module.passes} passes, {steps} steps"
)
assert module.losses[-1] < 0.3 * module.losses[0]
assert module.passes > steps == 128, "second passes ran, and were not counted as steps"
