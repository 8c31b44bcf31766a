"""Runs a script as two processes that meet over gloo."""

import subprocess
import sys
import traceback
from pathlib import Path

import torch
import torch.distributed as dist


def run_two(script, folder, timeout=200):
    """Start ``python SCRIPT RANK FOLDER`` twice; the figures that each rank saved."""
    processes = [
        subprocess.Popen(
            [sys.executable, str(script), str(rank), str(folder)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in (0, 1)
    ]
    try:
        outputs = [process.communicate(timeout=timeout)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    # Once in some dozen times a thread of gloo's aborts a process that has done its work.
    assert all(process.returncode in (0, -6) for process in processes), "\n".join(outputs)
    assert all((folder / f"{rank}.pt").exists() for rank in (0, 1)), "\n".join(outputs)
    return [torch.load(folder / f"{rank}.pt") for rank in (0, 1)]


def figures_of(ranks, check):
    """One check's figures of both ranks; what went wrong in it is the test's failure."""
    for rank in ranks:
        assert "error" not in rank[check], rank[check]["error"]
    return [rank[check] for rank in ranks]


def save_figures(checks):
    """In a rank: make each check, with the rank and the folder, and save its figures."""
    rank, folder = int(sys.argv[1]), Path(sys.argv[2])
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder / 'meet'}", rank=rank, world_size=2
    )
    figures = {}
    for name, check in checks.items():
        try:
            figures[name] = check(rank, folder)
        except Exception:
            figures[name] = {"error": traceback.format_exc()}
    torch.save(figures, folder / f"{rank}.pt")
    dist.destroy_process_group()
