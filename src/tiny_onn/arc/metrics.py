"""Where a run's figures go: ``metrics.jsonl``, and TensorBoard for those who want it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tiny_onn.arc.parsing import show

Metrics = dict[str, Any]


class MetricsLog:
    """``metrics.jsonl``: one object per step, each step once, also over interruptions."""

    def __init__(self, path: Path, resume_step: int = 0) -> None:
        """Open for appending after ``resume_step``; what was logged beyond it is dropped."""
        kept = [row for row in read_metrics(path) if row["step"] <= resume_step]
        temporary = path.with_suffix(".tmp")
        temporary.write_text("".join(json.dumps(row) + "\n" for row in kept), encoding="utf-8")
        temporary.replace(path)
        self._file = path.open("a", encoding="utf-8")

    def write(self, metrics: Metrics) -> None:
        """Append one step."""
        self._file.write(json.dumps(metrics) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def read_metrics(path: Path) -> list[Metrics]:
    """The rows of a metrics file, none if there is no file; a last line that was cut short is
    left out.

    Raises:
        ValueError: naming the line, for one that is no object with a step.
    """
    rows: list[Metrics] = []
    lines = path.read_bytes().splitlines() if path.is_file() else []
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
        except ValueError as error:
            if number == len(lines):
                break
            raise ValueError(f"{show(path)}: line {number} is not JSON") from error
        if not isinstance(row, dict) or type(row.get("step")) is not int:
            raise ValueError(f"{show(path)}: line {number} is not an object with a step")
        rows.append(row)
    return rows


class TensorBoardLog:
    """The same figures as event files of TensorBoard.

    Raises:
        ValueError: where TensorBoard is not installed.
    """

    def __init__(self, folder: Path) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise ValueError(
                "training.tensorboard needs TensorBoard: pip install 'tiny-onn[tensorboard]'"
            ) from None
        self._writer = SummaryWriter(str(folder))

    def write(self, metrics: Metrics) -> None:
        """Log every number of one step."""
        for name, value in metrics.items():
            if name != "step" and isinstance(value, (int, float)):
                self._writer.add_scalar(name, value, metrics["step"])

    def close(self) -> None:
        """Write what is left."""
        self._writer.close()
