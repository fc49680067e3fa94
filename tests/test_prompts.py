"""Prompt files and the order in which updates use them."""

from __future__ import annotations

import dataclasses
import gzip
import hashlib
import json
import os
import re
import shutil

import pytest

from sfgrpo.config.stages import PromptsStage, load_config
from sfgrpo.errors import ConfigError
from sfgrpo.geneval.grammar import counting, position, single_object
from sfgrpo.prompts import (
    GENEVAL,
    make_prompts,
    prompts_digest,
    prompts_of_update,
    read_prompt_file,
    read_prompts,
    write_prompts,
)
from tests.support.paths import ROOT

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


DOG = '{"tag": "single_object", "include": [{"class": "dog", "count": 1}], "prompt": "a photo of a dog"}'
CAT = DOG.replace("dog", "cat")


def line_of(**changes) -> str:
    """Return a line of metadata with some keys replaced, or left out where the value is None."""
    metadata = json.loads(DOG) | changes
    return json.dumps({key: value for key, value in metadata.items() if value is not None})


def clause_line(**changes) -> str:
    return line_of(include=[{"class": "dog", "count": 1} | changes])


def pair_line(*relation) -> str:
    cat = {"class": "cat", "count": 1}
    return line_of(tag="position", include=[{"class": "dog", "count": 1}, cat | {"position": list(relation)}])


@pytest.mark.parametrize(
    "content",
    [
        f"{DOG}\n{CAT}".encode(),
        f"\ufeff{DOG}\n{CAT}\n".encode(),
        f"\ufeff{DOG}\n\ufeff{CAT}\n".encode(),
        f"{DOG}\r\n{CAT}\r\n".encode(),
        f"{DOG}\r{CAT}\r".encode(),
        f"\n\n{DOG}\n \t\n\u3000\n{CAT}\n\n\n".encode(),
        f"  {DOG}  \n\t{CAT}\t\n".encode(),
    ],
    ids=["no last line end", "mark", "two marks", "Windows", "old Mac", "blank lines", "white space"],
)
def test_legal_forms_of_a_file_are_read(tmp_path, content):
    path = tmp_path / "prompts.jsonl"
    path.write_bytes(content)
    assert read_prompts(path) == [single_object("dog"), single_object("cat")]


@pytest.mark.parametrize("separator", ["\u2028", "\u2029", "\x85", "\u00a0", "\\t", "\\n", "\\u2028"])
def test_only_line_ends_end_a_line(tmp_path, separator):
    path = tmp_path / "prompts.jsonl"
    path.write_text(f"{DOG}\n{DOG.replace('a dog', f'a{separator}dog')}\n", encoding="utf-8")
    if separator == "\x85":
        with pytest.raises(ConfigError, match=r"prompts.jsonl:2: prompt: holds U\+0085"):
            read_prompts(path)
    else:
        assert [prompt.text.split() for prompt in read_prompts(path)] == [["a", "photo", "of", "a", "dog"]] * 2


