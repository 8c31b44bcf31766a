"""Row, column and grid of every token, read off the tokens themselves, and the rotation by them.

Shapes: B batch, T tokens, H heads, C head width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicLayer, StaticLayer
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from tiny_onn.models.configuration_tiny_onn import TinyOnnConfig

LENGTH_DEPENDENT = ("dynamic", "longrope")
"""Kinds of rotary embedding whose frequencies follow the longest position of a call."""


def grid_positions(
    input_ids_BT: Tensor,
    *,
    row_end_token_id: int,
    grid_token_ids: Sequence[int],
    blank_token_ids: Sequence[int] = (),
    segment_ids_BT: Tensor | None = None,
) -> Tensor:
    """Positions ``[3, B, T]`` (row, column, grid) of tokens ``[B, T]``, int64.

    A grid token opens a grid at row 0, column 0. Every other token stands one column after the
    one before it. A row end stands at column 0 of the next row, so that "the next cell" is the
    same step away from every token that predicts one. Blank tokens (padding, the end token) take
    no place: they neither move the column nor count as a grid.

    Args:
        segment_ids_BT: the sequence each token of a packed row belongs to; positions start again
            where it changes.
    """
    is_row_end = input_ids_BT == row_end_token_id
    opens_grid = torch.isin(input_ids_BT, input_ids_BT.new_tensor(list(grid_token_ids)))
    is_cell = ~(is_row_end | opens_grid)
    if blank_token_ids:
        is_cell &= torch.isin(
            input_ids_BT, input_ids_BT.new_tensor(list(blank_token_ids)), invert=True
        )
    starts = None if segment_ids_BT is None else _starts(segment_ids_BT)
    row = _count_since(is_row_end, opens_grid, starts)
    column = _count_since(is_cell, opens_grid | is_row_end, starts)
    grid = (_count_since(opens_grid, None, starts) - 1).clamp_min(0)
    return torch.stack([row, column, grid])


def _starts(segment_ids_BT: Tensor) -> Tensor:
    """Where a packed sequence begins, bool; the row's own beginning needs no mark."""
    starts = torch.zeros_like(segment_ids_BT, dtype=torch.bool)
    starts[:, 1:] = segment_ids_BT[:, 1:] != segment_ids_BT[:, :-1]
    return starts


def _count_since(events_BT: Tensor, resets_BT: Tensor | None, starts_BT: Tensor | None) -> Tensor:
    """How many events there were since the last reset or start, counting the token itself; the
    event of a resetting token is forgotten, that of a starting token counts."""
    count = events_BT.long().cumsum(-1)
    # Counts never fall, so the largest base so far is the one of the last reset or start.
    base = torch.zeros_like(count)
    if starts_BT is not None:
        base = torch.where(starts_BT, count - events_BT.long(), base)
    if resets_BT is not None:
        base = torch.where(resets_BT, count, base)
    return count - base.cummax(-1).values


def seen_tokens(cache: Cache, like_BT: Tensor) -> Tensor:
    """Tokens ``[B, S]`` of the cache's sequences, as far as :func:`tell_tokens` told of them."""
    first = cache.layers[0] if cache.layers else None
    if isinstance(first, _TellsTokens) and first.seen_input_ids.shape[1]:
        return first.seen_input_ids
    return like_BT[:, :0]


def can_be_told(cache: Cache) -> bool:
    """Whether :func:`tell_tokens` works for the cache."""
    return not cache.layers or type(cache.layers[0]) in (*_TOLD, *_TOLD.values())


def tell_tokens(cache: Cache, input_ids_BT: Tensor) -> None:
    """Tell a cache which tokens its layers have just seen; nothing if they keep none."""
    told = torch.cat([seen_tokens(cache, input_ids_BT), input_ids_BT], dim=1)
    if int(cache.get_seq_length()) != told.shape[1] or not can_be_told(cache):
        return
    first = cache.layers[0]
    if not isinstance(first, _TellsTokens):
        cache.layers[0] = object.__new__(_TOLD[type(first)])
        vars(cache.layers[0]).update(vars(first))
    cache.layers[0].seen_input_ids = told


