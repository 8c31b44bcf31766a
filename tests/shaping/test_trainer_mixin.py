"""Shaping inside ``transformers.Trainer``: its loss, its scaling, its log and its optimizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from moe_models import VOCAB, E, gradients, make_model, routed
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainingArguments

from tiny_onn.shaping import RoutingShapingMixin

LENGTH = 6


class ShapedTrainer(RoutingShapingMixin, Trainer):
    pass


def make_data(rows: int = 8) -> list[dict[str, Tensor]]:
    tokens = torch.randint(3, VOCAB, (rows, LENGTH), generator=torch.Generator().manual_seed(1))
    mask = torch.ones(LENGTH, dtype=torch.long)
    return [{"input_ids": row, "labels": row, "attention_mask": mask} for row in tokens]


@pytest.fixture
def make_trainer(tmp_path: Path) -> Any:
    def make(model: nn.Module | None = None, shaping: Any = None, **options: Any) -> ShapedTrainer:
        inits = {key: options.pop(key) for key in ("model_init", "callbacks") if key in options}
        settings = {
            "max_steps": 3,
            "per_device_train_batch_size": 4,
            "logging_steps": 1,
            "learning_rate": 1e-2,
            "save_strategy": "no",
        }
        arguments = TrainingArguments(
            str(tmp_path),
            use_cpu=True,
            report_to=[],
            disable_tqdm=True,
            dataloader_pin_memory=False,
            **settings | options,
        )
        data = make_data()
        return ShapedTrainer(
            model, arguments, train_dataset=data, eval_dataset=data, shaping=shaping, **inits
        )

    return make


def logged(trainer: Trainer, key: str) -> list[float]:
    return [row[key] for row in trainer.state.log_history if key in row]


@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss", "tiny_onn"])
def test_the_loss_is_added_and_logged(name: str, make_trainer: Any) -> None:
    plain = make_trainer(make_model(name), {"strategy": "none"}, max_steps=1)
    plain.train()
    trainer = make_trainer(make_model(name), {"w_meta": 0.5}, max_steps=1)
    trainer.train()
    (term,) = logged(trainer, "shaping_loss")
    assert term > 0.1
    (main,), (total,) = logged(plain, "loss"), logged(trainer, "loss")
    assert total == pytest.approx(main + term, rel=1e-5)
    assert logged(plain, "shaping_loss") == [0.0]


def test_costs_are_read_from_the_optimizer_that_is_stepped(make_trainer: Any) -> None:
    costs = []

    class Watch(TrainerCallback):
        def on_step_end(self, *_: Any, **kwargs: Any) -> None:
            shaper, raw = trainer.shaping.shaper, kwargs["optimizer"].optimizer
            costs.append(torch.stack(shaper.strategies["fars"].costs(shaper.sites, raw)))

    model = make_model("mixtral")
    trainer = make_trainer(model, callbacks=[Watch()])
    trainer.train()
    assert all(cost.std() > 1e-3 for cost in costs)
    assert not torch.equal(costs[0], costs[1])
    v = [
        torch.cat(
            [
                trainer.optimizer.optimizer.state[p]["exp_avg_sq"].sqrt().flatten(1)
                for p in experts.parameters()
            ],
            dim=1,
        ).mean(1)
        for _, experts in routed(model)
    ]
    torch.testing.assert_close(costs[-1], torch.stack([c / c.mean() for c in v]))
    assert len(costs[-1][0]) == E


@pytest.mark.parametrize("counts_labels", [True, False])
def test_accumulation_gives_the_gradient_of_the_whole_batch(
    counts_labels: bool, make_trainer: Any
) -> None:
    found = {}

    class Keep(TrainerCallback):
        def on_pre_optimizer_step(self, args: TrainingArguments, *_: Any, **kwargs: Any) -> None:
            found[args.gradient_accumulation_steps] = gradients(kwargs["model"])

    for steps in (1, 4):
        trainer = make_trainer(
            make_model("olmoe"),
            {"w_meta": 1.0},
            max_steps=1,
            gradient_accumulation_steps=steps,
            per_device_train_batch_size=8 // steps,
            max_grad_norm=0.0,
            callbacks=[Keep()],
        )
        trainer.model_accepts_loss_kwargs = counts_labels
        trainer.train()
        assert logged(trainer, "shaping_loss")[0] > 0.1
    for key, grad in found[1].items():
        torch.testing.assert_close(found[4][key], grad, rtol=1e-4, atol=1e-6, msg=key)


def test_micro_batches_are_logged_as_their_mean(make_trainer: Any) -> None:
    class Count:
        calls = 0

        def loss(self, routes: Any) -> Tensor:
            self.calls += 1
            return routes.logits[0].sum() * 0 + self.calls

    trainer = make_trainer(
        make_model("olmoe"),
        {"strategy": Count(), "w_meta": 1.0},
        gradient_accumulation_steps=2,
        per_device_train_batch_size=2,
    )
    trainer.train()
    assert logged(trainer, "shaping_loss") == [1.5, 3.5, 5.5]


@pytest.mark.parametrize("parts", [1, 2])
def test_the_weight_of_the_cost_follows_the_main_loss(parts: int, make_trainer: Any) -> None:
    """``"auto"``, a share of the loss of a whole update however it is divided; and where a
    checkpoint is resumed, the weight is that of the run that saved it."""
    options = {"cost_alpha": "auto", "share": 0.05, "auto_updates": 2, "w_entropy": 0.0}
    settings = {"gradient_accumulation_steps": parts, "per_device_train_batch_size": 8 // parts}
    trainer = make_trainer(make_model("olmoe"), options, save_strategy="steps", **settings)
    trainer.train()
    total, term = logged(trainer, "loss"), logged(trainer, "shaping_loss")
    assert term[0] / (total[0] - term[0]) == pytest.approx(0.05, rel=1e-2)
    alpha = trainer.shaping.shaper.diagnostics["cost_alpha"]
    again = make_trainer(make_model("olmoe"), options, max_steps=4, **settings)
    again.train(resume_from_checkpoint=str(Path(trainer.args.output_dir) / "checkpoint-3"))
    assert again.shaping.shaper.diagnostics["cost_alpha"] == alpha
    assert not again.shaping.shaper.needs_main_loss


def test_sars_reads_the_main_loss_in_a_trainer(make_trainer: Any) -> None:
    trainer = make_trainer(make_model("tiny_onn"), {"strategy": "sars"})
    trainer.train()
    terms = logged(trainer, "shaping_loss")
    assert len(set(terms)) == 3 and all(0 < term < 1 for term in terms)


def test_a_loss_that_says_it_is_scaled_is_believed(make_trainer: Any) -> None:
    trainer = make_trainer(make_model("olmoe"))
    for said in (True, False):
        trainer.loss_is_scaled_for_ga = said
        assert trainer._is_scaled(num_items_in_batch=None) is said
    trainer.loss_is_scaled_for_ga = None
    assert trainer._is_scaled(torch.tensor(3)) and not trainer._is_scaled(None)


def test_evaluation_is_the_models_own_loss(make_trainer: Any) -> None:
    model = make_model("qwen3_moe")
    trainer = make_trainer(model, {"w_meta": 5.0}, eval_strategy="steps", eval_steps=1)
    trainer.train()
    assert len(logged(trainer, "eval_loss")) == 3 == len(logged(trainer, "shaping_loss"))
    batch = {key: torch.stack([row[key] for row in make_data()]) for key in make_data()[0]}
    with torch.no_grad():
        expected = model.eval()(**batch).loss.item()
    assert logged(trainer, "eval_loss")[-1] == pytest.approx(expected, rel=1e-4)


# The new name of what transformers before 5.23 calls gradient_checkpointing.
CHECKPOINTING = "activation_checkpointing"
if not hasattr(TrainingArguments, CHECKPOINTING):
    CHECKPOINTING = "gradient_checkpointing"


@pytest.mark.parametrize("option", ["bf16", CHECKPOINTING])
def test_what_trainer_can_do_to_a_forward(option: str, make_trainer: Any) -> None:
    terms = []
    for extra in ({}, {option: True}):
        trainer = make_trainer(make_model("deepseek_v3"), {"w_meta": 1.0}, **extra)
        trainer.train()
        terms.append(logged(trainer, "shaping_loss"))
    assert terms[0] == pytest.approx(terms[1], rel=0.02)


def test_a_model_that_is_made_in_training_is_shaped(make_trainer: Any) -> None:
    trainer = make_trainer(model_init=lambda: make_model("mixtral"))
    first = trainer.shaping
    trainer.train()
    assert trainer.shaping is not first and trainer.shaping.model is trainer.model
    assert len(logged(trainer, "shaping_loss")) == 3
    with pytest.raises(ValueError, match="hooks aren't removed"):
        first.model(input_ids=torch.ones(1, 3, dtype=torch.long))
        first.loss()


def test_a_model_without_experts_is_refused_when_the_trainer_is_made(make_trainer: Any) -> None:
    with pytest.raises(ValueError, match="Linear has no routed site"):
        make_trainer(nn.Linear(2, 2))


def test_data_parallel_is_refused(make_trainer: Any) -> None:
    trainer = make_trainer(make_model("mixtral"))
    trainer.args._n_gpu = 2
    batch = {"input_ids": torch.ones(1, 3, dtype=torch.long)}
    with pytest.raises(ValueError, match="one process a GPU .* over 2 GPUs"):
        trainer.compute_loss(trainer.model.train(), batch)


def test_outputs_are_returned_where_asked_for(make_trainer: Any) -> None:
    trainer = make_trainer(make_model("mixtral"))
    batch = {key: value[None] for key, value in make_data()[0].items()}
    trainer.create_optimizer()
    loss, outputs = trainer.compute_loss(trainer.model.train(), batch, return_outputs=True)
    assert loss > outputs.loss and outputs.logits.shape == (1, LENGTH, VOCAB)
