"""ARS2-Neo in a loop of your own: bfloat16 autocast, accumulation over micro-batches, clipping, a
learning-rate schedule, and a checkpoint that goes on bit for bit.

    python examples/own_loop.py
"""

import io

import torch
import torch.nn.functional as F
from torch import nn

from tiny_onn.optim import ARS2Neo, param_groups

torch.manual_seed(0)
model = nn.Sequential(nn.Linear(8, 64), nn.GELU(), nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 2))
optimizer = ARS2Neo(param_groups(model), lr=0.01, sam="adaptive")
schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=100)
inputs = torch.randn(512, 8)
targets = torch.stack([inputs[:, 0] * inputs[:, 1], inputs[:, 2].sin()], dim=1)


def step(batch: torch.Tensor) -> float:
    def closure() -> torch.Tensor:
        """Everything that makes the gradient; it runs again where a second pass is due."""
        optimizer.zero_grad()
        total = torch.zeros(())
        for part in batch.chunk(4):
            with torch.autocast("cpu", torch.bfloat16):
                outputs = model(inputs[part])
            loss = F.mse_loss(outputs.float(), targets[part]) / 4
            loss.backward()
            total += loss.detach()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        return total

    loss = optimizer.step(closure)
    schedule.step()
    return float(loss)


losses = [step(torch.randint(512, (128,))) for _ in range(50)]
checkpoint = io.BytesIO()
torch.save([x.state_dict() for x in (model, optimizer, schedule)], checkpoint)
random_state = torch.get_rng_state()
losses += [step(torch.randint(512, (128,))) for _ in range(50)]

checkpoint.seek(0)
for part, state in zip((model, optimizer, schedule), torch.load(checkpoint), strict=True):
    part.load_state_dict(state)
torch.set_rng_state(random_state)
again = [step(torch.randint(512, (128,))) for _ in range(50)]

print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}, sync rate {optimizer.diagnostics['sync_rate']}")
assert losses[-1] < 0.3 * losses[0]
assert again == losses[50:], "a run that goes on from a checkpoint has the same losses"
