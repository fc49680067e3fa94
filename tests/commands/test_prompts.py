"""The command `prompts` writes its files, and never over what a person has written."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from sfgrpo.cli import main
from sfgrpo.paths import EVALUATION_PROMPTS, PROMPTS, TRAINING_PROMPTS, VALIDATION_PROMPTS
from sfgrpo.prompts import read_prompts
from tests.support.tiny_run import write_params


def content() -> dict[str, bytes]:
    """Return all files of the folder by name; a link counts as its own target."""
    return {
        str(path.relative_to(PROMPTS)): os.readlink(path).encode() if path.is_symlink() else path.read_bytes()
        for path in sorted(PROMPTS.rglob("*"))
        if path.is_file() or path.is_symlink()
    }


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with prompts of edition 0, and parameters that ask for edition 1."""
    monkeypatch.chdir(tmp_path)
    ask_for(tmp_path, edition=0)
    assert main(["prompts"]) == 0
    ask_for(tmp_path, edition=1)
    return tmp_path


def ask_for(folder: Path, edition: int) -> None:
    write_params(folder, {"prompts.num_train": 30, "prompts.edition": edition})


def append(path: Path, text: str) -> None:
    path.write_bytes(path.read_bytes() + text.encode())


def without_manifest(then: Callable[[], object]) -> None:
    (PROMPTS / "manifest.json").unlink()
    then()


EDITS: dict[str, tuple[str, Callable[[], object]]] = {
    "a line more": ("train.jsonl", lambda: append(TRAINING_PROMPTS, TRAINING_PROMPTS.read_text().split("\n")[0])),
    "a line less": ("train.jsonl", lambda: TRAINING_PROMPTS.write_text(TRAINING_PROMPTS.read_text().split("\n", 1)[1])),
    "a blank line": ("train.jsonl", lambda: append(TRAINING_PROMPTS, "\n")),
    "emptied": ("train.jsonl", lambda: TRAINING_PROMPTS.write_text("")),
    "other evaluation": ("evaluation.jsonl", lambda: append(EVALUATION_PROMPTS, "{}\n")),
    "other validation": ("validation.jsonl", lambda: append(VALIDATION_PROMPTS, "{}\n")),
    "both": ("evaluation.jsonl", lambda: [append(path, "{}\n") for path in (TRAINING_PROMPTS, EVALUATION_PROMPTS)]),
    "another file": ("notes.txt", lambda: (PROMPTS / "notes.txt").write_text("mine")),
    "a hidden file": (".train.jsonl.swp", lambda: (PROMPTS / ".train.jsonl.swp").write_text("mine")),
    "a file further down": (
        "old/train.jsonl",
        lambda: [(PROMPTS / "old").mkdir(), (PROMPTS / "old/train.jsonl").write_text("mine")],
    ),
    "a dead link": ("link", lambda: (PROMPTS / "link").symlink_to("nowhere")),
    "a pipe": ("train.jsonl", lambda: [TRAINING_PROMPTS.unlink(), os.mkfifo(TRAINING_PROMPTS)]),
    "one deleted, one edited": (
        "train.jsonl",
        lambda: [EVALUATION_PROMPTS.unlink(), append(TRAINING_PROMPTS, "{}\n")],
    ),
    "swapped": ("evaluation.jsonl", lambda: EVALUATION_PROMPTS.write_bytes(TRAINING_PROMPTS.read_bytes())),
    "no manifest": (
        "evaluation.jsonl|train.jsonl|validation.jsonl",
        lambda: without_manifest(lambda: append(TRAINING_PROMPTS, "{}\n")),
    ),
    "a broken manifest": (
        "evaluation.jsonl|train.jsonl|validation.jsonl",
        lambda: [(PROMPTS / "manifest.json").write_text("[]"), append(TRAINING_PROMPTS, "{}\n")],
    ),
}


@pytest.mark.parametrize("edit", EDITS)
@pytest.mark.parametrize("edition", [0, 1])
def test_what_a_person_wrote_is_kept_and_named(folder, capsys, edit, edition):
    name, make_edit = EDITS[edit]
    make_edit()
    ask_for(folder, edition)
    before = content()
    assert main(["prompts"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.split(": ")[1].removeprefix("data/prompts/") in name.split("|")
    assert "by `dvc commit --force prompts`" in line
    assert content() == before


@pytest.mark.parametrize(
    "loss",
    [
        lambda: None,
        lambda: TRAINING_PROMPTS.unlink(),
        lambda: EVALUATION_PROMPTS.unlink(),
        lambda: [path.unlink() for path in PROMPTS.iterdir()],
        lambda: [*[path.unlink() for path in PROMPTS.iterdir()], PROMPTS.rmdir()],
        lambda: (PROMPTS / "empty").mkdir(),
    ],
    ids=["nothing", "training", "evaluation", "all", "folder", "an empty folder in it"],
)
def test_own_files_are_replaced_and_missing_ones_written_again(folder, loss):
    first = read_prompts(TRAINING_PROMPTS)
    loss()
    assert main(["prompts"]) == 0
    assert read_prompts(TRAINING_PROMPTS) != first
    assert sorted(content()) == ["evaluation.jsonl", "manifest.json", "train.jsonl", "validation.jsonl"]


def test_files_without_a_manifest_may_be_written_again_as_they_are(folder):
    ask_for(folder, edition=0)
    before = content()
    (PROMPTS / "manifest.json").unlink()
    assert main(["prompts"]) == 0
    assert content() == before


def test_an_edit_that_was_taken_back_is_none(folder):
    before = TRAINING_PROMPTS.read_bytes()
    TRAINING_PROMPTS.write_bytes(b"")
    TRAINING_PROMPTS.write_bytes(before)
    assert main(["prompts"]) == 0


def test_a_file_in_place_of_the_folder_is_kept(folder, capsys):
    PROMPTS.rename("aside")
    PROMPTS.write_text("mine")
    assert main(["prompts"]) == 2
    assert "data/prompts: is no folder, and the prompts need one of that name; move it away" in capsys.readouterr().err
    assert PROMPTS.read_text() == "mine"
