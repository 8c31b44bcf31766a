"""Batches: nothing lost, nothing leaked, little padding, and a stream that can go on."""

from collections import Counter

import numpy as np
import pytest
import torch

from tiny_onn.arc import load_tasks, tokens
from tiny_onn.arc.augment import View, free_colours
from tiny_onn.arc.batches import BatchConfig, DemonstrationStream
from tiny_onn.arc.tasks import Pair, Task


@pytest.fixture(scope="module")
def tasks():
    return list(load_tasks("arcagi", max_cells=25))


def sequences(batch):
    """(task, symmetry, tokens, labels) of every sequence of a batch."""
    for row in range(len(batch.input_ids)):
        for segment in range(int(batch.segment_ids[row].max()) + 1):
            place = batch.segment_ids[row] == segment
            ids = batch.input_ids[row][place].numpy()
            view = (int(batch.task_ids[row][place][0]), int(batch.symmetry_ids[row][place][0]))
            yield *view, ids, batch.labels[row][place].numpy()


def grids_of(ids):
    """Input and output grid of a sequence of one pair."""
    start = int(np.flatnonzero(ids == tokens.OUTPUT)[0])
    before = tokens.decode_grid(np.append(ids[1:start], tokens.END))
    return before, tokens.decode_grid(ids[start + 1 :])


def test_padding_is_under_five_percent_at_the_demos_sizes(tasks):
    stream = DemonstrationStream(tasks, BatchConfig(), seed=0)
    batches = [stream.next_batch() for _ in range(50)]
    real = sum(batch.real_tokens for batch in batches)
    assert all(batch.input_ids.shape == (32, 128) for batch in batches)
    assert real / (50 * 4096) > 0.95
    assert real == sum(int((batch.input_ids != tokens.PAD).sum()) for batch in batches)


def test_every_demonstration_comes_once_an_epoch(tasks):
    some = tasks[:12]
    config = BatchConfig(batch_tokens=512, permute_colours=False)
    stream = DemonstrationStream(some, config, seed=0)
    seen: Counter[tuple[int, int]] = Counter()
    drawn = 0
    while drawn < 40 * len(some):
        for task, symmetry, ids, _ in sequences(stream.next_batch()):
            drawn += 1
            before, after = grids_of(ids)
            view = View(symmetry)
            found = [
                i
                for i, pair in enumerate(some[task].train)
                if np.array_equal(view.apply(pair.input), before)
                and np.array_equal(view.apply(pair.output), after)
            ]
            assert found, "a sequence that is no view of a demonstration of its task"
            seen[task, found[0]] += 1
    pairs = sum(len(task.train) for task in some)
    assert len(seen) == pairs
    assert max(seen.values()) - min(seen.values()) <= 2


def test_colours_change_together_and_fixed_ones_stay(tasks):
    stream = DemonstrationStream(tasks, BatchConfig(identity_colours=0.0), seed=0)
    changed = 0
    for _ in range(3):
        for task, symmetry, ids, _ in sequences(stream.next_batch()):
            before, after = grids_of(ids)
            turned = View(symmetry)
            fits = []
            for pair in tasks[task].train:
                mapping: dict[int, int] = {}
                old = (turned.apply(pair.input), turned.apply(pair.output))
                if old[0].shape != before.shape or old[1].shape != after.shape:
                    continue
                both = zip(np.append(*map(np.ravel, old)), np.append(before, after), strict=True)
                if all(mapping.setdefault(int(a), int(b)) == b for a, b in both):
                    fits.append(mapping)
            assert fits, "no demonstration has these grids under one permutation"
            free = free_colours(tasks[task], True)
            assert all(old == new for old, new in fits[0].items() if old not in free)
            changed += any(old != new for old, new in fits[0].items())
    assert changed > 100


def test_only_outputs_are_predicted_and_no_segment_leaks(tasks):
    stream = DemonstrationStream(tasks, BatchConfig(batch_tokens=512), seed=0)
    for _, _, ids, labels in sequences(stream.next_batch()):
        mask = tokens.output_mask(ids)
        assert np.array_equal(labels, np.where(mask, ids, -100))
        assert labels[0] == -100, "a first token would be predicted from another sequence"


def test_several_pairs_are_of_one_task_and_distinct(tasks):
    config = BatchConfig(max_pairs=3, permute_colours=False, row_tokens=256)
    stream = DemonstrationStream(tasks, config, seed=0)
    lengths = Counter()
    for _, _, ids, _ in sequences(stream.next_batch()):
        parts = np.split(ids, np.flatnonzero(ids == tokens.END)[:-1] + 1)
        lengths[len(parts)] += 1
        assert len({part.tobytes() for part in parts}) == len(parts)
    assert set(lengths) == {1, 2, 3}


def test_the_stream_is_a_function_of_its_seed_and_can_go_on(tasks):
    def batches(stream, count):
        return [stream.next_batch() for _ in range(count)]

    def equal(a, b):
        return all(torch.equal(x.input_ids, y.input_ids) for x, y in zip(a, b, strict=True))

    first = DemonstrationStream(tasks, BatchConfig(), seed=1)
    whole = batches(first, 6)
    second = DemonstrationStream(tasks, BatchConfig(), seed=1)
    assert equal(batches(second, 3), whole[:3])
    third = DemonstrationStream(tasks, BatchConfig(), seed=1)
    third.load_state_dict(second.state_dict())
    assert equal(batches(third, 3), whole[3:])
    assert not equal(batches(DemonstrationStream(tasks, BatchConfig(), seed=2), 1), whole[:1])


def test_test_inputs_never_enter_a_batch(tasks):
    """Poisoned test inputs, of the same colours, change no batch."""
    task = tasks[0]
    poisoned = Task(task.id, task.train, tuple(Pair(p.input[::-1, ::-1], None) for p in task.test))
    assert not np.array_equal(poisoned.test[0].input, task.test[0].input)
    streams = [DemonstrationStream([t], BatchConfig(batch_tokens=512), 0) for t in (task, poisoned)]
    for _ in range(3):
        assert torch.equal(*(stream.next_batch().input_ids for stream in streams))


def pair(before: list[list[int]], after: list[list[int]]) -> Pair:
    return Pair(np.array(before, dtype=np.uint8), np.array(after, dtype=np.uint8))


@pytest.mark.parametrize(
    ("after", "expected"),
    [
        ([[1, 9]], [1, 3, 1, 1]),  # one cell differs
        ([[1, 2]], [1, 1, 1, 1]),  # nothing differs
        ([[3, 4], [5, 6]], [1] * 7),  # another shape
    ],
)
def test_weights_of_tokens_that_differ(after, expected):
    task = Task("t", (pair([[1, 2]], after),), (Pair(np.ones((1, 1), np.uint8), None),))
    config = BatchConfig(batch_tokens=16, row_tokens=16, permute_colours=False, difference_weight=2)
    stream = DemonstrationStream([task], config, seed=0)
    for _ in range(20):
        batch = stream.next_batch()
        if int(batch.symmetry_ids[0, 0]) == 0:
            weights = batch.weights[0][batch.labels[0] != -100]
            assert weights.tolist() == expected
            return
    raise AssertionError("the identity was never drawn")


def test_bad_settings_are_named():
    with pytest.raises(ValueError, match="batch_tokens must be at least 1. Got 0"):
        BatchConfig(batch_tokens=0)
    with pytest.raises(ValueError, match="identity_colours must be in 0-1. Got 2"):
        BatchConfig(identity_colours=2)
    with pytest.raises(ValueError, match="no tasks"):
        DemonstrationStream([], BatchConfig(), 0)
