"""ARS2-Neo under accelerate, alone or in several processes.

    python examples/accelerate_loop.py
    torchrun --nproc_per_node 2 examples/accelerate_loop.py

accelerate's own ``optimizer.step(closure)`` drops the loss, and would skip unscaling with float16:
step the raw optimizer, and use bfloat16.
"""

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from tiny_onn.optim import ARS2Neo, param_groups

accelerator = Accelerator(cpu=True, mixed_precision="bf16")
set_seed(0)
model = nn.Sequential(nn.Linear(8, 64), nn.GELU(), nn.Linear(64, 1))
inputs = torch.randn(512, 8)
data = TensorDataset(inputs, inputs[:, :1] * inputs[:, 1:2])
group = torch.distributed.group.WORLD if accelerator.num_processes > 1 else None
optimizer = ARS2Neo(param_groups(model), lr=0.01, sam="adaptive", process_group=group)
loader = DataLoader(data, batch_size=64, shuffle=True)
model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
losses = []

for _ in range(16):
    for x, y in loader:

        def closure(x: torch.Tensor = x, y: torch.Tensor = y) -> torch.Tensor:
            optimizer.zero_grad()
            loss = F.mse_loss(model(x).float(), y)
            accelerator.backward(loss)
            accelerator.clip_grad_norm_(model.parameters(), 1.0)
            return loss.detach()

        losses.append(float(optimizer.optimizer.step(closure)))

if accelerator.is_main_process:
    print(f"{accelerator.num_processes} processes, loss {losses[0]:.3f} -> {losses[-1]:.3f}")
assert losses[-1] < 0.3 * losses[0]
syncs = torch.tensor([optimizer.optimizer.diagnostics["syncs"]])
assert len(set(accelerator.gather(syncs).tolist())) == 1, "all processes take the same decisions"
accelerator.wait_for_everyone()
accelerator.end_training()
