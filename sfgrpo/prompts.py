"""Prompt files, the prompts of each update, and the making of prompt sets."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Sequence, Sized
from pathlib import Path

import numpy as np

from sfgrpo.config.loading import as_config_error
from sfgrpo.config.stages import PromptsStage
from sfgrpo.errors import ConfigError
from sfgrpo.geneval.metadata import parse_prompt
from sfgrpo.runtime.lines import read_lines
from sfgrpo.types import Prompt

GENEVAL = Path("data/geneval")
WRITE_PROMPTS = "write it by `python -m sfgrpo prompts`"
RESTORE_GENEVAL = f"restore it by `git checkout {GENEVAL}`"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class PromptFile:
    """The prompts of a file, and the lines that they stand on."""

    path: Path
    prompts: Sequence[Prompt]
    lines: Sequence[int]

    def place(self, index: int) -> str:
        """Return path and line of the prompt at a position, for a message."""
        return f"{self.path}:{self.lines[index]}"


def read_prompts(path: Path, cure: str = WRITE_PROMPTS) -> list[Prompt]:
    """Read a file of GenEval metadata; see `read_prompt_file`."""
    return list(read_prompt_file(path, cure).prompts)


def read_prompt_file(path: Path, cure: str = WRITE_PROMPTS) -> PromptFile:
    """Read a file of GenEval metadata, one JSON object a line, with the line of every prompt; blank lines are left out.

    Raises:
        ConfigError: the file cannot be read, where `cure` says what to do, or holds no prompt, or one of its lines is
            no prompt; the message starts with path and line number.
    """
    prompts: list[Prompt] = []
    lines: list[int] = []
    for number, line in read_lines(path, cure):
        with as_config_error(f"{path}:{number}"):
            prompts.append(parse_prompt(line))
        lines.append(number)
    if not prompts:
        raise ConfigError(f"{path}: holds no prompt; {cure}")
    return PromptFile(path=path, prompts=prompts, lines=lines)


def write_prompts(path: Path, prompts: Iterable[Prompt]) -> None:
    """Write a file of GenEval metadata."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # Not atomic_write: inside an atomic_directory it would wait for the lock of that block for ever.
    path.write_text(to_lines(prompts), encoding="utf-8")


def prompts_digest(prompts: Iterable[Prompt]) -> str:
    """Return the SHA-256, in hex, of the file that `write_prompts` would write."""
    return hashlib.sha256(to_lines(prompts).encode()).hexdigest()


def to_lines(prompts: Iterable[Prompt]) -> str:
    """Return the text of a file of GenEval metadata."""
    return "".join(f"{json.dumps(prompt.to_metadata())}\n" for prompt in prompts)


def prompts_of_update(prompts: Sized, update_index: int, prompts_per_update: int, seed: int) -> list[int]:
    """Return the positions in `prompts` that an update rolls out: a slice of an endless sequence of shuffled epochs.

    Every epoch holds every position once, in an order of its own. The result depends on the arguments alone, so a
    resumed run needs no state. Equal texts at two positions stay two prompts; an update across two epochs may hold a
    position twice, as two groups.

    Raises:
        ValueError: there are no prompts, or none are requested.
    """
    if len(prompts) == 0 or prompts_per_update < 1 or update_index < 0:
        raise ValueError(
            f"update {update_index} requests {prompts_per_update} of {len(prompts)} prompts; "
            "give a non-negative update, at least one prompt per update and a non-empty prompt set"
        )
    first = update_index * prompts_per_update
    epochs = range(first // len(prompts), (first + prompts_per_update - 1) // len(prompts) + 1)
    orders = [np.random.default_rng([seed, epoch]).permutation(len(prompts)) for epoch in epochs]
    start = first - epochs.start * len(prompts)
    return [int(position) for position in np.concatenate(orders)[start : start + prompts_per_update]]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class PromptSplit:
    """Three sets of prompts, no two of which ask for the same."""

    training: list[Prompt]
    validation: list[Prompt]
    """By which the best adapter of a training is chosen."""
    evaluation: list[Prompt]
    """On which the chosen adapter is reported and compared."""


def make_prompts(config: PromptsStage) -> PromptSplit:
    """Draw training, validation and evaluation prompts; the latter two depend on no edition."""
    return _shapes_prompts(config) if config.prompts.source == "shapes" else _geneval_prompts(config)


def _drawing_seed(config: PromptsStage) -> int | tuple[int, int]:
    """Return the seed of the training prompts, its own for every edition; the first takes the seed alone."""
    edition = config.prompts.edition
    return (config.seed, edition) if edition else config.seed


def _shapes_prompts(config: PromptsStage) -> PromptSplit:
    from sfgrpo.shapes.prompt_sets import sample_training_prompts, split_prompts, split_validation

    with as_config_error("prompts.num_evaluation"):
        others, evaluation = split_prompts(config.prompts.num_evaluation, config.seed)
    with as_config_error("prompts.num_validation"):
        training, validation = split_validation(others, config.prompts.num_validation, config.seed)
    with as_config_error("prompts.task_weights"):
        drawn = sample_training_prompts(
            training, config.prompts.task_weights, config.prompts.num_train, _drawing_seed(config)
        )
    return PromptSplit(
        training=drawn,
        validation=[prompt for prompts in validation.values() for prompt in prompts],
        evaluation=[prompt for prompts in evaluation.values() for prompt in prompts],
    )


def _geneval_prompts(config: PromptsStage) -> PromptSplit:
    from sfgrpo.geneval.prompt_sets import training_prompts, validation_prompts

    evaluation = read_prompts(GENEVAL / "evaluation_metadata.jsonl", RESTORE_GENEVAL)
    counts = dict(Counter(prompt.tag for prompt in evaluation))
    if counts != config.prompts.num_evaluation:
        raise ConfigError(
            f"prompts.num_evaluation: {config.prompts.num_evaluation} is not GenEval's own set; with prompts.source "
            f"geneval it must be {counts}"
        )
    names = [line.strip() for _, line in read_lines(GENEVAL / "object_names.txt", RESTORE_GENEVAL)]
    if len(names) < 2 or len(set(names)) < len(names):
        raise ConfigError(f"{GENEVAL / 'object_names.txt'}: its class names are not distinct; {RESTORE_GENEVAL}")
    with as_config_error("prompts.num_validation"):
        validation = validation_prompts(names, evaluation, num_prompts=config.prompts.num_validation, seed=config.seed)
    with as_config_error("prompts.task_weights"):
        training = training_prompts(
            names,
            [*evaluation, *validation],
            num_prompts=config.prompts.num_train,
            weights=config.prompts.task_weights,
            seed=_drawing_seed(config),
        )
    return PromptSplit(training=training, validation=validation, evaluation=evaluation)
