"""Checks and counts of the prompt sets that the stage `prompts` wrote."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from sfgrpo.config.stages import PromptsStage, load_config
from sfgrpo.errors import SfgrpoError
from sfgrpo.paths import EVALUATION_PROMPTS, PARAMS, TRAINING_PROMPTS, VALIDATION_PROMPTS
from sfgrpo.prompt_checks import check_prompts
from sfgrpo.prompts import read_prompt_file
from sfgrpo.types import TAGS, Tag


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class TaskCount:
    """Numbers of prompts of one GenEval task."""

    tag: Tag
    training: int
    unique: int
    """Training prompts that differ from one another."""
    validation: int
    evaluation: int


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class PromptSets:
    """The prompt sets of the working directory, in short."""

    counts: Sequence[TaskCount]
    training_texts: Sequence[str]


def read_prompt_sets() -> PromptSets:
    """Read the three sets; check their sizes and that they do not overlap.

    Raises:
        SfgrpoError: a set has another size than the parameters ask for, or `check_prompts` refuses the three.
    """
    wanted = load_config(PromptsStage, Path(PARAMS)).prompts
    files = [read_prompt_file(path) for path in (TRAINING_PROMPTS, VALIDATION_PROMPTS, EVALUATION_PROMPTS)]
    check_prompts(files[2], (), validation=files[1], training=files[0])
    training, validation, evaluation = (file.prompts for file in files)
    for path, found, number in (
        (TRAINING_PROMPTS, training, wanted.num_train),
        (VALIDATION_PROMPTS, validation, sum(wanted.num_validation.values())),
        (EVALUATION_PROMPTS, evaluation, sum(wanted.num_evaluation.values())),
    ):
        if len(found) != number:
            raise SfgrpoError(f"{path}: holds {len(found)} prompts, but {PARAMS} asks for {number}")
    counts = [
        TaskCount(
            tag=tag,
            training=sum(prompt.tag == tag for prompt in training),
            unique=len({prompt.text for prompt in training if prompt.tag == tag}),
            validation=sum(prompt.tag == tag for prompt in validation),
            evaluation=sum(prompt.tag == tag for prompt in evaluation),
        )
        for tag in TAGS
    ]
    return PromptSets(counts=counts, training_texts=[prompt.text for prompt in training])
