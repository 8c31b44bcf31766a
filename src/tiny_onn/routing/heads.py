"""Attention heads as experts (mixture of attention heads, arXiv:2210.05144): an expert is a few
query heads and their part of the output projection; keys and values are shared by all.

Shapes: N tokens, D hidden size, E experts, K chosen per token, W width of one expert's heads.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from tiny_onn.routing.dispatch import Gather, Sum, Unsort, sort
from tiny_onn.routing.experts import (
    Experts,
    Implementation,
    all_products,
    check_sizes,
    compute_dtype,
    sum_of_products,
)

Attend = Callable[[Tensor], Tensor]
"""Maps the chosen experts' queries ``[N, K, W]`` to what they read, of the same shape."""


class RoutedHeads(Experts):
    """E experts for the two ends of an attention block, with the attention between them.

    A token asks with the queries of its K chosen experts and mixes the outputs of these experts. As
    the keys are the same for all experts, it doesn't matter which of the K places an expert takes.
    With heads of ``D / K`` an expert, a routed block costs what a plain one does.

    Args:
        num_experts: E; hidden_size: D; head_size: W.
        implementation: see :class:`~tiny_onn.routing.experts.Experts`.
    """

    def __init__(
        self,
        num_experts: int,
        hidden_size: int,
        head_size: int,
        implementation: Implementation = "auto",
    ) -> None:
        check_sizes(num_experts=num_experts, hidden_size=hidden_size, head_size=head_size)
        super().__init__(num_experts, hidden_size, head_size, hidden_size, implementation)
        self.head_size = head_size
        self.q_proj = nn.Parameter(torch.empty(num_experts, head_size, hidden_size))
        self.o_proj = nn.Parameter(torch.empty(num_experts, hidden_size, head_size))
        self.reset_parameters()

    def forward(self, x: Tensor, indices: Tensor, weights: Tensor, attend: Attend) -> Tensor:
        """Ask with the chosen experts' queries, and mix their outputs.

        Args:
            x: tokens ``[N, D]``.
            indices: the chosen experts, int64 ``[N, K]``.
            weights: their mixing weights ``[N, K]``; they carry the router's gradient.
            attend: the attention between queries and outputs.

        Returns:
            ``[N, D]`` in the compute dtype (the autocast dtype where autocast is on).
        """
        x = x.to(compute_dtype(x))
        q_proj, o_proj = self.q_proj.to(x.dtype), self.o_proj.to(x.dtype)

        def read(queries_NKW: Tensor) -> Tensor:
            # Weighed before the output projection, which is wider than the heads.
            return attend(queries_NKW).to(x.dtype) * weights[:, :, None].to(x.dtype)

        plan = self.plan(x, indices)
        if plan is None:
            queries_ENW = all_products(x, q_proj)
            place_KNW = indices.t()[:, :, None].expand(-1, -1, q_proj.shape[1])
            read_NKW = read(queries_ENW.gather(0, place_KNW).transpose(0, 1))
            zeros_ENW = torch.zeros_like(queries_ENW)
            read_ENW = zeros_ENW.scatter(0, place_KNW, read_NKW.transpose(0, 1))
            return sum_of_products(read_ENW, o_proj)
        (token, slot, offsets), linear = plan
        queries_PW = linear(Gather.apply(x, token, slot), q_proj, offsets)
        read_PW = sort(read(Unsort.apply(queries_PW, slot)), slot, len(token))
        return Sum.apply(linear(read_PW, o_proj, offsets), token, slot)

    def extra_repr(self) -> str:
        return f"{self.num_experts} x heads of {self.head_size}, {self.hidden_size} wide"
