"""ARC: tasks, views, tokens, joint test-time training, votes, scores. Names are loaded lazily."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tiny_onn.arc.grammar import GridLogitsProcessor as GridLogitsProcessor
    from tiny_onn.arc.scoring import Score as Score
    from tiny_onn.arc.scoring import score as score
    from tiny_onn.arc.solving import solve as solve
    from tiny_onn.arc.submission import read_submission as read_submission
    from tiny_onn.arc.submission import write_submission as write_submission
    from tiny_onn.arc.tasks import Grid as Grid
    from tiny_onn.arc.tasks import Pair as Pair
    from tiny_onn.arc.tasks import Task as Task
    from tiny_onn.arc.tasks import TaskError as TaskError
    from tiny_onn.arc.tasks import TaskSet as TaskSet
    from tiny_onn.arc.tasks import load_tasks as load_tasks
    from tiny_onn.arc.trainer import ARCTrainer as ARCTrainer

_HOMES = {
    "ARCTrainer": "trainer",
    "Grid": "tasks",
    "GridLogitsProcessor": "grammar",
    "Pair": "tasks",
    "Score": "scoring",
    "Task": "tasks",
    "TaskError": "tasks",
    "TaskSet": "tasks",
    "load_tasks": "tasks",
    "read_submission": "submission",
    "score": "scoring",
    "solve": "solving",
    "write_submission": "submission",
}

__all__ = [
    "ARCTrainer",
    "Grid",
    "GridLogitsProcessor",
    "Pair",
    "Score",
    "Task",
    "TaskError",
    "TaskSet",
    "load_tasks",
    "read_submission",
    "score",
    "solve",
    "write_submission",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(__all__))
