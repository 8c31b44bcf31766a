"""The ARC loss against a plain loop."""

import math

import torch

from tiny_onn.arc.losses import arc_loss, shift, token_accuracy


def test_the_loss_is_the_weighted_mean_of_next_token_losses():
    torch.manual_seed(0)
    logits = torch.randn(2, 5, 7, dtype=torch.float64)
    labels = torch.tensor([[3, -100, 2, 6, -100], [-100, -100, -100, 0, 1]])
    weights = torch.rand(2, 5)
    total, mass, right = 0.0, 0.0, []
    for b in range(2):
        for t in range(4):
            label = int(labels[b, t + 1])
            if label >= 0:
                row = logits[b, t].tolist()
                loss = math.log(sum(math.exp(x) for x in row)) - row[label]
                total += float(weights[b, t + 1]) * loss
                mass += float(weights[b, t + 1])
                right.append(row.index(max(row)) == label)
    predictions = shift(logits, labels, weights)
    assert len(predictions.labels) == 4, "the first token has nothing to be predicted from"
    assert math.isclose(arc_loss(predictions).item(), total / mass, rel_tol=1e-5)
    assert math.isclose(token_accuracy(predictions).item(), sum(right) / 4, rel_tol=1e-6)


def test_nothing_to_predict_is_a_zero_with_a_gradient():
    logits = torch.randn(1, 3, 4, requires_grad=True)
    loss = arc_loss(shift(logits, torch.full((1, 3), -100), torch.zeros(1, 3)))
    loss.backward()
    assert loss.item() == 0.0 and logits.grad.abs().sum() == 0
