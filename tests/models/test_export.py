"""An exported folder loads and generates where the package isn't installed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from model_helpers import MakeModel, MakeTokens
from transformers import LlamaConfig, LlamaModel

from tiny_onn.models import export
from tiny_onn.models.export import MODULES, flattened

STRANGER = """
import json, sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "tiny_onn":
            raise ModuleNotFoundError(f"No module named {name}", name=name)
sys.meta_path.insert(0, Absent())
import torch
from transformers import AutoConfig, AutoModelForCausalLM
folder, ids = sys.argv[1], json.loads(sys.argv[2])
config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
assert type(model).__module__.startswith("transformers_modules")
assert not any(name.startswith("tiny_onn") for name in sys.modules)
ids = torch.tensor(ids)
loss = model.train()(ids, labels=ids).loss
loss.backward()
model.eval()
print(json.dumps(model.generate(ids, max_new_tokens=8, do_sample=False).tolist()))
"""


def test_a_clean_process_loads_and_generates(
    make_model: MakeModel, make_tokens: MakeTokens, tmp_path: Path
) -> None:
    model = make_model(num_recurrences=2)
    folder = export(model, tmp_path / "exported")
    ids = make_tokens(2, 9)
    done = subprocess.run(
        [sys.executable, "-c", STRANGER, str(folder), json.dumps(ids.tolist())],
        env=os.environ | {"HF_MODULES_CACHE": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    expected = model.generate(ids, max_new_tokens=8, do_sample=False)
    assert json.loads(done.stdout.splitlines()[-1]) == expected.tolist()


def test_an_import_that_is_not_exported_is_named() -> None:
    source = "def f():\n    from tiny_onn.routing.heads import RoutedHeads\n"
    assert flattened(source) == "def f():\n    from .heads import RoutedHeads\n"
    with pytest.raises(ValueError, match="tiny_onn.arc.tasks is imported, but not exported"):
        flattened("import torch\nfrom tiny_onn.arc.tasks import Task\n")
    names = [name.rsplit(".", 1)[-1] for name in MODULES]
    assert len(set(names)) == len(names)


def test_another_model_is_refused(tmp_path: Path) -> None:
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    llama = LlamaModel(LlamaConfig(vocab_size=4, intermediate_size=8, **sizes))
    with pytest.raises(ValueError, match="model must be a TinyOnn model. Got LlamaModel"):
        export(llama, tmp_path)
