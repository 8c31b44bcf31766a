"""FARS in place of the auxiliary loss of a Qwen3-MoE, through ``transformers.Trainer``.

The model is tiny and random, the data are sums modulo 24 in which the first token says what is
added each time.

    python examples/qwen3_moe_fars.py
"""

import tempfile

import torch
from transformers import (
    PrinterCallback,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    Trainer,
    TrainingArguments,
    set_seed,
)

from tiny_onn.shaping import RoutingShapingMixin, routing_statistics

set_seed(0)
# With output_router_logits=True the model would add its own auxiliary loss; the default is False.
config = Qwen3MoeConfig(
    vocab_size=24,
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=2,
    head_dim=16,
    num_experts=8,
    num_experts_per_tok=2,
    moe_intermediate_size=32,
    eos_token_id=None,
)
model = Qwen3MoeForCausalLM(config)

step, start = torch.randint(1, 24, (2, 1024, 1))
tokens = torch.cat([step, (start + step * torch.arange(11)) % 24], dim=1)
rows = [{"input_ids": row, "labels": row, "attention_mask": torch.ones_like(row)} for row in tokens]


class ShapedTrainer(RoutingShapingMixin, Trainer):
    """A Trainer whose loss shapes the routes, too."""


def routes() -> float:
    """Entropy of the load over experts, over that of an even load."""
    with torch.no_grad():
        logits = model(input_ids=tokens[:128], output_router_logits=True).router_logits
    return routing_statistics(logits, config.num_experts_per_tok).load_entropy


before = routes()
with tempfile.TemporaryDirectory() as folder:
    arguments = TrainingArguments(
        folder,
        max_steps=200,
        per_device_train_batch_size=32,
        learning_rate=5e-3,
        logging_steps=20,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        dataloader_pin_memory=False,
        disable_tqdm=True,
    )
    trainer = ShapedTrainer(model, arguments, train_dataset=rows, shaping={"strategy": "fars"})
    trainer.remove_callback(PrinterCallback)
    trainer.train()

logs = [row for row in trainer.state.log_history if "shaping_loss" in row]
losses, terms = ([row[key] for row in logs] for key in ("loss", "shaping_loss"))
print(f"loss {losses[0]:.2f} -> {losses[-1]:.2f}, of it shaping {terms[0]:.3f} -> {terms[-1]:.3f}")
print(f"load entropy {before:.2f} -> {routes():.2f}, 1 is an even load")
assert losses[-1] < 0.5 * losses[0]
assert terms[-1] < terms[0]
assert routes() > 0.5, "the load must not collapse to few experts"
