"""A model with its code, in a folder that loads without this package."""

from __future__ import annotations

import json
import re
from importlib.util import find_spec
from pathlib import Path

from transformers import PreTrainedModel

MODULES = (
    "tiny_onn.models.configuration_tiny_onn",
    "tiny_onn.models.modeling_tiny_onn",
    "tiny_onn.models.attention",
    "tiny_onn.models.causal_blocks",
    "tiny_onn.models.experts_backend",
    "tiny_onn.models.layers",
    "tiny_onn.models.positions",
    "tiny_onn.routing",
    "tiny_onn.routing.dispatch",
    "tiny_onn.routing.experts",
    "tiny_onn.routing.grouped",
    "tiny_onn.routing.heads",
    "tiny_onn.routing.mixture",
    "tiny_onn.routing.routers",
)
"""All that the model's code imports of ours; each becomes a file named after its last part."""

AUTO_MAP = {
    "AutoConfig": "configuration_tiny_onn.TinyOnnConfig",
    "AutoModel": "modeling_tiny_onn.TinyOnnModel",
    "AutoModelForCausalLM": "modeling_tiny_onn.TinyOnnForCausalLM",
}


def export(model: PreTrainedModel, directory: str | Path) -> Path:
    """Write a model and the code that it needs into a folder.

    ``AutoModelForCausalLM.from_pretrained(directory, trust_remote_code=True)`` loads it where
    ``tiny_onn`` is not installed.

    Args:
        model: a TinyOnnModel or TinyOnnForCausalLM.
        directory: made if it isn't there.

    Raises:
        ValueError: for another model.
    """
    if model.config.model_type != "tiny_onn":
        raise ValueError(f"model must be a TinyOnn model. Got {type(model).__name__}")
    folder = Path(directory)
    model.save_pretrained(folder)
    config = folder / "config.json"
    kept = json.loads(config.read_text(encoding="utf-8"))
    config.write_text(json.dumps(kept | {"auto_map": AUTO_MAP}, indent=2) + "\n", encoding="utf-8")
    for name in MODULES:
        target = folder / f"{name.rsplit('.', 1)[-1]}.py"
        target.write_text(flattened(_source(name)), encoding="utf-8")
    return folder


def flattened(source: str) -> str:
    """Code whose imports of ours are of neighbours: ``from tiny_onn.a.b import c`` becomes
    ``from .b import c``, the only kind that the library copies along.

    Raises:
        ValueError: for an import of a module that isn't exported.
    """

    def rewrite(found: re.Match[str]) -> str:
        if found[2] not in MODULES:
            raise ValueError(f"{found[2]} is imported, but not exported")
        return f"{found[1]}from .{found[2].rsplit('.', 1)[-1]} import"

    return re.sub(r"^(\s*)from (tiny_onn[\w.]*) import", rewrite, source, flags=re.MULTILINE)


def _source(name: str) -> str:
    spec = find_spec(name)
    assert spec is not None and spec.origin is not None
    return Path(spec.origin).read_text(encoding="utf-8")
