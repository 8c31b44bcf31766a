"""Checkpoints: safetensors and JSON, whole or not at all.

A checkpoint is a folder. It is written beside its place, flushed to the disk, and then renamed, so
that whatever happens in between, what carries a checkpoint's name is complete. No pickle is ever
read.
"""

from __future__ import annotations

import json
import os
import shutil
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.optim import Optimizer
from transformers import PreTrainedModel

MODEL, OPTIMIZER, CONFIG, TRAINER = (
    "model.safetensors",
    "optimizer.safetensors",
    "config.json",
    "trainer.json",
)


class CheckpointError(ValueError):
    """A checkpoint that can't be used; the message names the file and what is wrong with it."""


class Checkpoints:
    """The checkpoints of one run, ``FOLDER/step-000120`` and so on.

    A checkpoint can be loaded as a model: ``TinyOnnForCausalLM.from_pretrained(path)``.

    Args:
        folder: made when the first checkpoint is saved.
        keep: how many of the newest are kept.
    """

    def __init__(self, folder: Path, keep: int = 1) -> None:
        if keep < 1:
            raise ValueError(f"keep must be at least 1. Got {keep}")
        self.folder = folder
        self.keep = keep

    def clear(self) -> None:
        """Remove all checkpoints, for a run that begins anew."""
        for path in (*self._saved(), *self._unfinished()):
            shutil.rmtree(path)

    def latest(self) -> Path | None:
        """The newest checkpoint, or None."""
        return max(self._saved(), default=None)

    def save(
        self, step: int, model: PreTrainedModel, optimizer: Optimizer, state: Mapping[str, Any]
    ) -> Path:
        """Save everything a run needs to go on; older checkpoints go only once this one is whole.

        Args:
            step: names the checkpoint.
            state: the caller's own state, anything JSON can hold.

        Raises:
            OSError: if it can't be written; the older checkpoints are as they were.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        for leftover in self._unfinished():
            shutil.rmtree(leftover)
        target = self.folder / f"step-{step:06d}"
        unfinished = self.folder / f"unfinished-{target.name}"
        try:
            unfinished.mkdir()
            _write(unfinished, model, optimizer, state)
            if target.exists():
                shutil.rmtree(target)
            unfinished.rename(target)
            _sync(self.folder)
        except BaseException:
            shutil.rmtree(unfinished, ignore_errors=True)
            raise
        for old in sorted(self._saved())[: -self.keep]:
            shutil.rmtree(old)
        return target

    def restore(self, path: Path, model: PreTrainedModel, optimizer: Optimizer) -> dict[str, Any]:
        """Load a checkpoint in place and return the state it was saved with.

        Raises:
            CheckpointError: for a file that is missing, cut short, changed or no safetensors or
                JSON file, or a checkpoint of another model or optimizer. Nothing is loaded then.
        """
        kept = _read_json(path / TRAINER)
        for name in (MODEL, OPTIMIZER):
            _check_sum(path / name, kept["checksums"].get(name))
        weights = _read_tensors(path / MODEL)
        _check_fit(path / MODEL, weights, model)
        saved = _joined(_read_tensors(path / OPTIMIZER), kept["optimizer"])
        try:
            optimizer.load_state_dict(saved)
        except (ValueError, KeyError) as error:
            raise CheckpointError(f"{path / OPTIMIZER}: of another optimizer: {error}") from None
        model.load_state_dict(weights)
        return dict(kept["state"])

    def _saved(self) -> list[Path]:
        return [path for path in self.folder.glob("step-*") if path.is_dir()]

    def _unfinished(self) -> list[Path]:
        return list(self.folder.glob("unfinished-*"))


def _write(
    folder: Path, model: PreTrainedModel, optimizer: Optimizer, state: Mapping[str, Any]
) -> None:
    tensors, rest = _split(optimizer.state_dict())
    save_file(_contiguous(model.state_dict()), folder / MODEL, metadata={"format": "pt"})
    save_file(_contiguous(tensors), folder / OPTIMIZER)
    (folder / CONFIG).write_text(model.config.to_json_string(), encoding="utf-8")
    checksums = {name: _checksum(folder / name) for name in (MODEL, OPTIMIZER)}
    kept = {"state": dict(state), "optimizer": rest, "checksums": checksums}
    (folder / TRAINER).write_text(json.dumps(kept), encoding="utf-8")
    for path in (*folder.iterdir(), folder):
        _sync(path)


def _contiguous(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().contiguous() for name, tensor in tensors.items()}


def _split(state: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """An optimizer's state as its tensors, by flat name, and the plain values around them."""
    tensors: dict[str, Tensor] = {}
    plain: dict[str, dict[str, Any]] = {}
    for index, entry in state["state"].items():
        for name, value in entry.items():
            if isinstance(value, Tensor):
                tensors[f"{index}.{name}"] = value
            else:
                plain.setdefault(str(index), {})[name] = value
    groups: list[dict[str, Any]] = []
    for i, group in enumerate(state["param_groups"]):
        groups.append({})
        for name, value in group.items():
            if isinstance(value, Tensor):
                tensors[f"group.{i}.{name}"] = value
            else:
                groups[-1][name] = value
    others = {k: v for k, v in state.items() if k not in ("state", "param_groups")}
    return tensors, {"state": plain, "param_groups": groups, **others}


def _joined(tensors: Mapping[str, Tensor], rest: dict[str, Any]) -> dict[str, Any]:
    """The inverse of :func:`_split`."""
    entries: dict[int, dict[str, Any]] = {int(i): dict(e) for i, e in rest["state"].items()}
    groups = [dict(group) for group in rest["param_groups"]]
    for key, tensor in tensors.items():
        owner, _, name = key.partition(".")
        if owner == "group":
            index, _, name = name.partition(".")
            groups[int(index)][name] = tensor
        else:
            entries.setdefault(int(owner), {})[name] = tensor
    for group in groups:
        # JSON has no tuples, and betas are compared as one.
        group.update({k: tuple(v) for k, v in group.items() if k == "betas"})
    return {**rest, "state": entries, "param_groups": groups}


def _checksum(path: Path) -> str:
    value = 0
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            value = zlib.crc32(block, value)
    return f"crc32:{value:08x}:{path.stat().st_size}"


def _check_sum(path: Path, expected: str | None) -> None:
    if not path.is_file():
        raise CheckpointError(f"{path}: missing")
    size = path.stat().st_size
    if expected is None or _checksum(path) == expected:
        return
    should = int(expected.rsplit(":", 1)[1])
    cut = f"{size} bytes, expected {should}" if size != should else "its content has changed"
    raise CheckpointError(f"{path}: damaged: {cut}")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        kept = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path}: missing") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path}: not JSON: {error}") from None
    if not isinstance(kept, dict) or not {"state", "optimizer", "checksums"} <= kept.keys():
        raise CheckpointError(f"{path}: not a checkpoint of this program")
    return kept


def _read_tensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except SafetensorError as error:
        raise CheckpointError(f"{path}: not a safetensors file: {error}") from None


def _check_fit(path: Path, weights: Mapping[str, Tensor], model: torch.nn.Module) -> None:
    own = model.state_dict()
    for name in sorted(own.keys() | weights.keys()):
        if name not in weights:
            raise CheckpointError(f"{path}: of another model: it has no {name}")
        if name not in own:
            raise CheckpointError(f"{path}: of another model: {name} is not in this one")
        if weights[name].shape != own[name].shape:
            raise CheckpointError(
                f"{path}: of another model: {name} is {tuple(weights[name].shape)}, "
                f"expected {tuple(own[name].shape)}"
            )


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
