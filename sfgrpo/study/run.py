"""One run of a study: a row trained with a seed, from its prompts to the files that the report reads."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sfgrpo.checkpoint.state import CHECKPOINTS, latest_checkpoint
from sfgrpo.config.stages import TrainStage, to_flat_dict
from sfgrpo.evaluation.evaluate import draw_images, protocol_of
from sfgrpo.evaluation.evaluator import Evaluator
from sfgrpo.evaluation.periodic import EvaluationPaths
from sfgrpo.evaluation.store import EVALUATIONS
from sfgrpo.factory import check_pretrained, make_accelerator, make_policy, make_reward, use_threads
from sfgrpo.policies.base import Policy
from sfgrpo.prompts import make_prompts
from sfgrpo.rewards import build_reward, checked_rewards
from sfgrpo.runtime.environment import Environment
from sfgrpo.runtime.files import atomic_directory
from sfgrpo.runtime.locks import exclusive_lock
from sfgrpo.runtime.manifest import sha256_of_file
from sfgrpo.runtime.shutdown import GracefulShutdown
from sfgrpo.study.config import EXPERIMENTS, Plan, stages_of_run
from sfgrpo.tracking.base import ending
from sfgrpo.tracking.mlflow_tracker import MlflowTracker
from sfgrpo.tracking.sample_grid import pick_rows
from sfgrpo.training.fingerprint import evaluation_fingerprint, run_fingerprint, run_key
from sfgrpo.training.trainer import Trainer, TrainerInputs
from sfgrpo.types import Prompt

EXPERIMENT = "sfgrpo-study"
STUDY = Path("study")
SAMPLE_PROMPTS_PER_TASK = 2
SAMPLES_PER_PROMPT = 4


def train_run(plan: Plan, row: str, seed: int, environment: Environment) -> None:
    """Train one run and write its results to `STUDY`; a killed run resumes from its last checkpoint."""
    prompts_stage, config = stages_of_run(plan, row, seed)
    accelerator, reward = make_accelerator(config, environment), make_reward(config.reward)
    check_pretrained(config.policy)
    use_threads(environment)
    split = make_prompts(prompts_stage)
    # Nothing is selected in a study, so its curves may be drawn on the evaluation prompts.
    prompts, asked = split.training, split.evaluation
    key = run_key(run_fingerprint(config, [prompts, asked]))
    folder = environment.scratch_dir / f"study-{key[:16]}"
    folder.mkdir(parents=True, exist_ok=True)
    tracker = MlflowTracker(
        uri=environment.tracking_uri,
        experiment=EXPERIMENT,
        run_name=f"{row} seed {seed}",
        key=f"study-{key}",
        parent_run_id=parent_run(plan, environment).run_id,
    )
    with GracefulShutdown(environment.grace_s) as shutdown, ending(tracker):
        if latest_checkpoint(folder / CHECKPOINTS) is None:
            tracker.open()
        tracker.log_params(to_flat_dict(config))
        tracker.set_tags({"study.preset": plan.preset, "study.row": row, "study.seed": str(seed)})
        policy = make_policy(config.policy, config.seed, environment)
        samples: dict[str, Any] = {"texts": [prompt.text for prompt in _shown(asked, config)]}
        samples |= _samples(policy, asked, config, "before")
        inputs = TrainerInputs(
            prompts=prompts,
            reward=reward,
            evaluator=Evaluator.of(config, asked, reward),
            paths=EvaluationPaths(
                folder=folder,
                store=folder.parent / EVALUATIONS,
                fingerprint=evaluation_fingerprint(config, asked, policy.device.type),
            ),
            tracker=tracker,
            shutdown=shutdown,
        )
        trainer = Trainer(config, policy, inputs, accelerator)
        with shutdown.deferred():
            trainer.run()
        with trainer.averaged():
            samples |= _samples(policy, asked, config, "after")
        with atomic_directory(STUDY / plan.preset / row / str(seed)) as partial:
            _write_results(partial, _description(config, row, plan.rows[row], tracker.run_id), trainer, samples)


def parent_run(plan: Plan, environment: Environment) -> MlflowTracker:
    """Open the MLflow run that is the parent of all runs of a study; runs that start together share it."""
    files = sorted(path for path in EXPERIMENTS.rglob("*.yaml") if path.name != "dvc.yaml")
    digest = hashlib.sha256("".join(map(sha256_of_file, files)).encode()).hexdigest()
    tracker = MlflowTracker(
        uri=environment.tracking_uri,
        experiment=EXPERIMENT,
        run_name=f"study {plan.preset}",
        key=f"study-{plan.preset}-{digest}",
    )
    environment.scratch_dir.mkdir(parents=True, exist_ok=True)
    with exclusive_lock(environment.scratch_dir / "study.lock", math.inf):
        # Every run looks for the parent before it creates one, so under the lock the parent must come to exist.
        tracker.open()
    tracker.set_tags({"study.preset": plan.preset})
    return tracker


def _shown(asked: Sequence[Prompt], config: TrainStage) -> list[Prompt]:
    return [asked[row] for row in pick_rows(asked, SAMPLE_PROMPTS_PER_TASK, seed=config.evaluation.seed)]


def _samples(policy: Policy, asked: Sequence[Prompt], config: TrainStage, name: str) -> dict[str, Any]:
    """Draw G images of a few prompts, [P * G, H, W, 3], and return with them which are correct by GenEval, [P, G]."""
    prompts = [prompt for prompt in _shown(asked, config) for _ in range(SAMPLES_PER_PROMPT)]
    protocol = dataclasses.replace(protocol_of(config.evaluation), images_per_prompt=SAMPLES_PER_PROMPT)
    images = draw_images(policy, policy.encode([prompt.text for prompt in prompts]), protocol)
    verdicts = checked_rewards(build_reward("geneval_correct"), images, prompts).numpy()
    return {name: images, f"correct_{name}": verdicts.reshape(-1, SAMPLES_PER_PROMPT) == 1.0}


def _description(config: TrainStage, row: str, label: str, run_id: str | None) -> dict[str, Any]:
    return {
        "row": row,
        "seed": config.seed,
        "method": "flow_grpo" if config.advantage.credit == "terminal" else "stepwise",
        "label": label,
        "guidance_scale": config.sampling.guidance_scale,
        "reward": config.reward.name,
        "sampler": config.sampling.sampler,
        "num_substeps": config.estimates.num_substeps,
        "num_steps": config.sampling.num_steps,
        "num_updates": config.update.num_updates,
        "images_per_update": config.rollout.num_images,
        "mlflow_run_id": run_id,
        "versions": {name: importlib.metadata.version(name) for name in ("torch", "diffusers", "peft")},
        "params": to_flat_dict(config),
    }


def _write_results(folder: Path, description: dict[str, Any], trainer: Trainer, samples: dict[str, Any]) -> None:
    evaluations = [{"update": each["update"], **each["metrics"]} for each in trainer.evaluations]
    for name, content in (("run", description), ("history", trainer.history), ("evaluations", evaluations)):
        (folder / f"{name}.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    np.savez_compressed(folder / "samples.npz", **samples)
