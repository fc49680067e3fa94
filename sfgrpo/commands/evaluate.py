"""The stages of the pipeline but for the training: each makes its objects by its configuration and writes its files."""

from __future__ import annotations

import functools
import json
import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING

from sfgrpo.config.stages import (
    EvaluateStage,
)
from sfgrpo.factory import check_pretrained, make_policy, make_reward, use_threads
from sfgrpo.paths import EVALUATE_REPORT, EVALUATION_PROMPTS, POLICY
from sfgrpo.prompts import read_prompts
from sfgrpo.runtime.environment import Environment
from sfgrpo.runtime.files import atomic_directory
from sfgrpo.types import Prompt

if TYPE_CHECKING:
    from sfgrpo.evaluation.evaluate import Evaluation
    from sfgrpo.policies.sd3 import SD3Policy
    from sfgrpo.rewards import Reward
    from sfgrpo.tracking.image_archive import ImageArchive


logger = logging.getLogger(__name__)


def evaluate(config: EvaluateStage, environment: Environment) -> None:
    """Judges base model and trained policy on the same prompts and noise; writes table, metrics, images."""
    from sfgrpo.geneval.table import markdown_table
    from sfgrpo.rewards import build_reward, distinct_rewards
    from sfgrpo.tracking.image_archive import image_archive
    from sfgrpo.tracking.sample_grid import pick_rows, sample_grid

    rewards = distinct_rewards(make_reward(config.reward), build_reward("likeness"))
    check_pretrained(config.policy)
    use_threads(environment)
    asked = read_prompts(EVALUATION_PROMPTS)
    policy = make_policy(config.policy, config.seed, environment)
    shown = pick_rows(asked)
    with atomic_directory(EVALUATE_REPORT) as partial:
        with image_archive(partial / "images.tar") as archive:
            judge = functools.partial(_evaluated, policy, asked, rewards, config, shown, archive)
            evaluations = {"base model": judge("base")}
            policy.load_adapter(POLICY / "adapter")
            evaluations["trained policy"] = judge("policy")
        table = markdown_table({name: evaluation.table for name, evaluation in evaluations.items()})
        metrics = {name.split()[-1]: evaluation.to_dict() for name, evaluation in evaluations.items()}
        base, trained = metrics["model"], metrics["policy"]
        gain = trained["geneval/overall"] - base["geneval/overall"]
        report = {"base": base, "policy": trained, "gain": {"geneval/overall": gain}}
        (partial / "metrics.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
        (partial / "table.md").write_text(table + "\n", encoding="utf-8")
        sample_grid(
            asked,
            {name: evaluation.images for name, evaluation in evaluations.items()},
            {name: evaluation.correct for name, evaluation in evaluations.items()},
            shown,
        ).save(partial / "samples.png")
    print(f"{table}\n\nGenEval overall {gain:+.3f}; samples in {EVALUATE_REPORT / 'samples.png'}")


def _evaluated(
    policy: SD3Policy,
    asked: Sequence[Prompt],
    rewards: Sequence[Reward],
    config: EvaluateStage,
    shown: Sequence[int],
    archive: ImageArchive,
    model: str,
) -> Evaluation:
    """Judges the policy as it is, and packs all its images under a model's name."""
    from sfgrpo.evaluation.evaluate import evaluate_policy, protocol_of

    protocol = protocol_of(config.evaluation)
    return evaluate_policy(
        policy,
        asked,
        rewards,
        protocol,
        shown=shown,
        on_images=functools.partial(archive.add, model, asked, protocol.images_per_prompt),
    )
