"""The stages of the pipeline but for the training: each makes its objects by its configuration and writes its files."""

from __future__ import annotations

import functools
import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from sfgrpo.assembly import (
    check_pretrained,
    make_policy,
    make_prompts,
    make_reward,
    use_threads,
)
from sfgrpo.config import (
    EvaluateStage,
    PretrainRewardStage,
    PretrainStage,
    PromptsStage,
    RegisterStage,
    config_digest,
)
from sfgrpo.environment import Environment
from sfgrpo.errors import SfgrpoError
from sfgrpo.files import atomic_directory
from sfgrpo.paths import EVALUATE_REPORT, EVALUATION_PROMPTS, POLICY, PROMPTS, REGISTRATION, TRAINING_PROMPTS
from sfgrpo.prompts import read_prompts, write_prompts
from sfgrpo.provenance import flow_tags, provenance_tags
from sfgrpo.training import EXPERIMENT
from sfgrpo.types import TAGS, Prompt

if TYPE_CHECKING:
    from sfgrpo.evaluation import Evaluation
    from sfgrpo.packing import ImageArchive
    from sfgrpo.policies.sd3 import SD3Policy
    from sfgrpo.rewards import Reward

logger = logging.getLogger(__name__)

GRID_ROWS_PER_TASK = 2
SCORES = ("geneval/overall", *(f"geneval/{tag}" for tag in TAGS))
"""What a version says of itself."""


def pretrain(config: PretrainStage, environment: Environment) -> None:
    """Trains the base model of the shapes world and publishes it with its card; resumable."""
    from sfgrpo.pretrain import pretrain_base_model

    folder = environment.scratch_dir / f"pretrain-{config_digest(config)[:16]}"
    use_threads(environment)
    pretrain_base_model(config.pretrain, config.seed, folder)


def pretrain_reward(config: PretrainRewardStage, environment: Environment) -> None:
    """Trains the model behind the reward `clip` and publishes it with its card."""
    from sfgrpo.pretrain_reward import pretrain_reward_model

    use_threads(environment)
    pretrain_reward_model(config.pretrain_reward, config.seed)


def prompts(config: PromptsStage, environment: Environment) -> None:
    """Writes the training and the evaluation prompts."""
    training, evaluation = make_prompts(config)
    with atomic_directory(PROMPTS) as partial:
        write_prompts(partial / TRAINING_PROMPTS.name, training)
        write_prompts(partial / EVALUATION_PROMPTS.name, evaluation)
    unique = len({prompt.text for prompt in training})
    print(f"{len(training)} training prompts ({unique} unique) and {len(evaluation)} evaluation prompts in {PROMPTS}")


def evaluate(config: EvaluateStage, environment: Environment) -> None:
    """Judges base model and trained policy on the same prompts and noise; writes table, metrics, images."""
    from sfgrpo.geneval.table import markdown_table
    from sfgrpo.packing import image_archive
    from sfgrpo.report import pick_rows, sample_grid
    from sfgrpo.rewards import build_reward, distinct_rewards

    rewards = distinct_rewards(make_reward(config.reward), build_reward("likeness"))
    check_pretrained(config.policy)
    use_threads(environment)
    asked = read_prompts(EVALUATION_PROMPTS)
    policy = make_policy(config.policy, config.seed, environment)
    shown = pick_rows(asked, GRID_ROWS_PER_TASK)
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
    from sfgrpo.evaluation import evaluate_policy, protocol_of
    from sfgrpo.rewards import build_reward

    protocol = protocol_of(config.evaluation)
    return evaluate_policy(
        policy,
        asked,
        build_reward("geneval_strict"),
        rewards,
        protocol,
        shown=shown,
        drawn=functools.partial(archive.add, model, asked, protocol.images_per_prompt),
    )


def register(config: RegisterStage, environment: Environment) -> None:
    """Registers the trained policy as a model version; the same adapter at the same commit is registered once."""
    from sfgrpo.registry import ServingDefaults, register_version

    report = EVALUATE_REPORT / "metrics.json"
    for path in (POLICY / "training.json", report):
        if not path.exists():
            raise SfgrpoError(f"{path} does not exist; run `dvc repro` first")
    metrics = json.loads(report.read_text(encoding="utf-8"))["policy"]
    record = json.loads((POLICY / "training.json").read_text(encoding="utf-8"))
    version = register_version(
        uri=environment.tracking_uri,
        experiment=EXPERIMENT,
        model_name=config.registry.model_name,
        alias=config.registry.alias,
        adapter=POLICY / "adapter",
        serving=ServingDefaults(
            pretrained=config.policy.pretrained,
            revision=config.policy.revision,
            dtype=config.policy.dtype,
            resolution=config.policy.resolution,
            max_sequence_length=config.policy.max_sequence_length,
            num_inference_steps=config.evaluation.num_steps,
            guidance_scale=config.evaluation.guidance_scale,
        ),
        # A task of which the evaluation has no prompts has no score.
        metrics={name: metrics[name] for name in SCORES if name in metrics},
        provenance=provenance_tags(Path.cwd(), TRAINING_PROMPTS) | flow_tags(environment, Path.cwd()),
        run_id=record["mlflow_run_id"],
    )
    version.write(REGISTRATION)
    print(f"model version {version.version} registered as {version.name}@{version.alias}")