class _TellsTokens:
    """What a layer of a cache learns: whatever reorders, repeats, drops or crops its sequences does
    so to their tokens ``[B, S]``."""

    seen_input_ids: Tensor

    def reset(self) -> None:
        super().reset()  # type: ignore[misc]
        self.seen_input_ids = self.seen_input_ids[:, :0]

    def crop(self, tokens: int) -> None:
        super().crop(tokens)  # type: ignore[misc]
        self.seen_input_ids = self.seen_input_ids[:, : int(self.get_seq_length())]  # type: ignore[attr-defined]

    def reorder_cache(self, beam_idx: Tensor) -> None:
        super().reorder_cache(beam_idx)  # type: ignore[misc]
        self.seen_input_ids = self.seen_input_ids[beam_idx.to(self.seen_input_ids.device)]

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)  # type: ignore[misc]
        self.seen_input_ids = self.seen_input_ids[indices]

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)  # type: ignore[misc]
        self.seen_input_ids = self.seen_input_ids.repeat_interleave(repeats, dim=0)


class _ToldDynamicLayer(_TellsTokens, DynamicLayer):
    pass


class _ToldStaticLayer(_TellsTokens, StaticLayer):
    pass


_TOLD: dict[type, type] = {DynamicLayer: _ToldDynamicLayer, StaticLayer: _ToldStaticLayer}


def rotate(x_BHTC: Tensor, cos_BTC: Tensor, sin_BTC: Tensor) -> Tensor:
    """Rotate each pair (first half, second half) of the heads by the angles of its token."""
    cos, sin = (angles[:, None].to(x_BHTC.dtype) for angles in (cos_BTC, sin_BTC))
    if torch.compiler.is_compiling():
        first, second = x_BHTC.chunk(2, dim=-1)
        return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
    if torch.is_grad_enabled():
        return _Rotate.apply(x_BHTC, cos, sin)
    return _rotated(x_BHTC, cos, sin, 1)


class _Rotate(torch.autograd.Function):
    """The rotation, written straight to its place; its gradient is the rotation back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _rotated(x, cos, sin, 1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _rotated(grad, cos, sin, -1), None, None


def _rotated(x: Tensor, cos: Tensor, sin: Tensor, sign: int) -> Tensor:
    turned = torch.empty_like(x)
    first, second = x.chunk(2, dim=-1)
    new_first, new_second = turned.chunk(2, dim=-1)
    torch.mul(first, cos, out=new_first).addcmul_(second, sin, value=-sign)
    torch.mul(second, cos, out=new_second).addcmul_(first, sin, value=sign)
    return turned


class TinyOnnRotaryEmbedding(nn.Module):
    """Cosines and sines ``[B, T, C/2]`` of positions along one axis or three.

    With ``position_type="grid"`` the C/2 rotated pairs are divided among row, column and grid in
    the ratio 3 : 3 : 2, each with its own geometric ladder of frequencies.
    """

    def __init__(self, config: TinyOnnConfig) -> None:
        super().__init__()
        pairs = config.head_width // 2
        along = max(1, pairs * 3 // 8)
        grid = config.position_type == "grid"
        self.pairs_per_axis = (along, along, pairs - 2 * along) if grid else (pairs,)
        self.config = config
        config.check_rope()

    def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Angles, in the dtype of ``x``, for positions ``[B, T]`` or ``[axes, B, T]``.

        Raises:
            ValueError: for positions of another shape.
        """
        angles, scaling = [], 1.0
        for position, pairs in zip(self._by_axis(position_ids), self.pairs_per_axis, strict=True):
            frequencies, scaling = self._frequencies(pairs, position)
            angles.append(position[..., None].float() * frequencies)
        angles_BTC = torch.cat(angles, dim=-1)
        return (angles_BTC.cos() * scaling).to(x.dtype), (angles_BTC.sin() * scaling).to(x.dtype)

    def _by_axis(self, position_ids: Tensor) -> Tensor:
        """Positions as ``[axes, B, T]``; a single axis stands for the columns of a grid model."""
        axes = len(self.pairs_per_axis)
        if position_ids.ndim == 3 and len(position_ids) == axes:
            return position_ids
        if position_ids.ndim != 2:
            raise ValueError(
                f"position_ids must have shape [B, T] or [{axes}, B, T] with position_type="
                f"{self.config.position_type!r}. Got {list(position_ids.shape)}"
            )
        if axes == 1:
            return position_ids[None]
        zeros = torch.zeros_like(position_ids)
        return torch.stack([zeros, position_ids, zeros])

    def _frequencies(self, pairs: int, position: Tensor) -> tuple[Tensor, float]:
        """Angles of a single step ``[pairs]``, and what the library scales cosine and sine by."""
        kind = (self.config.rope_parameters or {}).get("rope_type", "default")
        if kind != "default":
            longest = int(position.max()) + 1 if kind in LENGTH_DEPENDENT else None
            return ROPE_INIT_FUNCTIONS[kind](self.config, position.device, seq_len=longest)
        steps = torch.arange(pairs, device=position.device, dtype=torch.float32) / pairs
        return self.config.rope_theta**-steps, 1.0
