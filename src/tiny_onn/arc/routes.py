"""The routes of a run: what is logged of them while it trains, and what its report draws.

``routing.json`` holds, bounded in size however long the run and whatever its tasks:

- ``experts``: E; ``sites``: the names of the sites shown, evenly spread over all of them;
- ``steps`` and ``load``: at some steps, for each site, the experts' shares of the routes, in
  thousandths;
- ``tasks`` and ``load_by_task``: the same for each task at the end, ``[site][task][expert]``;
- ``examples``: test inputs with the answer of most votes, and for some sites the expert that
  computed each cell.

Shapes: S sites, E experts, T tokens.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tiny_onn.arc import tokens
from tiny_onn.arc.batches import Batch, DemonstrationStream
from tiny_onn.arc.grids import Grid
from tiny_onn.arc.tasks import Task
from tiny_onn.arc.trainer import ARCTrainer
from tiny_onn.arc.vote import Candidate
from tiny_onn.shaping import RoutingMonitor, RoutingShaper

PROBE_EVERY = 2
"""Looks at the routes between two probes."""

_WINDOW = 5
_PROBE_SHARE = 8
_MOST_MOMENTS, _MOST_SITES, _MOST_ROWS, _MOST_TASKS = 64, 12, 192, 200
_EXAMPLES, _EXAMPLE_SITES = 3, 4


class RouteLog:
    """Looks at the routes of a training run now and then.

    One step in ``RoutingMonitor.interval`` is looked at; the figures cover the last 5 to 10 of
    them. One look in two also runs the model over a probe batch, an eighth of a batch of
    the stream, in evaluation mode: it draws nothing at random, and nothing of the run depends on
    it. On one CPU core all of it together takes about 0.5 % of the time.

    Args:
        trainer: whose last batch is looked at.
        shaper: names the sites.
        stream: where the probe batch comes from; it stays where it is.
        num_tasks: how many tasks there are.
    """

    def __init__(
        self,
        trainer: ARCTrainer,
        shaper: RoutingShaper,
        stream: DemonstrationStream,
        num_tasks: int,
    ) -> None:
        self.trainer = trainer
        self.sites = shaper.sites
        top_k = trainer.model.model.experts_per_site
        self.monitor = RoutingMonitor(top_k, num_tasks, window=_WINDOW)
        self._probe = _probe_batch(stream)
        self._steps: list[int] = []
        self._loads: list[list[list[int]]] = []
        self._stride = 1

    def look(self, batch: Batch) -> dict[str, float]:
        """The routing figures after the trainer's step on ``batch``; none after most steps."""
        looks, rest = divmod(self.trainer.step - 1, self.monitor.interval)
        if rest:
            return {}
        logits, mask = self.trainer.last_routes
        # With recurrences the sites are computed several times.
        blocks = [site.block for site in self.sites] * (len(logits) // len(self.sites))
        biases = [None if block is None else block.selection_bias for block in blocks]
        self.monitor.update(logits, mask, batch.task_ids, batch.symmetry_ids, biases=biases)
        probed = looks % PROBE_EVERY == 0
        if probed:
            probe = self._probe.to(self.trainer.model.device)
            self.monitor.probe(self._routes(probe), probe.segment_ids >= 0)
        self._note(looks)
        figures = self.monitor.summary()
        # A jitter is logged once, where it was measured.
        return {key: x for key, x in figures.items() if probed or key != "jitter"}

    def state_dict(self) -> dict[str, Any]:
        """Everything it goes on from, as JSON can hold it."""
        return {
            "monitor": {key: _packed(value) for key, value in self.monitor.state_dict().items()},
            "steps": list(self._steps),
            "loads": list(self._loads),
            "stride": self._stride,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state of :meth:`state_dict`."""
        monitor = {key: _unpacked(value) for key, value in state["monitor"].items()}
        self.monitor.load_state_dict(monitor)
        self._steps, self._loads = list(state["steps"]), list(state["loads"])
        self._stride = int(state["stride"])

    def write(
        self,
        path: Path,
        tasks: Sequence[Task],
        candidates: Mapping[str, Sequence[Sequence[Candidate]]],
    ) -> None:
        """Write ``routing.json``; ``candidates``: the answers to each test input, best first."""
        if not self._steps:
            return
        shown = self._shown()
        by_task = self.monitor.load_by_group[shown][:, :_MOST_TASKS]
        picture = {
            "experts": by_task.shape[-1],
            "sites": [self._name(site) for site in shown],
            "steps": self._steps,
            "load": self._loads,
            "tasks": [task.id for task in tasks[:_MOST_TASKS]],
            "load_by_task": _thousandths(by_task),
            "examples": [
                self._example(tasks, index, test, grid)
                for index, test, grid in _worth_seeing(tasks, candidates)
            ],
        }
        temporary = path.with_suffix(".tmp")
        temporary.write_text(json.dumps(picture, separators=(",", ":")), encoding="utf-8")
        temporary.replace(path)

    def _note(self, looks: int) -> None:
        """Keep the load; of too many moments every other one goes."""
        if looks % self._stride:
            return
        self._steps.append(self.trainer.step)
        self._loads.append(_thousandths(self.monitor.load[self._shown()]))
        if len(self._steps) > _MOST_MOMENTS:
            self._steps, self._loads = self._steps[::2], self._loads[::2]
            self._stride *= 2

    @torch.no_grad()
    def _routes(self, batch: Batch) -> Sequence[Tensor]:
        """Raw logits of every site, without dropout."""
        model = self.trainer.model
        training = model.training
        model.eval()
        try:
            return list(self.trainer.forward(batch).router_logits)
        finally:
            model.train(training)

    def _example(self, tasks: Sequence[Task], index: int, test: int, grid: Grid) -> dict[str, Any]:
        """The expert that each site prefers for each cell of a test input and its answer."""
        given = tasks[index].test[test].input
        prompt = tokens.encode_prompt(given)
        ids = np.concatenate((prompt, tokens.encode_grid(grid)))
        logits = self._routes(_one_sequence(ids, index).to(self.trainer.model.device))
        picked = _spread(len(logits), _EXAMPLE_SITES)
        best = {site: logits[site].argmax(-1).cpu().numpy() for site in picked}
        return {
            "task": tasks[index].id,
            "test": test,
            "input": given.tolist(),
            "answer": grid.tolist(),
            "routes": [
                {
                    "site": self._name(site),
                    "input": _cells(best_T, 1, given),
                    "answer": _cells(best_T, len(prompt), grid),
                }
                for site, best_T in best.items()
            ],
        }

    def _shown(self) -> list[int]:
        sites, experts = self.monitor.load.shape
        return _spread(sites, min(_MOST_SITES, max(1, _MOST_ROWS // experts)))

    def _name(self, site: int) -> str:
        rounds, place = divmod(site, len(self.sites))
        name = self.sites[place].name.removeprefix("model.").removesuffix(".experts")
        return f"{name}, round {rounds + 1}" if rounds else name


def _probe_batch(stream: DemonstrationStream) -> Batch:
    """Some rows of the stream's next batch, which it will give again."""
    state = stream.state_dict()
    batch = stream.next_batch()
    stream.load_state_dict(state)
    rows = slice(None, None, min(_PROBE_SHARE, len(batch.input_ids)))
    cut = {name: value[rows] for name, value in vars(batch).items() if isinstance(value, Tensor)}
    return Batch(**cut, real_tokens=int((cut["segment_ids"] >= 0).sum()))


def _one_sequence(ids_T: np.ndarray, task: int) -> Batch:
    """A batch of one sequence of a task as it stands."""
    ids = torch.from_numpy(ids_T)[None]
    zeros = torch.zeros_like(ids)
    return Batch(ids, ids, zeros.float(), zeros, zeros + task, zeros, ids.numel())


def _worth_seeing(
    tasks: Sequence[Task], candidates: Mapping[str, Sequence[Sequence[Candidate]]]
) -> list[tuple[int, int, Grid]]:
    """Some test inputs, at most one a task, with the answer of most votes: (task, test, answer).
    Those come first whose answer has many votes and many cells."""
    found = [
        (answers[0].votes * answers[0].grid.size, -index, -test)
        for index, task in enumerate(tasks)
        for test, answers in enumerate(candidates.get(task.id, ()))
        if answers
    ]
    best = {-index: (worth, -index, -test) for worth, index, test in sorted(found)}
    chosen = sorted(best.values(), key=lambda entry: (-entry[0], entry[1]))[:_EXAMPLES]
    return [(i, test, candidates[tasks[i].id][test][0].grid) for _, i, test in chosen]


def _cells(best_T: np.ndarray, start: int, grid: Grid) -> list[list[int]]:
    """What stands at the cells of a grid whose tokens begin at ``start``."""
    height, width = grid.shape
    rows = best_T[start : start + height * (width + 1)].reshape(height, width + 1)
    cells: list[list[int]] = rows[:, :width].tolist()
    return cells


def _spread(count: int, most: int) -> list[int]:
    """At most so many of 0..count-1, evenly spread, the first and the last among them."""
    if count <= most:
        return list(range(count))
    return [round(i * (count - 1) / max(most - 1, 1)) for i in range(most)]


def _thousandths(shares: Tensor) -> list[Any]:
    found: list[Any] = (shares * 1000).round().int().tolist()
    return found


def _packed(value: Any) -> Any:
    """A tensor as JSON can hold it, to the last bit; anything else as it is."""
    if not isinstance(value, Tensor):
        return value
    array = value.cpu().numpy()
    text = base64.b64encode(array.tobytes()).decode("ascii")
    return {"dtype": str(array.dtype), "shape": list(array.shape), "base64": text}


def _unpacked(value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    array = np.frombuffer(base64.b64decode(value["base64"]), dtype=np.dtype(value["dtype"]))
    return torch.from_numpy(array.reshape(value["shape"]).copy())
