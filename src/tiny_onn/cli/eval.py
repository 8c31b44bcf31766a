"""``tiny-onn eval``: answer the tests of the tasks that a checkpoint was trained on."""

from __future__ import annotations

from pathlib import Path

from tiny_onn.cli import options as opt
from tiny_onn.cli import runs


def eval(
    data: opt.Data = None,
    tasks: opt.Tasks = None,
    max_cells: opt.MaxCells = None,
    split: opt.Split = None,
    config: opt.Config = None,
    out: opt.Out = Path("runs/train"),
    threads: opt.Threads = None,
    device: opt.Device = "cpu",
    json: opt.Json = False,
    debug: opt.Debug = False,
) -> None:
    """Score the checkpoint in --out: answer each test input of its tasks, or of some, twice.

    What it finds goes into the folder eval in there. --data may name another copy of the tasks, for
    example one that comes with their answers.
    """
    opt.use_threads(threads)
    recipe = runs.read_recipe(out, config, resume=True, settings={})
    learnt = runs.learnt_tasks(out, data)
    from tiny_onn.arc.solving import solution, trained
    from tiny_onn.cli.display import RunDisplay
    from tiny_onn.cli.results import write_tasks
    from tiny_onn.config import dump_config

    chosen = learnt.select(tasks) if tasks else learnt
    if split is not None:
        ids = [key for key in chosen.ids if chosen.splits.get(key) == split]
        if not ids:
            raise ValueError(f"none of the {len(chosen)} tasks is of split {split!r}")
        chosen = chosen.select(ids)
    if max_cells is not None:
        chosen = chosen.within(max_cells)
    run = trained(learnt, recipe, out, device=device)
    console, folder = opt.console(json), out / "eval"
    write_tasks(folder, chosen, dump_config(recipe))
    with RunDisplay(console) as display:
        answered = solution(run, learnt, ids=chosen.ids, on_decode=display.on_decode)
    runs.finish(folder, chosen, recipe, answered, console, json)
