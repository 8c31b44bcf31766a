"""Checkpoints (temporary)."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file


class CheckpointError(ValueError):
    """A checkpoint that can't be used."""


class Checkpoints:
    def __init__(self, folder: Path, keep: int = 1) -> None:
        self.folder = folder
        self.keep = keep

    def clear(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)

    def save(self, step: int, model: Any, optimizer: Any, state: dict[str, Any]) -> Path:
        self.folder.mkdir(parents=True, exist_ok=True)
        temporary = self.folder / "tmp"
        shutil.rmtree(temporary, ignore_errors=True)
        model.save_pretrained(temporary)
        saved = optimizer.state_dict()
        tensors = {
            f"{i}.{k}": v
            for i, entry in saved["state"].items()
            for k, v in entry.items()
            if isinstance(v, torch.Tensor)
        }
        save_file(tensors, temporary / "optimizer.safetensors")
        rest = {k: v for k, v in saved.items() if k != "state"}
        (temporary / "trainer.json").write_text(json.dumps({"state": state, "optimizer": rest}))
        target = self.folder / f"step-{step:06d}"
        shutil.rmtree(target, ignore_errors=True)
        os.replace(temporary, target)
        for old in sorted(self.folder.glob("step-*"))[: -self.keep]:
            shutil.rmtree(old)
        return target

    def latest(self) -> Path | None:
        found = sorted(self.folder.glob("step-*"))
        return found[-1] if found else None

    def restore(self, path: Path, model: Any, optimizer: Any) -> dict[str, Any]:
        model.load_state_dict(load_file(path / "model.safetensors"))
        extra = json.loads((path / "trainer.json").read_text())
        state: dict[int, dict[str, Any]] = {}
        for key, value in load_file(path / "optimizer.safetensors").items():
            i, name = key.split(".", 1)
            state.setdefault(int(i), {})[name] = value
        optimizer.load_state_dict({"state": state, **extra["optimizer"]})
        return extra["state"]
