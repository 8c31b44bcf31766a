"""The ARC loss: weighted next-token cross-entropy on output grids.

Shapes: B rows, T tokens, V vocabulary.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Predictions(NamedTuple):
    """Logits and what they should have been, shifted against each other once, here.

    Attributes:
        logits: ``[P, V]`` of the P predicted tokens, float32.
        labels: ``[P]``; weights: ``[P]`` float32, their weight in the loss.
    """

    logits: Tensor
    labels: Tensor
    weights: Tensor


def shift(logits_BTV: Tensor, labels_BT: Tensor, weights_BT: Tensor) -> Predictions:
    """Pair the logits at token t with the label at token t + 1, and keep what the loss counts.

    Labels are not shifted by the caller; the label -100 leaves a token out. A label never
    belongs to another packed sequence than its logits, because a sequence's first token has none.
    """
    predicted = labels_BT[:, 1:] != -100
    return Predictions(
        logits_BTV[:, :-1][predicted].float(),
        labels_BT[:, 1:][predicted],
        weights_BT[:, 1:][predicted],
    )


def arc_loss(predictions: Predictions) -> Tensor:
    """Weighted mean cross-entropy in nats a token; a zero with a gradient if nothing is predicted.

    With ``difference_weight`` above 0 the weights are those of H2, the adaptive differential loss.
    """
    losses = F.cross_entropy(predictions.logits, predictions.labels, reduction="none")
    return (losses * predictions.weights).sum() / predictions.weights.sum().clamp_min(1e-9)


@torch.no_grad()
def token_accuracy(predictions: Predictions) -> Tensor:
    """Share of the predicted tokens whose logits are largest at the label, a scalar tensor."""
    return (predictions.logits.argmax(-1) == predictions.labels).float().mean()
