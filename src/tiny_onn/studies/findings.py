"""What a study found: figures, tables, a plot and a verdict on each sentence of the claim."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

Row = Mapping[str, str]
Plot = Callable[[Path], None]


@dataclass(frozen=True)
class Verdict:
    """One sentence of a claim, whether it holds (None: it can't be told), and the figure."""

    claim: str
    holds: bool | None
    figure: str

    def __str__(self) -> str:
        word = {True: "holds", False: "does not hold", None: "undecided"}[self.holds]
        return f"{word}: {self.claim} ({self.figure})"


@dataclass(frozen=True)
class Findings:
    """A study's outcome.

    Attributes:
        result: the JSON object, without seed, commit, hardware and versions.
        tables: rows of text by title; all rows of a table have the same columns.
        verdicts: one for each sentence of the claim.
        plot: draws into a PNG file, or None.
    """

    result: dict[str, Any]
    tables: dict[str, Sequence[Row]] = field(default_factory=dict)
    verdicts: Sequence[Verdict] = ()
    plot: Plot | None = None

    def write(self, folder: Path) -> None:
        """Write ``result.json``, ``tables.md`` and ``plot.png`` into a folder."""
        folder.mkdir(parents=True, exist_ok=True)
        verdicts = [vars(v) for v in self.verdicts]
        text = json.dumps(finite(self.result) | {"verdicts": verdicts}, indent=1)
        (folder / "result.json").write_text(text + "\n", encoding="utf-8")
        parts = [f"## {title}\n\n{markdown(rows)}" for title, rows in self.tables.items()]
        parts.append("## verdicts\n\n" + "".join(f"- {v}\n" for v in self.verdicts))
        (folder / "tables.md").write_text("\n".join(parts), encoding="utf-8")
        if self.plot is not None:
            self.plot(folder / "plot.png")


def finite(value: Any) -> Any:
    """The same nested figures with None for every number that JSON can't say."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def markdown(rows: Sequence[Row]) -> str:
    """A table in Markdown."""
    if not rows:
        return ""
    columns = list(rows[0])
    lines = [columns, ["---"] * len(columns), *([row[c] for c in columns] for row in rows)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def spread(values: Sequence[float]) -> dict[str, float]:
    """``mean`` and sample standard deviation ``std`` of finite values; NaN where there are none."""
    finite = [v for v in values if math.isfinite(v)]
    mean = statistics.fmean(finite) if finite else math.nan
    return {"mean": mean, "std": statistics.stdev(finite) if len(finite) > 1 else 0.0}


def text_of(figure: Mapping[str, float], form: str = ".3g") -> str:
    """``mean ± std``."""
    return f"{figure['mean']:{form}} ± {figure['std']:{form}}"


def better(a: Sequence[float], b: Sequence[float]) -> tuple[bool | None, str]:
    """Whether the values ``a`` are larger than ``b``: by more than two standard errors of the
    difference of their means; None if it lies within them."""
    one, two = spread(a), spread(b)
    error = math.sqrt(one["std"] ** 2 / len(a) + two["std"] ** 2 / len(b))
    gap = one["mean"] - two["mean"]
    text = f"{text_of(one)} against {text_of(two)}"
    if not math.isfinite(gap) or abs(gap) <= 2 * error:
        return None, text
    return gap > 0, text