def test_null_is_an_absent_colour_or_position(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text(clause_line(color=None, position=None) + "\n")
    assert read_prompts(path) == [single_object("dog")]


def test_a_place_counts_the_lines_that_are_left_out(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text(f"\n{DOG}\r\n\n{CAT}\n")
    assert [read_prompt_file(path).place(index) for index in (0, 1)] == [f"{path}:2", f"{path}:4"]


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("{", "is no JSON object .Expecting property name"),
        (DOG + ",", "is no JSON object .Extra data at column 98"),
        (DOG[:-1], "is no JSON object"),
        (DOG.replace("}]", ",}]"), "is no JSON object"),
        ("a photo of a dog", "is no JSON object"),
        ("[" * 100_000, "is nested too deeply"),
        ("[]", r"\[\] is no JSON object; write one object a line"),
        (f"[{DOG}, {CAT}]", "is no JSON object; write one object a line, without brackets"),
        ("1", "1 is no JSON object"),
        ("null", "null is no JSON object"),
        ('"a photo of a dog"', '"a photo of a dog" is no JSON object'),
        (line_of(prompt=None), "key 'prompt' is missing"),
        (line_of(tag=None), "key 'tag' is missing"),
        (line_of(include=None), "key 'include' is missing"),
        (line_of(tag="smell"), 'tag "smell" is unknown; allowed are single_object'),
        (line_of(tag=["colors"]), r'tag \["colors"\] is unknown'),
        (line_of(tag=True), "tag true is unknown"),
        (line_of(seed=3), 'key "seed" is unknown; allowed are tag, include, exclude, prompt'),
        (DOG.replace('"tag"', '"prompt": "x", "tag"'), 'key "prompt" is there twice'),
        (DOG.replace('"count"', '"class": "x", "count"'), 'key "class" is there twice'),
        (line_of(prompt=""), 'prompt: "" is no text; write a string that is not blank'),
        (line_of(prompt=" \t\u3000"), "prompt: .* is no text"),
        (line_of(prompt=7), "prompt: 7 is no text"),
        (line_of(prompt=["a"]), r'prompt: \["a"\] is no text'),
        (line_of(prompt="a \ud800 dog"), r"prompt: holds U\+D800"),
        (line_of(prompt="a \0 dog"), r"prompt: holds U\+0000"),
        (line_of(prompt="a \x1b[31m dog"), r"prompt: holds U\+001B"),
        (line_of(include=[]), "include is empty; name at least one object"),
        (line_of(include={}), "include: {} is no list"),
        (line_of(include="dog"), 'include: "dog" is no list'),
        (line_of(include=["dog"]), r'include\[0\]: "dog" is no object'),
        (line_of(include=[None]), r"include\[0\]: null is no object"),
        (line_of(include=[{"class": "dog"}]), r"include\[0\]: key 'count' is missing"),
        (line_of(include=[{"count": 1}]), r"include\[0\]: key 'class' is missing"),
        (clause_line(hue=1), r'include\[0\]: key "hue" is unknown; allowed are class, count, color, position'),
        (line_of(include=[{"class": "dog", "count": 1}] * 2), r'include\[1\].class: "dog" is asked for twice'),
        (clause_line(**{"class": ""}), r'include\[0\].class: "" is no text'),
        (clause_line(**{"class": 3}), r"include\[0\].class: 3 is no text"),
        (clause_line(color=""), r'include\[0\].color: "" is no text'),
        (clause_line(color=["red"]), r"include\[0\].color: .* is no text"),
        *(
            (clause_line(count=count), rf"include\[0\].count: {re.escape(shown)} is no whole number from 1 to 16")
            for count, shown in [
                ("2", '"2"'),
                (0, "0"),
                (-1, "-1"),
                (True, "true"),
                (False, "false"),
                (1.5, "1.5"),
                (1.0, "1.0"),
                (1e99, "1e+99"),
                (17, "17"),
                ([1], "[1]"),
            ]
        ),
        (clause_line().replace("1}", "null}"), r"include\[0\].count: null is no whole number"),
        (clause_line().replace("1}", "NaN}"), "NaN is no value of JSON"),
        (clause_line().replace("1}", "-Infinity}"), "-Infinity is no value of JSON"),
        (clause_line().replace("1}", f"{'9' * 5000}}}"), "99999999999999999999... is too large a number"),
        (pair_line("beside", 0), 'relation "beside" is unknown; allowed are left of'),
        (pair_line(["left of"], 0), r'relation \["left of"\] is unknown'),
        (pair_line("left of"), r"include\[1\].position: \[.*\] is no relation to a clause"),
        (pair_line("left of", 0, 0), "is no relation to a clause"),
        (pair_line("left of", 1), r"include\[1\].position: clause 1 is none of the 1 before this one"),
        (pair_line("left of", 2), "clause 2 is none of the 1 before"),
        (pair_line("left of", -1), "clause -1 is none of the 1 before"),
        (pair_line("left of", "0"), '"0" is no position of a clause'),
        (pair_line("left of", False), "false is no position of a clause"),
        (pair_line("left of", 0.0), "0.0 is no position of a clause"),
        (clause_line(position="left of"), '"left of" is no relation to a clause'),
        (clause_line(position=["left of", 0]), r"include\[0\].position: clause 0 is none of the 0 before"),
        (line_of(exclude="dog"), 'exclude: "dog" is no list'),
        (
            line_of(exclude=[{"class": "dog", "count": 1}]),
            r'exclude\[0\].count: 1 "dog" are forbidden, and include asks',
        ),
        (line_of(exclude=[{"class": "dog", "count": 2, "color": "red"}]), r"exclude\[0\]: GenEval excludes by class"),
        (line_of(exclude=[{"class": "dog", "count": 0}]), r"exclude\[0\].count: 0 is no whole number"),
        ("\0", "holds a NUL"),
    ],
)
def test_a_bad_line_is_named_with_path_and_number(tmp_path, line, complaint):
    path = tmp_path / "prompts.jsonl"
    path.write_text(f"{CAT}\n\n{line}\n", encoding="utf-8")
    with pytest.raises(ConfigError, match=rf"^{path}:3: .*{complaint}") as caught:
        read_prompts(path)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize("null", ["exclude"])
