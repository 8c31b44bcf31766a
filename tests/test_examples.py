"""Every example runs as it stands; each of them ends in assertions of its own."""

import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture(autouse=True)
def _as_before():
    """Examples seed the default generator, and may ask for other threads; accelerate keeps what its
    first user in a process asked for."""
    state, threads = torch.get_rng_state(), torch.get_num_threads()
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    torch.set_rng_state(state)
    torch.set_num_threads(threads)


# Lightning 2.6 asks torch's pytrees a question that torch 2.13 answers with a warning.
@pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.` is deprecated:FutureWarning")
@pytest.mark.filterwarnings("ignore::UserWarning:pytorch_lightning")
@pytest.mark.parametrize("example", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.stem)
def test_an_example_runs(example, capsys):
    runpy.run_path(str(example), run_name="__main__")
    assert "loss" in capsys.readouterr().out


def test_accelerate_in_two_processes():
    command = ["-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone"]
    for _ in range(2):
        done = subprocess.run(
            [sys.executable, *command, str(EXAMPLES / "accelerate_loop.py")],
            capture_output=True,
            text=True,
            timeout=120,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
        # Once in some dozen times a thread of gloo's aborts a process that ends.
        if "terminate called without an active exception" not in done.stderr:
            break
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("2 processes, loss")
