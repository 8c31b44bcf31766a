"""Typed configuration: nested dataclasses, filled from a TOML file and from overrides.

A key that no dataclass has, or a value of another type, is an error that names the key, the
nearest known key, the file and the line.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import re
import tomllib
import typing
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import tomli_w
from pydantic import TypeAdapter, ValidationError

T = TypeVar("T")


class ConfigError(ValueError):
    """What a user must mend in a configuration; one line."""


def load_config(
    cls: type[T], path: Path | None = None, overrides: Mapping[str, Any] | None = None
) -> T:
    """A configuration of type ``cls``: its defaults, then the file, then the overrides.

    Args:
        cls: a dataclass whose fields are values or further dataclasses (sections).
        path: a TOML file, or None for defaults alone.
        overrides: dotted keys and values, such as ``{"schedule.steps": 10}``; None is not given.

    Raises:
        ConfigError: for a file that is missing or not TOML, an unknown key or a wrong value.
    """
    text = _read(path) if path is not None else ""
    table = _parse(path, text)
    known = set(_keys(cls))
    for key in _leaves(table):
        if key not in known:
            raise ConfigError(f"{_place(path, text, key)}unknown key {key!r}{_nearest(key, known)}")
    for key, value in (overrides or {}).items():
        if value is not None:
            _put(table, key, value)
    try:
        return _validated(cls, table)
    except ValidationError as error:
        first = error.errors()[0]
        key = _blamed(first, known)
        raise ConfigError(f"{_place(path, text, key)}{_complaint(key, first)}") from None


def dump_config(config: Any) -> str:
    """The configuration as TOML, every field with its value; None is left out, as TOML has none.

    ``load_config`` of the text gives an equal configuration, because a field that may be None has
    None as its default.
    """
    return tomli_w.dumps(_without_none(dataclasses.asdict(config)))


def _validated(cls: type[T], table: Mapping[str, Any]) -> T:
    """Build dataclasses from tables; strict types, but an integer may stand for a float."""
    # By way of JSON, because strict validation of Python values would refuse lists for tuples.
    return TypeAdapter(cls).validate_json(json.dumps(table), strict=True)


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(f"{path}: there is no such file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from None


def _parse(path: Path | None, text: str) -> dict[str, Any]:
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path}: not TOML: {error}") from None


def _keys(cls: type[Any], prefix: str = "") -> Iterator[str]:
    """Dotted keys of all values of a nested dataclass."""
    for field in dataclasses.fields(cls):
        section = _section(cls, field.name)
        if section is None:
            yield prefix + field.name
        else:
            yield from _keys(section, f"{prefix}{field.name}.")


def _section(cls: type[Any], name: str) -> type[Any] | None:
    hint = typing.get_type_hints(cls)[name]
    return hint if dataclasses.is_dataclass(hint) and isinstance(hint, type) else None


def _leaves(table: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    for key, value in table.items():
        if isinstance(value, Mapping) and value:
            yield from _leaves(value, f"{prefix}{key}.")
        elif not isinstance(value, Mapping):
            yield prefix + key


def _put(table: dict[str, Any], key: str, value: Any) -> None:
    *sections, name = key.split(".")
    for section in sections:
        table = table.setdefault(section, {})
    table[name] = value


def _place(path: Path | None, text: str, key: str) -> str:
    """``FILE:LINE: `` of a dotted key in a TOML file, as far as it is there."""
    if path is None:
        return ""
    *sections, name = key.split(".")
    current: list[str] = []
    for number, line in enumerate(text.splitlines(), start=1):
        if header := re.match(r"\s*\[\s*([^\[\]]+?)\s*\]", line):
            current = [part.strip().strip("\"'") for part in header[1].split(".")]
        elif (entry := re.match(r"\s*([\w.\"'-]+)\s*=", line)) and current + [
            part.strip("\"'") for part in entry[1].split(".")
        ] == [*sections, name]:
            return f"{path}:{number}: "
    return f"{path}: "


def _nearest(key: str, known: set[str]) -> str:
    names = {k.rsplit(".", 1)[-1]: k for k in sorted(known, reverse=True)}
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.6) or [
        names[name] for name in difflib.get_close_matches(key.rsplit(".", 1)[-1], names, n=1)
    ]
    return f"; did you mean {near[0]!r}?" if near else ""


def _blamed(error: Any, known: set[str]) -> str:
    """The dotted key an error is about. What a dataclass itself refuses is known by its section
    only, but its message begins with the field."""
    key = ".".join(part for part in error["loc"] if isinstance(part, str))
    if error["type"] == "value_error":
        field = str(error["ctx"]["error"]).split(" ", 1)[0].split("[", 1)[0]
        named = f"{key}.{field}".lstrip(".")
        return named if named in known else key
    return key


def _complaint(key: str, error: Any) -> str:
    if error["type"] == "value_error":
        section = key.rsplit(".", 1)[0]
        return f"{section + ': ' if section else ''}{error['ctx']['error']}"
    message = str(error["msg"]).removeprefix("Input should be ")
    return f"{key}: expected {message}, got {error['input']!r}"


def _without_none(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _without_none(v) for k, v in value.items() if v is not None}
    return value
