"""Training batches: augmented demonstration sequences, packed into rows without waste.

Shapes: B rows, R tokens a row.

A sequence is one or more demonstrations of one task under one view. Sample i of a stream is a
pure function of (seed, i), so a stream's whole state is where it stands and which samples wait
for room: that is what makes a resumed run see exactly the same batches.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tiny_onn.arc import tokens
from tiny_onn.arc.augment import SYMMETRIES, apply_symmetry, free_colours
from tiny_onn.arc.tasks import Pair, Task

IGNORED = -100
"""The label of a token that the loss leaves out (the convention of torch and transformers)."""


@dataclass(frozen=True)
class BatchConfig:
    """How sequences are drawn and packed.

    Attributes:
        batch_tokens: tokens a batch, padding included.
        row_tokens: least length of a row; a longer sequence makes longer rows.
        max_pairs: most demonstrations in one sequence; each but the first sees those before it.
        permute_colours: draw a fresh colour permutation for each sequence.
        keep_background: leave colour 0 where it is.
        identity_colours: share of the sequences that keep their own colours all the same.
        difference_weight: extra loss weight of an output token that differs from its input (H2).
    """

    batch_tokens: int = 4096
    row_tokens: int = 128
    max_pairs: int = 1
    permute_colours: bool = True
    keep_background: bool = True
    identity_colours: float = 0.1
    difference_weight: float = 0.0

    def __post_init__(self) -> None:
        for name in ("batch_tokens", "row_tokens", "max_pairs"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1. Got {getattr(self, name)}")
        if not 0 <= self.identity_colours <= 1:
            raise ValueError(f"identity_colours must be in 0-1. Got {self.identity_colours}")
        if self.difference_weight < 0:
            raise ValueError(
                f"difference_weight must not be negative. Got {self.difference_weight}"
            )


@dataclass(frozen=True)
class Batch:
    """Packed rows; every tensor is ``[B, R]``.

    Attributes:
        input_ids: tokens; PAD where a row has room left.
        labels: the token itself where the loss counts it, else -100; not shifted.
        weights: float32 loss weight of each label.
        segment_ids: which sequence of its row a token belongs to, -1 for padding.
        task_ids, symmetry_ids: rows of the model's embeddings.
        real_tokens: how many tokens are not padding.
    """

    input_ids: Tensor
    labels: Tensor
    weights: Tensor
    segment_ids: Tensor
    task_ids: Tensor
    symmetry_ids: Tensor
    real_tokens: int

    def to(self, device: torch.device) -> Batch:
        """The same batch on another device."""
        tensors = {name: v.to(device) for name, v in vars(self).items() if isinstance(v, Tensor)}
        return Batch(**tensors, real_tokens=self.real_tokens)


@dataclass(frozen=True)
class _Sequence:
    """Tokens ``[T]`` and loss weights ``[T]`` (0 where the loss does not look), before colours."""

    ids: np.ndarray
    weights: np.ndarray
    palette: np.ndarray
    task: int
    symmetry: int


class DemonstrationStream:
    """An endless stream of packed batches over the demonstrations of some tasks.

    Only demonstrations are read: a task's test pairs never enter a batch. Every epoch takes each
    demonstration of each task once (as the last of its sequence), in an order of its own.

    Args:
        tasks: the i-th task gets row i of the task embedding.
        config: how to draw and pack.
        seed: the stream is a function of it.
    """

    def __init__(self, tasks: Sequence[Task], config: BatchConfig, seed: int) -> None:
        if not tasks:
            raise ValueError("There are no tasks to train on")
        self.config = config
        self.seed = seed
        self._free = [np.array(free_colours(task, config.keep_background)) for task in tasks]
        self._encoded = [self._encode_task(task) for task in tasks]
        self._targets = [(t, p) for t, task in enumerate(tasks) for p in range(len(task.train))]
        self._order_epoch, self._order = -1, np.empty(0, dtype=np.int64)
        longest = max(self._longest(t) for t in range(len(tasks)))
        self.row_tokens = max(config.row_tokens, -(-longest // 16) * 16)
        self.rows = max(1, config.batch_tokens // self.row_tokens)
        self._next = 0
        self._waiting: list[int] = []

    def state_dict(self) -> dict[str, Any]:
        """Where the stream stands: the next sample, and those that wait for room."""
        return {"next": self._next, "waiting": list(self._waiting)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a state of :meth:`state_dict`."""
        self._next, self._waiting = int(state["next"]), [int(i) for i in state["waiting"]]

    def next_batch(self) -> Batch:
        """Fill the rows from enough samples for all their room: the longest first, each into the
        fullest row that takes it. A sample without room waits for the next batch."""
        room = np.full(self.rows, self.row_tokens)
        rows: list[list[_Sequence]] = [[] for _ in range(self.rows)]
        pool = [(i, self._sample(i)) for i in self._waiting]
        missing = room.sum() - sum(len(sequence.ids) for _, sequence in pool)
        while missing > 0:
            pool.append((self._next, self._sample(self._next)))
            missing -= len(pool[-1][1].ids)
            self._next += 1
        self._waiting = []
        for index, sequence in sorted(pool, key=lambda item: -len(item[1].ids)):
            length = len(sequence.ids)
            row = int(np.where(room >= length, room, np.iinfo(room.dtype).max).argmin())
            if room[row] < length:
                self._waiting.append(index)
                continue
            rows[row].append(sequence)
            room[row] -= length
        return _pack(rows, self.row_tokens)

    def _sample(self, index: int) -> _Sequence:
        """The sequence of sample ``index``: its target pair last, others of its task before it."""
        epoch, place = divmod(index, len(self._targets))
        if epoch != self._order_epoch:
            order_rng = np.random.default_rng((self.seed, 0, epoch))
            self._order_epoch, self._order = epoch, order_rng.permutation(len(self._targets))
        task, target = self._targets[self._order[place]]
        rng = np.random.default_rng((self.seed, 1, index))
        symmetry = int(rng.integers(len(SYMMETRIES)))
        palette = np.arange(tokens.VOCAB_SIZE)
        if self.config.permute_colours and rng.random() >= self.config.identity_colours:
            free = self._free[task]
            palette[free] = rng.permutation(free)
        pairs = self._encoded[task][symmetry]
        others = rng.permutation([p for p in range(len(pairs)) if p != target])
        context = int(rng.integers(min(self.config.max_pairs, len(pairs)))) if len(pairs) > 1 else 0
        chosen = [pairs[p] for p in (*others[:context], target)]
        ids = np.concatenate([ids for ids, _ in chosen])
        weights = np.concatenate([weights for _, weights in chosen])
        return _Sequence(ids, weights, palette, task, symmetry)

    def _encode_task(self, task: Task) -> list[list[tuple[np.ndarray, np.ndarray]]]:
        """Tokens and weights of each demonstration under each symmetry: [symmetry][pair]."""
        return [
            [_encode(_turned(pair, symmetry), self.config.difference_weight) for pair in task.train]
            for symmetry in range(len(SYMMETRIES))
        ]

    def _longest(self, task: int) -> int:
        """The most tokens a sequence of this task can have."""
        return max(
            sum(sorted((len(ids) for ids, _ in pairs), reverse=True)[: self.config.max_pairs])
            for pairs in self._encoded[task]
        )


