"""Prompt files and the order in which updates use them."""

from __future__ import annotations

import hashlib

import pytest

from sfgrpo.geneval.grammar import counting, position, single_object
from sfgrpo.prompts import prompts_digest, prompts_of_update, read_prompts, write_prompts

PROMPTS = [counting("dog", 3), position("dog", "cat", "above"), single_object("dog"), single_object("dog")]


def test_prompts_survive_a_file(tmp_path):
    path = tmp_path / "prompts.jsonl"
    write_prompts(path, PROMPTS)
    assert read_prompts(path) == PROMPTS
    assert [entry.name for entry in path.parent.iterdir()] == ["prompts.jsonl"]


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "prompts.jsonl"
    write_prompts(path, PROMPTS)

    def broken():
        yield PROMPTS[0]
        raise RuntimeError("no more")

    with pytest.raises(RuntimeError, match="no more"):
        write_prompts(path, broken())
    assert read_prompts(path) == PROMPTS
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("{", "Expecting property name"),
        ("", "Expecting value"),
        ("[]", "list indices"),
        ('{"tag": "colors", "include": []}', "key 'prompt' is missing"),
        ('{"tag": "smell", "include": [], "prompt": ""}', "tag 'smell' is unknown; allowed are"),
        ('{"tag": "colors", "include": [{"class": "dog", "count": 1, "hue": 1}], "prompt": ""}', "unknown keys"),
        ('{"tag": "colors", "include": [{"class": "dog"}], "prompt": ""}', "key 'count' is missing"),
    ],
)
def test_a_bad_line_is_named_with_path_and_number(tmp_path, line, complaint):
    path = tmp_path / "prompts.jsonl"
    write_prompts(path, PROMPTS[:1])
    path.write_text(path.read_text() + line + "\n")
    with pytest.raises(ValueError, match=rf"prompts.jsonl:2: .*{complaint}"):
        read_prompts(path)


def test_digest_is_that_of_the_file_and_knows_the_order(tmp_path):
    path = tmp_path / "prompts.jsonl"
    write_prompts(path, PROMPTS)
    assert prompts_digest(PROMPTS) == hashlib.sha256(path.read_bytes()).hexdigest()
    assert prompts_digest(PROMPTS) != prompts_digest(PROMPTS[::-1])


@pytest.mark.parametrize(("num_prompts", "per_update"), [(12, 4), (10, 4), (3, 8), (5, 5)])
def test_every_epoch_holds_every_position_once(num_prompts, per_update):
    prompts = PROMPTS[:1] * num_prompts
    row = [index for update in range(30) for index in prompts_of_update(prompts, update, per_update, seed=7)]
    epochs = [row[start : start + num_prompts] for start in range(0, len(row) - num_prompts + 1, num_prompts)]
    assert all(sorted(epoch) == list(range(num_prompts)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 1


def test_an_update_is_a_function_of_its_arguments_alone():
    prompts = PROMPTS * 25
    first = prompts_of_update(prompts, 41, 8, seed=0)
    assert first == prompts_of_update(prompts, 41, 8, seed=0)
    assert first != prompts_of_update(prompts, 41, 8, seed=1)
    assert first != prompts_of_update(prompts, 42, 8, seed=0)
    assert all(type(index) is int for index in first)


@pytest.mark.parametrize(("prompts", "update_index", "per_update"), [([], 0, 1), (PROMPTS, 0, 0), (PROMPTS, -1, 1)])
def test_impossible_updates_are_refused(prompts, update_index, per_update):
    with pytest.raises(ValueError, match="non-empty prompt set"):
        prompts_of_update(prompts, update_index, per_update, seed=0)
