"""Write the training and evaluation prompts."""

from __future__ import annotations

from sfgrpo.config.stages import PromptsStage
from sfgrpo.paths import EVALUATION_PROMPTS, PROMPTS, TRAINING_PROMPTS
from sfgrpo.prompts import make_prompts, write_prompts
from sfgrpo.runtime.environment import Environment
from sfgrpo.runtime.files import atomic_directory


def prompts(config: PromptsStage, _: Environment) -> None:
    """Write the training and the evaluation prompts."""
    training, evaluation = make_prompts(config)
    with atomic_directory(PROMPTS) as partial:
        write_prompts(partial / TRAINING_PROMPTS.name, training)
        write_prompts(partial / EVALUATION_PROMPTS.name, evaluation)
    unique = len({prompt.text for prompt in training})
    print(f"{len(training)} training prompts ({unique} unique) and {len(evaluation)} evaluation prompts in {PROMPTS}")
