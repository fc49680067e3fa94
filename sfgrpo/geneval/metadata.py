"""One line of a GenEval metadata file, read strictly: what no image could be judged by is refused."""

from __future__ import annotations

import json
import unicodedata
from collections import Counter
from collections.abc import Collection, Mapping
from typing import Any

from sfgrpo.geneval.scorer import MAX_OBJECTS
from sfgrpo.types import RELATIONS, TAGS, Clause, Prompt, Relation

PROMPT_KEYS = ("tag", "include", "exclude", "prompt")
CLAUSE_KEYS = ("class", "count", "color", "position")
MAX_DIGITS = 20
SHOWN_LENGTH = 60
"""Characters of a value that a message repeats."""


def parse_prompt(line: str) -> Prompt:
    """Read one line of a GenEval metadata file.

    Raises:
        ValueError: the line is no JSON object, or holds what no image could be judged by.
    """
    try:
        metadata = json.loads(
            line, object_pairs_hook=_without_repeats, parse_int=_integer, parse_constant=_refuse_constant
        )
    except json.JSONDecodeError as error:
        raise ValueError(
            f"is no JSON object ({error.msg} at column {error.colno}); write every prompt on one line"
        ) from error
    except RecursionError as error:
        raise ValueError("is nested too deeply for a prompt; write an object with tag, include and prompt") from error
    return prompt_from_metadata(metadata)


def prompt_from_metadata(metadata: Any) -> Prompt:
    """Build a prompt from GenEval's metadata; raise `ValueError` where no image could be judged by it."""
    if not isinstance(metadata, dict):
        cure = "write one object a line, without brackets or commas around them"
        raise ValueError(f"{shown(metadata)} is no JSON object; {cure}")
    _require_keys(metadata, "", PROMPT_KEYS, ("tag", "include", "prompt"))
    if metadata["tag"] not in TAGS:
        raise ValueError(f"tag {shown(metadata['tag'])} is unknown; allowed are {', '.join(TAGS)}")
    include = [_clause(item, f"include[{index}]") for index, item in enumerate(_items(metadata, "include"))]
    exclude = [_clause(item, f"exclude[{index}]") for index, item in enumerate(_items(metadata, "exclude"))]
    if not include:
        raise ValueError("include is empty; name at least one object that the image has to show")
    _require_possible(include, exclude)
    text = _text(metadata["prompt"], "prompt")
    return Prompt(text=text, tag=metadata["tag"], include=tuple(include), exclude=tuple(exclude))


def shown(value: Any) -> str:
    """Return a value as JSON, cut to what a message has room for."""
    text = json.dumps(value)
    return text if len(text) <= SHOWN_LENGTH else f"{text[:SHOWN_LENGTH]}..."


def _clause(item: Any, where: str) -> Clause:
    """Read one item of the include or exclude list."""
    if not isinstance(item, dict):
        raise ValueError(
            f"{where}: {shown(item)} is no object; write class and count, and color or position if need be"
        )
    _require_keys(item, f"{where}: ", CLAUSE_KEYS, ("class", "count"))
    count, color, position = item["count"], item.get("color"), item.get("position")
    if type(count) is not int or not 1 <= count <= MAX_OBJECTS:
        # GenEval looks at no more objects of a class.
        raise ValueError(f"{where}.count: {shown(count)} is no whole number from 1 to {MAX_OBJECTS}; write one")
    return Clause(
        class_name=_text(item["class"], f"{where}.class"),
        count=count,
        color=None if color is None else _text(color, f"{where}.color"),
        position=None if position is None else _position(position, f"{where}.position"),
    )


def _position(position: Any, where: str) -> tuple[Relation, int]:
    if not isinstance(position, list) or len(position) != 2:
        raise ValueError(f'{where}: {shown(position)} is no relation to a clause; write one such as ["left of", 0]')
    relation, target = position
    if relation not in RELATIONS:
        raise ValueError(f"{where}: relation {shown(relation)} is unknown; allowed are {', '.join(RELATIONS)}")
    if type(target) is not int:
        raise ValueError(f"{where}: {shown(target)} is no position of a clause; write a whole number from 0")
    return relation, target


def _require_possible(include: Collection[Clause], exclude: Collection[Clause]) -> None:
    """Refuse clauses that no image can fulfil, or of which a part would be overlooked, under GenEval's rules."""
    counts: dict[str, int] = {}
    for index, clause in enumerate(include):
        if clause.position is not None and not 0 <= clause.position[1] < index:
            raise ValueError(
                f"include[{index}].position: clause {clause.position[1]} is none of the {index} before this one; name "
                "the target first, and refer to it by its position from 0"
            )
        if clause.class_name in counts:
            raise ValueError(
                f"include[{index}].class: {shown(clause.class_name)} is asked for twice, and GenEval would judge both "
                "clauses by the same objects; ask for it once, with its count"
            )
        counts[clause.class_name] = clause.count
    for index, clause in enumerate(exclude):
        if clause.color is not None or clause.position is not None:
            raise ValueError(
                f"exclude[{index}]: GenEval excludes by class and count alone; take color and position out"
            )
        if clause.count <= counts.get(clause.class_name, 0):
            raise ValueError(
                f"exclude[{index}].count: {clause.count} {shown(clause.class_name)} are forbidden, and include asks "
                f"for {counts[clause.class_name]}; forbid more than that"
            )


def _items(metadata: Mapping[str, Any], key: str) -> list[Any]:
    items = metadata.get(key, [])
    if not isinstance(items, list):
        raise ValueError(f"{key}: {shown(items)} is no list; write a list of objects with class and count")
    return items


def _text(value: Any, where: str) -> str:
    """Return a text that can be encoded, drawn and recorded."""
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"{where}: {shown(value)} is no text; write a string that is not blank")
    for character in "" if value.isprintable() else value:
        # Tabs and line ends are white space to a tokenizer; other control characters and half characters are damage.
        if unicodedata.category(character) in ("Cc", "Cs") and character not in "\t\n\r":
            raise ValueError(f"{where}: holds U+{ord(character):04X}, which is no character of a text; take it out")
    return value


def _require_keys(item: Mapping[str, Any], prefix: str, allowed: Collection[str], required: Collection[str]) -> None:
    for key in item:
        if key not in allowed:
            raise ValueError(f"{prefix}key {shown(key)} is unknown; allowed are {', '.join(allowed)}")
    for key in required:
        if key not in item:
            raise ValueError(f"{prefix}key '{key}' is missing; write a line of GenEval metadata")


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    item = dict(pairs)
    if len(item) < len(pairs):
        repeated, _ = Counter(key for key, _ in pairs).most_common(1)[0]
        raise ValueError(f"key {shown(repeated)} is there twice; write it once")
    return item


def _integer(digits: str) -> int:
    if len(digits) > MAX_DIGITS:
        raise ValueError(f"{digits[:MAX_DIGITS]}... is too large a number for a prompt; write a smaller one")
    return int(digits)


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no value of JSON; write a number")
