"""The training forward and backward as one graph."""

from __future__ import annotations

import pytest
import torch
from model_helpers import MakeModel, MakeTokens


# torch's own tracer instantiates the autograd functions it meets, and warns of that.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("position_type", ["grid", "sequence"])
def test_the_training_step_is_one_graph(
    make_model: MakeModel, make_tokens: MakeTokens, attention: str, position_type: str
) -> None:
    """With grouped experts; the backend traces forward and backward and runs them as they are."""
    model = make_model(position_type=position_type).train()
    model.set_attn_implementation(attention)
    ids = make_tokens(2, 32)
    # Packed rows give the mask a path of its own; without them the library makes it.
    segments = torch.arange(32).expand(2, -1) // 16
    found = []
    for forward in (model, torch.compile(model, fullgraph=True, backend="aot_eager")):
        model.zero_grad()
        outputs = forward(
            input_ids=ids,
            labels=ids,
            segment_ids=segments,
            use_cache=False,
            output_router_logits=True,
        )
        outputs.loss.backward()
        gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]
        found.append([outputs.loss.detach(), *outputs.router_logits, *gradients])
    torch._dynamo.reset()
    for a, b in zip(*found, strict=True):
        # The same sums in another order, in float32.
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
