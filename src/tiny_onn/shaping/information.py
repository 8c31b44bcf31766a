"""How far distributions are from each other, and what one choice tells of another.

Shapes: G groups, E experts; all functions take leading dimensions.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def jensen_shannon_distance(p: Tensor, q: Tensor) -> Tensor:
    """The square root of the Jensen-Shannon divergence in base 2, which is a metric in [0, 1].

    Args:
        p, q: probabilities ``[..., E]``, float.

    Returns:
        ``[...]``; exactly 0 for equal distributions, 1 for those that share nothing.
    """
    # With m = (p + q) / 2 and x = (p - q) / (p + q), each expert gives
    # m/2 [(1 + x) log(1 + x) + (1 - x) log(1 - x)]: no difference of large entropies, so that
    # float32 will do down to distances of 1e-4 and below.
    mean = (p + q) / 2
    x = ((p - q) / 2 / mean).where(mean > 0, 0.0).clamp(-1, 1)
    terms = torch.special.xlog1py(1 + x, x) + torch.special.xlog1py(1 - x, -x)
    return ((mean * terms).sum(-1) / (2 * math.log(2))).clamp(0, 1).sqrt()


def mutual_information(counts: Tensor) -> Tensor:
    """The mutual information, in bits, of two choices that were counted together.

    The plug-in estimate ``H(E) + H(G) - H(E, G)`` of two independent choices isn't 0 but, for n
    counts, about ``(G - 1)(E - 1) / (2 n ln 2)``. Each entropy is therefore corrected for its
    m occupied cells by ``(m - 1) / (2 n ln 2)`` (Miller and Madow), and the result kept between 0
    and the smaller of the plug-in entropies H(E) and H(G), which none can exceed. What is left of
    the bias is of order 1/n^2 for independent counts; where they aren't independent (neighbouring
    tokens are alike), n is smaller than it looks and some of it stays.

    Args:
        counts: ``[..., G, E]``, of any dtype.

    Returns:
        ``[...]``, NaN where nothing was counted.
    """
    wide = counts.to(torch.float32 if counts.device.type == "mps" else torch.float64)
    n = wide.sum((-1, -2))
    joint = wide / n[..., None, None]

    def entropy(p: Tensor) -> tuple[Tensor, Tensor]:
        return torch.special.entr(p).sum(-1), ((p > 0).sum(-1) - 1) / (2 * n)

    (h_group, more_group), (h_expert, more_expert), (h_joint, more_joint) = (
        entropy(p) for p in (joint.sum(-1), joint.sum(-2), joint.flatten(-2))
    )
    found = (h_group + more_group) + (h_expert + more_expert) - (h_joint + more_joint)
    return torch.minimum(found, torch.minimum(h_group, h_expert)).clamp_min(0) / math.log(2)
