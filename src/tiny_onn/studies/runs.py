"""A study's runs: each is cached on disk when it ends, so that a study can be broken off and go on.

A run is a function of plain settings that returns plain figures. Runs are spread over processes of
one thread each, which uses a machine's cores better than many threads on a small model do.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from pathlib import Path
from typing import Any

import torch

Settings = dict[str, Any]
Figures = dict[str, Any]
Run = Callable[[Settings], Figures]
"""A function at the top of a module, so that another process can import it."""

Observer = Callable[[int, int, Settings, Figures], None]
"""Called with (runs done, all runs, settings, figures) when a run is there."""


class RunCache:
    """Figures of finished runs, one JSON file each.

    Args:
        folder: made when the first run is kept.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def load(self, settings: Settings) -> Figures | None:
        """The figures of a run, or None. A file that was cut short counts as none."""
        try:
            kept = json.loads(self._path(settings).read_text(encoding="utf-8"))
        except (FileNotFoundError, json.JSONDecodeError):
            return None
        return kept["figures"]

    def keep(self, settings: Settings, figures: Figures) -> None:
        """Write the figures of a run; the file is whole or not there."""
        path = self._path(settings)
        path.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps({"settings": settings, "figures": figures}, indent=1)
        scratch = path.with_suffix(f".{os.getpid()}")
        scratch.write_text(text, encoding="utf-8")
        scratch.replace(path)

    def _path(self, settings: Settings) -> Path:
        text = json.dumps(settings, sort_keys=True)
        return self.folder / f"{hashlib.sha256(text.encode()).hexdigest()[:20]}.json"


def run_all(
    run: Run,
    runs: Sequence[Settings],
    cache: RunCache,
    *,
    workers: int = 1,
    observer: Observer | None = None,
) -> list[Figures]:
    """The figures of all runs, in their order; what is cached is not run again.

    Args:
        run: takes settings, returns figures; both are JSON.
        runs: settings of each run; equal ones are run once.
        cache: where finished runs are kept, also when a later one fails or is interrupted.
        workers: processes at a time; with 1 the runs stay in this process.
        observer: told of every run, cached ones first.
    """
    distinct = {json.dumps(settings, sort_keys=True): settings for settings in runs}
    found: dict[str, Figures] = {}

    def take(key: str, figures: Figures) -> None:
        found[key] = figures
        if observer is not None:
            observer(len(found), len(distinct), distinct[key], figures)

    for key, settings in distinct.items():
        figures = cache.load(settings)
        if figures is not None:
            take(key, figures)
    open_runs = {key: settings for key, settings in distinct.items() if key not in found}
    if workers <= 1:
        for key, settings in open_runs.items():
            figures = run(settings)
            cache.keep(settings, figures)
            take(key, figures)
    elif open_runs:
        _run_in_processes(run, open_runs, cache, min(workers, len(open_runs)), take)
    return [found[json.dumps(settings, sort_keys=True)] for settings in runs]


def _run_in_processes(
    run: Run,
    runs: dict[str, Settings],
    cache: RunCache,
    workers: int,
    take: Callable[[str, Figures], None],
) -> None:
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(
        workers, context, initializer=torch.set_num_threads, initargs=(1,)
    ) as pool:
        waiting: dict[Future[Figures], str] = {
            pool.submit(run, settings): key for key, settings in runs.items()
        }
        try:
            while waiting:
                done, _ = wait(waiting, return_when=FIRST_COMPLETED)
                for future in done:
                    key = waiting.pop(future)
                    figures = future.result()
                    cache.keep(runs[key], figures)
                    take(key, figures)
        except BaseException:
            # A run may take minutes: one that was begun is not waited for.
            pool.shutdown(wait=False, cancel_futures=True)
            for child in multiprocessing.active_children():
                child.kill()
            raise


def clock() -> Callable[[], float]:
    """Seconds of work: of this process's processor time where it computes with one thread on a CPU,
    which a busy machine doesn't distort; of wall-clock time otherwise."""
    alone = torch.get_num_threads() == 1 and not torch.cuda.is_available()
    return time.process_time if alone else time.perf_counter


class Stopwatch:
    """Seconds of work since construction."""

    def __init__(self) -> None:
        self._clock = clock()
        self._start = self._clock()

    @property
    def seconds(self) -> float:
        """Seconds since construction."""
        return self._clock() - self._start
