"""Votes: most first, invalid answers have none, probability ranks what is rescored."""

import numpy as np

from tiny_onn.arc import vote
from tiny_onn.arc.augment import View
from tiny_onn.arc.decode import Decoded, Prompt
from tiny_onn.arc.grids import as_grid

PROMPT = Prompt(0, 0, View(), np.zeros(1, dtype=np.int64))
A, B, C = (as_grid(cells) for cells in ([[1]], [[2]], [[1, 1]]))


def decoded(*answers):
    return [Decoded(PROMPT, grid, log_prob) for grid, log_prob in answers]


def test_votes_decide_and_probability_breaks_ties():
    found = vote.count_votes(
        decoded((A, -5.0), (B, -1.0), (None, 0.0), (A, -7.0), (C, -2.0), (None, 0.0))
    )
    assert [(c.grid.tolist(), c.votes) for c in found] == [([[1]], 2), ([[2]], 1), ([[1, 1]], 1)]
    assert found[0].log_prob == -6.0
    assert [g.tolist() for g in vote.attempts(found)] == [[[1]], [[2]]]


def test_grids_of_equal_cells_but_other_shape_are_different():
    row, column = as_grid([[1, 1]]), as_grid([[1], [1]])
    assert len(vote.count_votes(decoded((row, 0.0), (column, 0.0)))) == 2


def test_no_grid_no_attempt():
    assert vote.attempts(vote.count_votes(decoded((None, 0.0)))) == []


def test_rescoring_ranks_by_the_mean_over_all_views(monkeypatch):
    candidates = vote.count_votes(decoded((A, -1.0), (A, -1.0), (B, -1.0)))
    likelihoods = {A.tobytes(): [-3.0, -9.0], B.tobytes(): [-4.0, -2.0]}

    def scores(model, prompts, grids, batch_tokens):
        return [likelihoods[grid.tobytes()].pop(0) for grid in grids]

    monkeypatch.setattr(vote, "log_likelihoods", scores)
    ranked = vote.rescore(None, candidates, [PROMPT, PROMPT], 1)
    assert [(c.grid.tolist(), c.log_prob, c.votes) for c in ranked] == [
        ([[2]], -3.0, 1),
        ([[1]], -6.0, 2),
    ]
