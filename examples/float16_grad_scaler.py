"""ARS2-Neo with float16 and a GradScaler, which needs the two halves of a step by themselves.

    python examples/float16_grad_scaler.py

The scaler divides the first pass's gradients, and skips the step if they are not finite; gradients
that are not finite never move the parameters. The second pass is divided by hand, because a scaler
unscales once a step.
"""

import torch
import torch.nn.functional as F
from torch import nn

from tiny_onn.optim import ARS2Neo, param_groups

torch.manual_seed(0)
model = nn.Sequential(nn.Linear(8, 64), nn.GELU(), nn.Linear(64, 1))
optimizer = ARS2Neo(param_groups(model), lr=0.01, sam="adaptive")
scaler = torch.amp.GradScaler("cpu", init_scale=2.0**24, growth_interval=20)
inputs = torch.randn(256, 8)
targets = inputs[:, :1] * inputs[:, 1:2]
losses, skipped = [], 0

for _ in range(120):

    def backward() -> float:
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.float16):
            outputs = model(inputs)
        loss = F.mse_loss(outputs.float(), targets)
        scaler.scale(loss).backward()
        return float(loss.detach())

    losses.append(backward())
    scaler.unscale_(optimizer)
    if optimizer.first_step():
        backward()
        for p in model.parameters():
            p.grad /= scaler.get_scale()
    before = scaler.get_scale()
    scaler.step(optimizer)  # the second half, or nothing if the first pass was not finite
    scaler.update()
    skipped += scaler.get_scale() < before

print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}, {skipped} steps skipped")
assert skipped > 0, "the scale begins so high that the first steps must be skipped"
assert losses[-1] < 0.3 * losses[0]
