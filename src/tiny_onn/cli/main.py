"""The command line: its commands, and what its errors look like.

A command's module is imported when the command is asked for, so that ``--help`` needs no torch.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import Any

import typer
from typer.core import TyperGroup
from typer.main import get_command

from tiny_onn import __version__
from tiny_onn.cli.process import tune

COMMANDS = {
    "solve": "Train on the demonstrations of the chosen tasks; answer each test input twice.",
    "train": "Train a checkpoint on the demonstrations of the chosen tasks.",
    "eval": "Answer the tests of the tasks that a checkpoint was trained on.",
    "data": "List, show and check tasks.",
    "report": "Write the HTML report of a run again.",
    "bench": "Speed and memory, ours beside the peers.",
    "study": "Put a claim to the test over several seeds.",
}
"""Every command with its line of help. Command NAME is the function or typer app NAME in
``tiny_onn.cli.NAME``."""

MENDABLE = (ValueError, FileNotFoundError, NotADirectoryError, PermissionError)
"""What a user did, and can mend: exit status 2. Anything else is ours: exit status 1."""

EXTRAS = {
    "mnist1d": "bench",
    "pytorch_optimizer": "bench",
    "tensorboard": "tensorboard",
}
"""Packages that only some commands need, and the extra of this package that brings them."""

LIST_OPTIONS = ("--tasks",)


class _Commands(TyperGroup):
    """A group whose commands are imported when they are run or asked for help."""

    def list_commands(self, ctx: Any) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        if cmd_name not in COMMANDS:
            return None
        found = getattr(import_module(f"tiny_onn.cli.{cmd_name}"), cmd_name)
        if isinstance(found, typer.Typer):
            return get_command(found)
        app = typer.Typer(add_completion=False)
        app.command(cmd_name)(found)
        return get_command(app)

    def format_help(self, ctx: Any, formatter: Any) -> None:
        width = max(map(len, COMMANDS))
        lines = [f"  {name:{width}}  {text}" for name, text in COMMANDS.items()]
        typer.echo("Usage: tiny-onn COMMAND [OPTIONS]\n")
        typer.echo("Solve ARC tasks with small sparse transformers.\n\nCommands:")
        typer.echo("\n".join(lines) + "\n\ntiny-onn COMMAND --help says more.")


app = typer.Typer(cls=_Commands, add_completion=False)


@app.callback()
def tiny_onn() -> None:
    """Solve ARC tasks with small sparse transformers."""


def main(argv: Sequence[str] | None = None) -> None:
    """Run a command and exit with its status."""
    tune()
    sys.exit(run(list(sys.argv[1:] if argv is None else argv)))


def run(argv: list[str]) -> int:
    """Run a command; 0 for success, 2 for what the user must mend, 130 when interrupted."""
    if argv == ["--version"]:
        typer.echo(f"tiny-onn {__version__}")
        return 0
    try:
        result = get_command(app)(
            spread(argv or ["--help"]), prog_name="tiny-onn", standalone_mode=False
        )
        return result if isinstance(result, int) else 0
    except typer.Exit as done:
        return int(done.exit_code)
    except (KeyboardInterrupt, typer.Abort):
        return _fail("interrupted", 130)
    except BrokenPipeError:
        # The reader has gone: write no more, not even at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except Exception as error:
        if hasattr(error, "format_message"):  # how the parser says what is wrong with the words
            return _fail(_one_line(error.format_message()), 2)
        if "--debug" in argv:
            raise
        return _explain(error)


def spread(argv: Sequence[str]) -> list[str]:
    """Write ``--tasks a b,c`` as ``--tasks a --tasks b --tasks c``, which is what click reads."""
    words: list[str] = []
    option: str | None = None
    for word in argv:
        if word in LIST_OPTIONS:
            option = word
        elif option is not None and not word.startswith("-"):
            words += [x for part in word.split(",") if part for x in (option, part)]
        else:
            option = None
            words.append(word)
    return words


def _explain(error: Exception) -> int:
    from tiny_onn.arc.parsing import TaskError

    if isinstance(error, TaskError):
        return _fail(error.problems, 2)
    if isinstance(error, MENDABLE):
        return _fail(_one_line(error), 2)
    if type(error).__name__ == "StoppedError":
        return _fail(f"{_one_line(error)}; --resume goes on from there", 130)
    if type(error).__name__ in ("TrainingError", "CheckpointError"):
        return _fail(_one_line(error), 1)
    if isinstance(error, ModuleNotFoundError) and error.name in EXTRAS:
        extra = EXTRAS[error.name]
        return _fail(f"{error.name} is missing: pip install 'tiny-onn[{extra}]' brings it", 2)
    if isinstance(error, OSError):
        return _fail(_one_line(error), 1)
    return _fail(f"internal: {type(error).__name__}: {_one_line(error)} (--debug shows where)", 1)


def _one_line(error: Exception | str) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _fail(messages: str | Sequence[str], status: int) -> int:
    for message in [messages] if isinstance(messages, str) else messages:
        sys.stderr.write(f"error: {message}\n")
    return status
