"""Imports run downward only: which part may import which, read off the code itself."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "tiny_onn"

DATA = ("arc.grids", "arc.parsing", "arc.sources", "arc.tasks", "arc.augment", "arc.tokens")
PICTURES = ("arc.draw", "arc.charts", "arc.scoring", "arc.submission")
ALLOWED = {
    "optim": ("optim",),
    "routing": ("routing",),
    "models": ("models", "routing"),
    "shaping": ("shaping", "routing"),
    **{module: DATA for module in DATA},
    **{module: (*DATA, *PICTURES) for module in PICTURES},
    "arc": ("arc", "models", "optim", "routing", "shaping"),
    "config": (),
    "runinfo": (),
    "benchmarks": ("benchmarks", "arc", "config", "models", "optim", "routing", "shaping"),
    "studies": ("studies", "arc", "config", "models", "optim", "routing", "shaping"),
    "cli": ("cli", "arc", "benchmarks", "config", "runinfo", "studies"),
    "__main__": ("cli",),
}
"""What a part may import of ours; the longest name that fits a module is the one that counts."""

PACKAGE_ONLY = {"tiny_onn"}
"""The bare package (its version) may be imported by all."""


def modules() -> list[Path]:
    return sorted(path for path in SOURCE.rglob("*.py") if path != SOURCE / "__init__.py")


def name_of(path: Path) -> str:
    relative = path.relative_to(SOURCE).with_suffix("")
    return ".".join(part for part in relative.parts if part != "__init__")


def imports_of(tree: ast.AST) -> set[str]:
    """All modules named in import statements, also those inside functions."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 or node.module is not None
            found.add(node.module or "")
    return found


def within(module: str, part: str) -> bool:
    return module == part or module.startswith(f"{part}.")


@pytest.mark.parametrize("path", modules(), ids=name_of)
def test_imports_run_downward(path):
    name = name_of(path)
    part = max((key for key in ALLOWED if within(name, key)), key=len)
    for module in imports_of(ast.parse(path.read_text(encoding="utf-8"))):
        if within(module, "tiny_onn") and module not in PACKAGE_ONLY:
            target = module.removeprefix("tiny_onn.")
            fits = any(within(target, allowed) for allowed in ALLOWED[part])
            # The arc package's own __init__ is lazy: naming it loads nothing but what is asked.
            lazy = target == "arc" and part == "cli"
            assert fits or lazy, f"{name} ({part}) must not import {module}"


@pytest.mark.parametrize("path", modules(), ids=name_of)
def test_only_the_command_line_imports_typer(path):
    if not within(name_of(path), "cli"):
        assert "typer" not in imports_of(ast.parse(path.read_text(encoding="utf-8")))


@pytest.mark.parametrize("path", modules(), ids=name_of)
def test_a_module_is_read_in_one_sitting(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 400


def test_the_check_itself_can_fail():
    tree = ast.parse("def f():\n    from tiny_onn.arc.trainer import ARCTrainer")
    assert imports_of(tree) == {"tiny_onn.arc.trainer"}
    assert not any(within("arc.trainer", allowed) for allowed in ALLOWED["optim"])
