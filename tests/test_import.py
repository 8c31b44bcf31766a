"""Importing the package costs nothing, and what needs no torch imports none."""

import subprocess
import sys

import pytest


def python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return done.stdout


@pytest.mark.parametrize("module", ["tiny_onn", "tiny_onn.arc", "tiny_onn.cli.main"])
def test_light_modules_load_nothing_heavy(module):
    code = (
        f"import sys, {module}; print([m for m in ('torch', 'transformers') if m in sys.modules])"
    )
    assert python(code).strip() == "[]"


def test_importing_the_package_is_quick():
    code = "import time; t = time.perf_counter(); import tiny_onn; print(time.perf_counter() - t)"
    assert min(float(python(code)) for _ in range(3)) < 0.2


def test_the_public_names_of_the_design():
    code = """
from tiny_onn.optim import ARS2Neo, orthogonalize, param_groups
from tiny_onn.routing import LinearRouter, CosineRouter, CrossAttentionRouter, MLPRouter
from tiny_onn.routing import ROUTERS, Routing, GroupedExperts
from tiny_onn.shaping import RoutingShaper, FisherShaper, LoadBalanceShaper, SHAPERS
from tiny_onn.models import TinyOnnConfig, TinyOnnModel, TinyOnnForCausalLM
from tiny_onn.arc import Task, load_tasks, ARCTrainer, solve, score, write_submission
assert callable(solve) and callable(score)
import tiny_onn.arc.solving, tiny_onn.arc.scoring
from tiny_onn.arc import solve, score
assert callable(solve) and callable(score)
assert {"linear", "cpr", "capr", "mlp"} <= set(ROUTERS) and {"none", "fars"} <= set(SHAPERS)
"""
    assert python(code) == ""
