"""What the tests of the command line share."""

import pytest

SMALL = """
[model]
hidden_size = 32
num_hidden_layers = 1
num_attention_heads = 2
moe_intermediate_size = 32
[batches]
batch_tokens = 256
[decode]
views = 8
hopeless = 5.0
"""


@pytest.fixture
def recipe(tmp_path):
    path = tmp_path / "small.toml"
    path.write_text(SMALL, encoding="utf-8")
    return path
