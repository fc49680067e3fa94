"""Parameter files: reading, merging, and validation against a pydantic schema with messages for their author."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import json
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

import pydantic
from pydantic_core import ErrorDetails
from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError

from sfgrpo.errors import ConfigError

Schema = TypeVar("Schema")


def read_mapping(path: Path) -> dict[str, Any]:
    """Read a YAML 1.2 file, as DVC does, into a dict; raise `ConfigError` if it holds anything else."""
    try:
        content = YAML(typ="safe", pure=True).load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise ConfigError(f"{path}: cannot be read ({reason}); give the parameter file with --params") from error
    except YAMLError as error:
        raise ConfigError(f"{path}: {_yaml_problem(error)}; correct the YAML") from error
    except (ValueError, RecursionError) as error:
        # A number of thousands of digits, or thousands of brackets.
        raise ConfigError(f"{path}: {str(error).partition(';')[0]}; correct the YAML") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: holds {type(content).__name__} instead of a mapping; write `section: {{...}}`")
    try:
        json.dumps(content, default=str)
    except (TypeError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: {error}; write text as keys, and no part inside of itself") from error
    return content


def read_parameters(path: Path) -> dict[str, Any]:
    """Read a parameter file, merged into the one that it `extends`, if any.

    `extends: ../params.yaml` is relative to the extending file, and the extended one may extend a third. Sections
    merge; any other value replaces that of the extended file.

    Raises:
        ConfigError: A file cannot be read, or files extend one another in a circle.
    """
    files, merged = [path.resolve()], read_mapping(path)
    while "extends" in merged:
        name = merged.pop("extends")
        if not isinstance(name, str):
            raise ConfigError(f"{files[-1]}: extends: {name!r} is no file name; write the path of a parameter file")
        parent = (files[-1].parent / name).resolve()
        if parent in files:
            raise ConfigError(f"{files[-1]}: extends: {name} extends this file in turn; take one of the two lines out")
        files.append(parent)
        merged = _merged(read_mapping(parent), merged)
    return merged


def _merged(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in changes.items():
        both = isinstance(base.get(key), dict) and isinstance(value, dict)
        merged[key] = _merged(base[key], value) if both else value
    return merged


def unknown_key(key: str, allowed: Collection[str]) -> str:
    """Return the error message for a key that no schema has, with the most similar allowed one."""
    nearest = difflib.get_close_matches(key, allowed, n=1)
    hint = f"; did you mean {nearest[0]}?" if nearest else ""
    return f"unknown key; allowed are {', '.join(allowed)}{hint}"


def validated(schema: type[Schema], values: Mapping[str, Any], source: str) -> Schema:
    """Build the dataclass `schema` from plain YAML values; nothing is coerced: "10" and true are no integers.

    A `ValueError` of a check across fields may have several lines, each starting with the dotted path at fault.

    Raises:
        ConfigError: One line for each problem, starting with `source` and the dotted path.
    """
    # JSON is the one input for which pydantic's strict mode takes mappings for dataclasses and lists for tuples.
    document = json.dumps(values, default=str)
    try:
        return pydantic.TypeAdapter(schema).validate_json(document)
    except pydantic.ValidationError as error:
        lines = [line for details in error.errors() for line in _problems(details, schema)]
        raise ConfigError("\n".join(f"{source}: {line}" for line in lines)) from error


def _yaml_problem(error: YAMLError) -> str:
    if isinstance(error, MarkedYAMLError) and error.problem_mark is not None:
        return f"line {error.problem_mark.line + 1}: {error.problem}"
    return str(error)


def _problems(details: ErrorDetails, schema: type) -> Iterator[str]:
    location = [part for part in details["loc"] if part != "[key]"]
    path = ".".join(map(str, location))
    if details["type"] == "unexpected_keyword_argument":
        yield f"{path}: {unknown_key(str(location[-1]), _keys_at(schema, location[:-1]))}"
    elif details["type"] == "missing":
        yield f"{path}: missing; it has no default"
    elif details["type"] == "value_error":
        prefix = f"{path}: " if path else ""
        yield from (prefix + line for line in str(details["ctx"]["error"]).splitlines())
    elif details["msg"].startswith("Input should be "):
        allowed = details["msg"].removeprefix("Input should be ").replace("an object", "a mapping")
        yield f"{path}: {details['input']!r} is not {allowed}"
    else:
        yield f"{path}: {details['input']!r} is not allowed: {details['msg']}"


def _keys_at(schema: type, location: list[int | str]) -> list[str]:
    for part in location:
        schema = get_type_hints(schema)[str(part)]
    return [field.name for field in dataclasses.fields(schema)]


@contextlib.contextmanager
def as_config_error(parameter: str) -> Iterator[None]:
    """Re-raise a `ValueError` of the block as a `ConfigError` that names the parameter."""
    try:
        yield
    except ValueError as error:
        raise ConfigError(f"{parameter}: {error}") from error
