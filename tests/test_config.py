"""Recipes: defaults, then the file, then the flags; every mistake is named with its place."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest

from tiny_onn.config import ConfigError, dump_config, load_config

ROOT = Path(__file__).parents[1]


@dataclass(frozen=True)
class Inner:
    rate: float = 0.5
    steps: int | None = None
    mode: Literal["slow", "quick"] = "slow"
    betas: tuple[float, float] = (0.9, 0.95)

    def __post_init__(self) -> None:
        if self.rate < 0:
            raise ValueError(f"rate must be at least 0. Got {self.rate}")


@dataclass(frozen=True)
class Outer:
    inner: Inner = field(default_factory=Inner)
    names: tuple[str, ...] = ()
    seed: int = 0
    verbose: bool = False


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "recipe.toml"
    path.write_text(text, encoding="utf-8")
    return path


def test_the_file_beats_defaults_and_overrides_beat_the_file(tmp_path):
    path = write(tmp_path, 'seed = 3\nnames = ["a"]\n[inner]\nrate = 1\nsteps = 5\n')
    config = load_config(Outer, path, {"inner.steps": 7, "seed": None, "names": ["b", "c"]})
    assert config == Outer(Inner(rate=1.0, steps=7), names=("b", "c"), seed=3)
    assert load_config(Outer) == Outer()


def test_what_is_written_can_be_read(tmp_path):
    config = Outer(Inner(rate=0.25, steps=9, mode="quick", betas=(0.1, 0.2)), ("x",), 4, True)
    assert load_config(Outer, write(tmp_path, dump_config(config))) == config
    assert load_config(Outer, write(tmp_path, dump_config(Outer()))) == Outer()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "\n[inner]\nrtae = 1",
            "recipe.toml:3: unknown key 'inner.rtae'; did you mean 'inner.rate'?",
        ),
        ("steps = 1", "recipe.toml:1: unknown key 'steps'; did you mean 'inner.steps'?"),
        ("[other]\nzzz = 1", "recipe.toml:2: unknown key 'other.zzz'"),
        (
            '[inner]\nsteps = "many"',
            "recipe.toml:2: inner.steps: expected a valid integer, got 'many'",
        ),
        ("[inner]\nsteps = 1.5", "recipe.toml:2: inner.steps: expected a valid integer, got 1.5"),
        ('[inner]\nmode = "fast"', "recipe.toml:2: inner.mode: expected 'slow' or 'quick'"),
        ("seed = true", "recipe.toml:1: seed: expected a valid integer, got True"),
        ("[inner]\nrate = -1", "recipe.toml:2: inner: rate must be at least 0. Got -1.0"),
        ("[inner\n", "recipe.toml: not TOML"),
    ],
)
def test_mistakes_are_named_with_file_line_and_key(tmp_path, text, message):
    with pytest.raises(ConfigError) as caught:
        load_config(Outer, write(tmp_path, text))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"none.toml: there is no such file"):
        load_config(Outer, tmp_path / "none.toml")


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.toml")), ids=lambda p: p.name)
def test_every_recipe_in_configs_is_read(path):
    from tiny_onn.arc.recipe import Recipe

    assert load_config(Recipe, path) != Recipe()
