"""The prompt sets of a refresh are checked before they become the current edition."""

from __future__ import annotations

from pathlib import Path

import pytest

from sfgrpo.cli import main
from sfgrpo.errors import ConfigError, SfgrpoError
from sfgrpo.paths import EVALUATION_PROMPTS, TRAINING_PROMPTS, VALIDATION_PROMPTS
from sfgrpo.prompts import read_prompts
from tasks.prompt_sets import read_prompt_sets
from tests.support.tiny_run import TINY, write_params


@pytest.fixture
def written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_params(tmp_path, TINY)
    assert main(["prompts"]) == 0


def test_counts_are_those_of_the_files(written):
    sets = read_prompt_sets()
    assert sum(count.training for count in sets.counts) == TINY["prompts.num_train"]
    assert [(count.validation, count.evaluation) for count in sets.counts] == [(1, 1)] * 6
    assert list(sets.training_texts) == [prompt.text for prompt in read_prompts(TRAINING_PROMPTS)]


def test_an_overlap_is_refused_with_its_line(written):
    asked = EVALUATION_PROMPTS.read_text().splitlines()[0]
    TRAINING_PROMPTS.write_text(f"{asked}\n{TRAINING_PROMPTS.read_text()}")
    with pytest.raises(ConfigError, match=r"train.jsonl:1: 1 of 17 training prompts are evaluated on"):
        read_prompt_sets()


def test_a_repeated_evaluation_prompt_is_refused_with_its_line(written):
    EVALUATION_PROMPTS.write_text(EVALUATION_PROMPTS.read_text() * 2)
    with pytest.raises(ConfigError, match=r"evaluation.jsonl:7: 6 of 12 evaluation prompts repeat an earlier one"):
        read_prompt_sets()


def test_another_number_of_validation_prompts_is_refused(written):
    VALIDATION_PROMPTS.write_text("\n".join(VALIDATION_PROMPTS.read_text().splitlines()[:-1]))
    with pytest.raises(SfgrpoError, match=r"validation.jsonl: holds 5 prompts, but params.yaml asks for 6"):
        read_prompt_sets()