def _turned(pair: Pair, symmetry: int) -> Pair:
    assert pair.output is not None, "a demonstration has an output"
    return Pair(apply_symmetry(pair.input, symmetry), apply_symmetry(pair.output, symmetry))


def _encode(pair: Pair, difference_weight: float) -> tuple[np.ndarray, np.ndarray]:
    """Tokens of a pair, and their loss weights: 0 outside the output, 1 inside, more where the
    output differs from an input of the same shape (unless all of it, or nothing, does)."""
    ids = tokens.encode_pair(pair)
    weights = tokens.output_mask(ids).astype(np.float32)
    assert pair.output is not None
    if difference_weight and pair.output.shape == pair.input.shape:
        differs = tokens.encode_grid(pair.output) != tokens.encode_grid(pair.input)
        if 0 < differs.sum() < pair.output.size:
            start = len(ids) - 1 - len(differs)
            weights[start : start + len(differs)] += difference_weight * differs
    return ids, weights


def _pack(rows: Sequence[Sequence[_Sequence]], row_tokens: int) -> Batch:
    shape = (len(rows), row_tokens)
    ids = np.full(shape, tokens.PAD)
    weights = np.zeros(shape, dtype=np.float32)
    segments = np.full(shape, -1)
    tasks, symmetries = np.zeros(shape, dtype=np.int64), np.zeros(shape, dtype=np.int64)
    for r, row in enumerate(rows):
        start = 0
        for s, sequence in enumerate(row):
            place = (r, slice(start, start + len(sequence.ids)))
            ids[place] = sequence.palette[sequence.ids]
            weights[place] = sequence.weights
            segments[place] = s
            tasks[place], symmetries[place] = sequence.task, sequence.symmetry
            start += len(sequence.ids)
    return Batch(
        input_ids=torch.from_numpy(ids),
        labels=torch.from_numpy(np.where(weights > 0, ids, IGNORED)),
        weights=torch.from_numpy(weights),
        segment_ids=torch.from_numpy(segments),
        task_ids=torch.from_numpy(tasks),
        symmetry_ids=torch.from_numpy(symmetries),
        real_tokens=int((segments >= 0).sum()),
    )