def test_null_is_no_list(tmp_path, null):
    path = tmp_path / "prompts.jsonl"
    path.write_text(DOG.replace('"prompt"', f'"{null}": null, "prompt"'))
    with pytest.raises(ConfigError, match=f"prompts.jsonl:1: {null}: null is no list"):
        read_prompts(path)


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (b"", "prompts.jsonl: holds no prompt; write it by `python -m sfgrpo prompts`"),
        (b"\xef\xbb\xbf\r\n\n", "prompts.jsonl: holds no prompt"),
        (f"{DOG}\n{CAT}\n".encode("utf-16"), "prompts.jsonl:1: byte 0xff is not UTF-8; save the file as UTF-8"),
        (f"{DOG}\n{CAT}\n".encode("utf-16-le"), "prompts.jsonl:1: holds a NUL, as UTF-16 text does"),
        (f"{DOG}\n{CAT}\n".encode("utf-32"), "prompts.jsonl:1: byte 0xff is not UTF-8"),
        (
            f"{DOG}\r\n\n{CAT}\n".replace("cat", "chat\u00e9").encode("latin-1"),
            "prompts.jsonl:3: byte 0xe9 is not UTF-8",
        ),
        (f"\ufeff{DOG}\n".encode() + b"\xed\xa0\x80", "prompts.jsonl:2: byte 0xed is not UTF-8"),
        (gzip.compress(DOG.encode()), "prompts.jsonl:1: byte 0x.* is not UTF-8"),
    ],
    ids=["empty", "blank", "UTF-16", "UTF-16 without mark", "UTF-32", "Latin-1", "half character", "gzip"],
)
def test_files_of_other_kinds_are_refused(tmp_path, content, complaint):
    path = tmp_path / "prompts.jsonl"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=complaint):
        read_prompts(path)


def test_paths_without_a_file_are_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"absent.jsonl does not exist; write it by `python -m sfgrpo prompts`"):
        read_prompts(tmp_path / "absent.jsonl")
    with pytest.raises(ConfigError, match=r": cannot be read \(Is a directory\); make it a readable file"):
        read_prompts(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ConfigError, match=r"pipe: is no regular file; write it by"):
        read_prompts(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    with pytest.raises(ConfigError, match=r"cannot be read \(Too many levels of symbolic links\)"):
        read_prompts(tmp_path / "loop")


@pytest.mark.parametrize(
    "rewritten",
    [
        lambda content: b"\xef\xbb\xbf" + content.replace(b"\n", b"\r\n"),
        lambda content: b"\n" + content.replace(b"\n", b" \n\n").rstrip(),
    ],
)
def test_genevals_own_files_may_be_written_oddly(tmp_path, monkeypatch, rewritten):
    config = load_config(PromptsStage, ROOT / "params/sd35_medium.yaml")
    config = dataclasses.replace(config, prompts=dataclasses.replace(config.prompts, num_train=100))
    monkeypatch.chdir(ROOT)
    expected = make_prompts(config)
    (tmp_path / GENEVAL).mkdir(parents=True)
    for name in ("evaluation_metadata.jsonl", "object_names.txt"):
        (tmp_path / GENEVAL / name).write_bytes(rewritten((ROOT / GENEVAL / name).read_bytes()))
    monkeypatch.chdir(tmp_path)
    assert make_prompts(config) == expected


def test_damaged_files_of_geneval_are_named_with_their_cure(tmp_path, monkeypatch):
    config = load_config(PromptsStage, ROOT / "params/sd35_medium.yaml")
    monkeypatch.chdir(tmp_path)
    cure = "restore it by `git checkout data/geneval`"
    with pytest.raises(ConfigError, match=f"data/geneval/evaluation_metadata.jsonl does not exist; {cure}"):
        make_prompts(config)
    shutil.copytree(ROOT / GENEVAL, GENEVAL)
    names = GENEVAL / "object_names.txt"
    names.write_text(names.read_text() + "dog\n")
    with pytest.raises(ConfigError, match=f"object_names.txt: its class names are not distinct; {cure}"):
        make_prompts(config)
    names.unlink()
    with pytest.raises(ConfigError, match=f"object_names.txt does not exist; {cure}"):
        make_prompts(config)


def test_an_enormous_line_is_read(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text(DOG.replace("a dog", "a dog " * 1_000_000))
    assert len(read_prompts(path)[0].text) > 5_000_000


def test_white_space_in_a_text_survives_a_file(tmp_path):
    prompts = [dataclasses.replace(single_object("dog"), text="a\u2028photo\tof\na \u00ab\U0001f415\u00bb")]
    write_prompts(tmp_path / "prompts.jsonl", prompts)
    assert read_prompts(tmp_path / "prompts.jsonl") == prompts


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
