"""Tokens: a lossless code, and nothing that is not a grid decodes to one."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from tiny_onn.arc import tokens
from tiny_onn.arc.grids import Grid, as_grid
from tiny_onn.arc.tasks import Pair, load_tasks
from tiny_onn.arc.tokens import END, INPUT, OUTPUT, PAD, ROW_END

sides = st.tuples(st.integers(1, 30), st.integers(1, 30))
grids = arrays(np.uint8, sides, elements=st.integers(0, 9)).map(as_grid)
PAIR = Pair(as_grid([[1, 2], [3, 4]]), as_grid([[5, 6, 7]]))


def test_the_vocabulary_is_a_contract() -> None:
    assert (ROW_END, INPUT, OUTPUT, END, PAD, tokens.VOCAB_SIZE) == (10, 11, 12, 13, 14, 16)


def test_a_pair_and_a_sequence() -> None:
    ids = tokens.encode_pair(PAIR)
    assert ids.dtype == np.int64
    assert ids.tolist() == [11, 1, 2, 10, 3, 4, 10, 12, 5, 6, 7, 10, 13]
    assert tokens.pair_tokens(PAIR) == len(ids)
    prompt = tokens.encode_prompt(PAIR.input)
    assert prompt.tolist() == [11, 1, 2, 10, 3, 4, 10, 12]
    hidden = Pair(PAIR.input, None)
    assert tokens.pair_tokens(hidden) == len(prompt)
    both = tokens.encode_sequence([PAIR, PAIR], PAIR.input)
    assert both.tolist() == [*ids, *ids, *prompt]
    assert tokens.encode_sequence([PAIR]).tolist() == ids.tolist()
    empty = tokens.encode_sequence([])
    assert empty.shape == (0,) and empty.dtype == np.int64
    with pytest.raises(ValueError, match="output is hidden"):
        tokens.encode_pair(hidden)


@settings(max_examples=40, deadline=None)
@given(grids)
def test_round_trip(grid: Grid) -> None:
    ids = tokens.encode_grid(grid)
    assert ids.dtype == np.int64
    decoded = tokens.decode_grid([*ids, END])
    assert decoded is not None and decoded.dtype == np.uint8 and not decoded.flags.writeable
    assert np.array_equal(decoded, grid)


def test_all_of_the_small_real_tasks_round_trip() -> None:
    for task in load_tasks("arcagi", max_cells=100):
        for pair in task.train:
            ids = tokens.encode_pair(pair)
            answer = ids[np.flatnonzero(ids == OUTPUT)[0] + 1 :]
            decoded = tokens.decode_grid(answer)
            assert decoded is not None and pair.output is not None
            assert np.array_equal(decoded, pair.output)
            assert tokens.pair_tokens(pair) == len(ids)


@pytest.mark.parametrize(
    ("ids", "why"),
    [
        ([], "nothing"),
        ([END], "no row"),
        ([ROW_END, END], "an empty row"),
        ([ROW_END, ROW_END, END], "two empty rows"),
        ([1, 2, ROW_END], "no END"),
        ([1, 2, END], "the last row is not closed"),
        ([1, ROW_END, 2, END], "the last row is not closed"),
        ([1, 2, ROW_END, 3, ROW_END, END], "ragged: the second row is short"),
        ([1, ROW_END, 2, 3, ROW_END, END], "ragged: the second row is long"),
        ([1, 2, ROW_END, 3, ROW_END, 4, 5, 6, ROW_END, END], "ragged, of the right length"),
        ([1, 2, ROW_END, ROW_END, 3, 4, 5, 6, ROW_END, END], "ragged, of the right length"),
        ([1, 2, ROW_END, 3, 4, ROW_END, ROW_END, END], "an empty row at the end"),
        ([1, INPUT, ROW_END, END], "a strange token"),
        ([1, OUTPUT, ROW_END, END], "a strange token"),
        ([1, PAD, ROW_END, END], "a strange token"),
        ([1, 15, ROW_END, END], "a strange token"),
        ([1, -1, ROW_END, END], "a strange token"),
        ([1, 256, ROW_END, END], "a token that would wrap around"),
        ([PAD, 1, ROW_END, END], "padding before the grid"),
        ([*([1] * 31), ROW_END, END], "31 columns"),
        ([*([1, ROW_END] * 31), END], "31 rows"),
    ],
)
def test_what_is_not_a_grid_is_none(ids: list[int], why: str) -> None:
    assert tokens.decode_grid(ids) is None, why


def test_what_follows_the_end_is_not_read() -> None:
    grid = tokens.decode_grid([1, 2, ROW_END, END, PAD, 7, END])
    assert grid is not None and grid.tolist() == [[1, 2]]


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, 15), max_size=24))
def test_what_decodes_encodes_to_the_same_tokens(ids: list[int]) -> None:
    grid = tokens.decode_grid(ids)
    if grid is not None:
        assert [*tokens.encode_grid(grid), END] == ids[: ids.index(END) + 1]


def test_positions() -> None:
    ids = [*tokens.encode_pair(PAIR), *tokens.encode_prompt(as_grid([[9]])), PAD]
    shown = dict(enumerate(map(tuple, tokens.grid_positions(ids).tolist())))
    assert list(shown.values()) == [
        (0, 0, 0),  # INPUT
        (0, 1, 0),
        (0, 2, 0),
        (1, 0, 0),  # ROW_END stands for the row to come
        (1, 1, 0),
        (1, 2, 0),
        (2, 0, 0),
        (0, 0, 1),  # OUTPUT
        (0, 1, 1),
        (0, 2, 1),
        (0, 3, 1),
        (1, 0, 1),
        (1, 0, 1),  # END stands where the ROW_END before it stands
        (0, 0, 2),
        (0, 1, 2),
        (1, 0, 2),
        (0, 0, 3),
        (0, 0, 0),  # PAD
    ]
    assert tokens.grid_positions(ids).dtype == np.int64


def test_padding_moves_no_position() -> None:
    ids = tokens.encode_pair(PAIR)
    plain = tokens.grid_positions(ids)
    padded = tokens.grid_positions([PAD, PAD, *ids[:4], PAD, *ids[4:], PAD])
    kept = [2, 3, 4, 5, *range(7, 7 + len(ids) - 4)]
    assert np.array_equal(padded[kept], plain)
    assert not padded[[0, 1, 6, -1]].any()
    # A continuation without its marker counts from the origin, in grid 0.
    assert tokens.grid_positions([3, END]).tolist() == [[0, 1, 0], [0, 1, 0]]
    assert tokens.grid_positions([]).shape == (0, 3)


def test_output_mask() -> None:
    ids = [*tokens.encode_sequence([PAIR, PAIR], as_grid([[9]])), PAD]
    mask = tokens.output_mask(ids)
    one = [False] * 8 + [True] * 5
    assert mask.dtype == np.bool_
    assert mask.tolist() == [*one, *one, *[False] * 4, False]
    assert mask.sum() == 2 * len(tokens.encode_grid(PAIR.output)) + 2  # type: ignore[arg-type]
    assert tokens.output_mask([OUTPUT, 1, PAD, 2, ROW_END, END, 3, INPUT, 4]).tolist() == [
        False,
        True,
        False,
        True,
        True,
        True,
        False,
        False,
        False,
    ]
    assert tokens.output_mask([OUTPUT, 1, INPUT, 2]).tolist() == [False, True, False, False]
