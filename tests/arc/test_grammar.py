"""The grammar writes every grid, and nothing else."""

import itertools

import pytest
import torch

from tiny_onn.arc import tokens
from tiny_onn.arc.grammar import GridGrammar, GridLogitsProcessor
from tiny_onn.arc.grids import as_grid
from tiny_onn.models import TinyOnnConfig, TinyOnnForCausalLM


def write(ids) -> bool:
    """Whether the grammar allows these tokens, one by one."""
    grammar = GridGrammar(1)
    for token in ids:
        if not grammar.allowed()[0, token]:
            return False
        grammar.advance(torch.tensor([token]))
    return bool(grammar.finished[0])


def test_it_accepts_exactly_what_decodes_to_a_grid():
    alphabet = (0, 5, tokens.ROW_END, tokens.END, tokens.OUTPUT)
    accepted = 0
    for length in range(1, 7):
        for ids in itertools.product(alphabet, repeat=length):
            first_end = ids.index(tokens.END) if tokens.END in ids else length
            is_grid = first_end == length - 1 and tokens.decode_grid(ids) is not None
            assert write(ids) == is_grid, ids
            accepted += is_grid
    assert accepted == 34  # 1x1, 1x2, 1x3, 1x4, 2x1 in two colours: 2 + 4 + 8 + 16 + 4


def test_the_largest_grid_and_not_one_cell_more():
    ids = [*tokens.encode_grid(as_grid([[1] * 30] * 30)), tokens.END]
    assert write(ids)
    grammar = GridGrammar(1)
    for _ in range(30):
        grammar.advance(torch.tensor([1]))
    assert grammar.allowed()[0].nonzero().flatten().tolist() == [tokens.ROW_END]
    grammar = GridGrammar(1)
    for token in ids[:-1]:
        grammar.advance(torch.tensor([int(token)]))
    assert grammar.allowed()[0].nonzero().flatten().tolist() == [tokens.END]


def test_finished_sequences_are_padded_and_can_be_left_out():
    grammar = GridGrammar(3)
    for step in ((1, 2, 3), (tokens.ROW_END,) * 3, (tokens.END, 4, tokens.END)):
        grammar.advance(torch.tensor(step))
    assert grammar.finished.tolist() == [True, False, True]
    assert grammar.allowed()[0].nonzero().flatten().tolist() == [tokens.PAD]
    grammar.keep(torch.tensor([1]))
    assert grammar.finished.tolist() == [False]
    assert grammar.allowed()[0].nonzero().flatten().tolist() == [tokens.ROW_END]


def test_the_state_can_be_read_off_the_tokens():
    generator = torch.Generator().manual_seed(0)
    prompt = torch.tensor([tokens.INPUT, 3, 4, tokens.ROW_END, tokens.OUTPUT])
    grammar, ids = GridGrammar(64), prompt.expand(64, -1)
    for _ in range(40):
        expected = grammar.allowed()
        assert torch.equal(GridGrammar.after(ids).allowed(), expected)
        # Row ends are rare among random tokens, so they get some weight.
        odds = expected.float() * torch.where(torch.arange(tokens.VOCAB_SIZE) >= 10, 8.0, 1.0)
        token = torch.multinomial(odds, 1, generator=generator).squeeze(-1)
        grammar.advance(token)
        ids = torch.cat([ids, token[:, None]], dim=1)
    assert 10 < grammar.finished.sum() < 64
    with pytest.raises(ValueError, match="must have an OUTPUT token"):
        GridGrammar.after(ids[:, :3])


@pytest.mark.parametrize("options", [{"do_sample": True}, {"num_beams": 3, "do_sample": False}])
def test_generate_writes_grids_only(options):
    torch.manual_seed(0)
    model = TinyOnnForCausalLM(TinyOnnConfig(hidden_size=32, num_hidden_layers=1)).eval()
    prompts = torch.from_numpy(tokens.encode_prompt(as_grid([[1, 2], [3, 4]]))).expand(4, -1)
    ids = model.generate(
        prompts,
        max_new_tokens=1000,
        logits_processor=[GridLogitsProcessor()],
        pad_token_id=tokens.PAD,
        **options,
    )
    for row in ids[:, prompts.shape[1] :]:
        assert tokens.decode_grid(row.tolist()) is not None
