"""The stages of the pipeline: each builds its objects from its configuration, calls the library, writes its files."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sfgrpo.batches import BatchArithmetic
from sfgrpo.config import (
    EvaluateStage,
    PretrainStage,
    PromptsStage,
    RegisterStage,
    TrainStage,
    config_digest,
    to_flat_dict,
)
from sfgrpo.environment import Environment
from sfgrpo.errors import ConfigError, SfgrpoError
from sfgrpo.files import atomic_directory, sha256_of_file, verify_manifest
from sfgrpo.prompts import read_prompts, write_prompts
from sfgrpo.provenance import provenance_tags
from sfgrpo.sections import PolicyConfig
from sfgrpo.types import TAGS, Prompt, Tag

if TYPE_CHECKING:
    from sfgrpo.evaluation import Evaluation
    from sfgrpo.policies.sd3 import SD3Policy
    from sfgrpo.rewards import Reward

logger = logging.getLogger(__name__)

EXPERIMENT = "sfgrpo"
GENEVAL = Path("data/geneval")
PROMPTS = Path("data/prompts")
TRAINING_PROMPTS = PROMPTS / "train.jsonl"
EVALUATION_PROMPTS = PROMPTS / "evaluation.jsonl"
POLICY = Path("models/policy")
TRAIN_REPORT = Path("reports/train")
EVALUATE_REPORT = Path("reports/evaluate")
REGISTRATION = Path("reports/registered.json")
CODE = Path(__file__).parent
GRID_ROWS_PER_TASK = 2


def pretrain(config: PretrainStage, environment: Environment) -> None:
    """Trains the base model of the shapes world and publishes it with its card; resumable."""
    from sfgrpo.pretrain import pretrain_base_model

    folder = environment.scratch_dir / f"pretrain-{config_digest(config)[:16]}"
    _use_threads(environment)
    pretrain_base_model(config.pretrain, config.seed, folder)


def prompts(config: PromptsStage, environment: Environment) -> None:
    """Writes the training and the evaluation prompts."""
    training, evaluation = _shapes_prompts(config) if config.prompts.source == "shapes" else _geneval_prompts(config)
    with atomic_directory(PROMPTS) as partial:
        write_prompts(partial / TRAINING_PROMPTS.name, training)
        write_prompts(partial / EVALUATION_PROMPTS.name, evaluation)
    unique = len({prompt.text for prompt in training})
    print(f"{len(training)} training prompts ({unique} unique) and {len(evaluation)} evaluation prompts in {PROMPTS}")


def _shapes_prompts(config: PromptsStage) -> tuple[list[Prompt], list[Prompt]]:
    from sfgrpo.shapes.prompts import sample_training_prompts, split_prompts

    with _blaming("prompts.num_evaluation"):
        training, evaluation = split_prompts(config.prompts.num_evaluation, config.seed)
    with _blaming("prompts.task_weights"):
        drawn = sample_training_prompts(training, config.prompts.task_weights, config.prompts.num_train, config.seed)
    return drawn, [prompt for prompts in evaluation.values() for prompt in prompts]


def _geneval_prompts(config: PromptsStage) -> tuple[list[Prompt], list[Prompt]]:
    from sfgrpo.geneval.prompts import training_prompts

    evaluation = read_prompts(GENEVAL / "evaluation_metadata.jsonl")
    counts: dict[Tag, int] = dict.fromkeys(config.prompts.num_evaluation, 0)
    for prompt in evaluation:
        counts[prompt.tag] += 1
    if counts != config.prompts.num_evaluation:
        raise ConfigError(
            f"prompts.num_evaluation: {config.prompts.num_evaluation} is not GenEval's own set; with prompts.source "
            f"geneval it must be {counts}"
        )
    names = (GENEVAL / "object_names.txt").read_text(encoding="utf-8").split("\n")
    with _blaming("prompts.task_weights"):
        training = training_prompts(
            [name for name in names if name],
            evaluation,
            num_prompts=config.prompts.num_train,
            weights=config.prompts.task_weights,
            seed=config.seed,
        )
    return list(training), evaluation


def train(config: TrainStage, environment: Environment) -> None:
    """Trains the adapter, going on where an interrupted run of the same configuration, data and code stopped."""
    from accelerate import Accelerator

    from sfgrpo.rewards import build_reward
    from sfgrpo.tracking import MlflowTracker, ending
    from sfgrpo.trainer import Materials, Trainer

    BatchArithmetic(config=config)
    accelerator = Accelerator()
    if accelerator.num_processes > 1:
        raise ConfigError(
            f"{accelerator.num_processes} processes were launched, but this version trains in one; start "
            "`python -m sfgrpo train` without a launcher"
        )
    with _blaming("reward.name"):
        reward = build_reward(config.reward.name)
    _check_pretrained(config.policy)
    _use_threads(environment)
    key = _run_key(config)
    folder = environment.scratch_dir / f"train-{key[:16]}"
    folder.mkdir(parents=True, exist_ok=True)
    tracker = MlflowTracker(
        uri=environment.tracking_uri,
        experiment=EXPERIMENT,
        run_name=f"{config.advantage.credit}-{key[:8]}",
        run_id=environment.run_id,
        key=key,
    )
    with ending(tracker):
        tracker.log_params(to_flat_dict(config))
        tracker.set_tags(provenance_tags(Path.cwd(), TRAINING_PROMPTS))
        tracker.log_prompts(TRAINING_PROMPTS, "training-prompts", "training")
        tracker.log_prompts(EVALUATION_PROMPTS, "evaluation-prompts", "evaluation")
        materials = Materials(
            prompts=read_prompts(TRAINING_PROMPTS),
            evaluation_prompts=read_prompts(EVALUATION_PROMPTS),
            reward=reward,
            verdict=build_reward("geneval_strict"),
            held_out=build_reward("likeness"),
            folder=folder,
            tracker=tracker,
        )
        trainer = Trainer(config, _load_policy(config.policy, config.seed, environment), materials, accelerator)
        trainer.run()
        best = trainer.best
        record = {
            "update": best["update"],
            "num_updates": trainer.update_index,
            "images": trainer.update_index * config.rollout.num_images,
            "run_key": key,
            "mlflow_run_id": tracker.run_id,
            "tracking_uri": environment.tracking_uri,
        }
        _publish_training(folder, trainer.history, trainer.evaluations, record)
        tracker.log_metrics({f"best/{name}": value for name, value in best["metrics"].items()}, trainer.update_index)
        tracker.set_tags({"best_update": str(best["update"])})
    print(f"best of {len(trainer.evaluations)} evaluations: update {best['update']}, adapter in {POLICY}")


def _publish_training(
    folder: Path,
    history: Sequence[dict[str, Any]],
    evaluations: Sequence[dict[str, Any]],
    record: dict[str, Any],
) -> None:
    """Copies the best adapter and the reports to where the pipeline expects them."""
    best = next(evaluation for evaluation in evaluations if evaluation["update"] == record["update"])
    with atomic_directory(POLICY) as partial:
        shutil.copytree(folder / "best", partial / "adapter")
        (partial / "training.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    with atomic_directory(TRAIN_REPORT) as partial:
        flat = [{"update": evaluation["update"], **evaluation["metrics"]} for evaluation in evaluations]
        (partial / "history.json").write_text(json.dumps(history, indent=1) + "\n", encoding="utf-8")
        (partial / "evaluations.json").write_text(json.dumps(flat, indent=1) + "\n", encoding="utf-8")
        summary = {"best_update": record["update"], **best["metrics"]}
        (partial / "summary.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
        for grid in sorted(folder.glob("samples_*.png")):
            shutil.copy(grid, partial / grid.name)


def evaluate(config: EvaluateStage, environment: Environment) -> None:
    """Judges base model and trained policy on the same prompts and noise; writes table, metrics and sample grid."""
    from sfgrpo.geneval.table import markdown_table
    from sfgrpo.report import pick_rows, sample_grid
    from sfgrpo.rewards import build_reward

    with _blaming("reward.name"):
        rewards = build_reward(config.reward.name), build_reward("likeness")
    _check_pretrained(config.policy)
    _use_threads(environment)
    asked = read_prompts(EVALUATION_PROMPTS)
    policy = _load_policy(config.policy, config.seed, environment)
    evaluations = {"base model": _evaluated(policy, asked, rewards, config)}
    policy.load_adapter(POLICY / "adapter")
    evaluations["trained policy"] = _evaluated(policy, asked, rewards, config)
    table = markdown_table({name: evaluation.table for name, evaluation in evaluations.items()})
    metrics = {name.split()[-1]: evaluation.to_dict() for name, evaluation in evaluations.items()}
    base, trained = metrics["model"], metrics["policy"]
    gain = trained["geneval/overall"] - base["geneval/overall"]
    report = {"base": base, "policy": trained, "gain": {"geneval/overall": gain}}
    with atomic_directory(EVALUATE_REPORT) as partial:
        (partial / "metrics.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
        (partial / "table.md").write_text(table + "\n", encoding="utf-8")
        sample_grid(
            asked,
            {name: evaluation.images for name, evaluation in evaluations.items()},
            {name: evaluation.correct for name, evaluation in evaluations.items()},
            pick_rows(asked, GRID_ROWS_PER_TASK),
        ).save(partial / "samples.png")
    print(f"{table}\n\nGenEval overall {gain:+.3f}; samples in {EVALUATE_REPORT / 'samples.png'}")


def _evaluated(
    policy: SD3Policy, asked: Sequence[Prompt], rewards: Sequence[Reward], config: EvaluateStage
) -> Evaluation:
    from sfgrpo.evaluation import evaluate_policy
    from sfgrpo.rewards import build_reward

    return evaluate_policy(
        policy,
        asked,
        build_reward("geneval_strict"),
        rewards,
        images_per_prompt=config.evaluation.images_per_prompt,
        num_steps=config.evaluation.num_steps,
        guidance_scale=config.evaluation.guidance_scale,
        seed=config.evaluation.seed,
        micro_batch_size=config.evaluation.micro_batch_size,
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
        metrics={name: metrics[name] for name in ("geneval/overall", *(f"geneval/{tag}" for tag in TAGS))},
        provenance=provenance_tags(Path.cwd(), TRAINING_PROMPTS),
        run_id=record["mlflow_run_id"],
    )
    version.write(REGISTRATION)
    print(f"model version {version.version} registered as {version.name}@{version.alias}")


def _load_policy(config: PolicyConfig, seed: int, environment: Environment) -> SD3Policy:
    import torch
    from diffusers.utils.logging import disable_progress_bar

    from sfgrpo.policies.sd3 import SD3Policy

    disable_progress_bar()
    with _blaming("policy"):
        policy = SD3Policy.from_pretrained(
            config.pretrained,
            revision=config.revision,
            dtype=config.dtype,
            resolution=config.resolution,
            max_sequence_length=config.max_sequence_length,
            lora_rank=config.lora_rank,
            lora_alpha=config.lora_alpha,
            lora_targets=config.lora_targets,
            seed=seed,
        )
    device = environment.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    policy.pipeline.to(device)
    return policy


@contextlib.contextmanager
def _blaming(parameter: str) -> Iterator[None]:
    """Words a `ValueError` of the block as the wrong value of a parameter that it is."""
    try:
        yield
    except ValueError as error:
        raise ConfigError(f"{parameter}: {error}") from error


def _check_pretrained(config: PolicyConfig) -> None:
    """Refuses a base model folder that is absent or damaged; a hub name, which has a revision, is diffusers' matter."""
    folder = Path(config.pretrained)
    if (folder / "manifest.json").exists():
        verify_manifest(folder)
    elif config.revision is None and not (folder / "model_index.json").exists():
        raise ConfigError(
            f"policy.pretrained: {config.pretrained} is no folder with a model_index.json; `git checkout` restores the "
            "shipped one, and a model of the hub needs its policy.revision"
        )


def _run_key(config: TrainStage) -> str:
    """Digests all that shapes a training: configuration, prompts, base model, and the code of this package."""
    base = Path(config.policy.pretrained)
    files = [TRAINING_PROMPTS, EVALUATION_PROMPTS, *sorted(CODE.rglob("*.py")), *sorted(base.rglob("*.safetensors"))]
    lines = [config_digest(config), *(f"{file.name} {sha256_of_file(file)}" for file in files)]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _use_threads(environment: Environment) -> None:
    if environment.num_threads is not None:
        import torch

        torch.set_num_threads(environment.num_threads)
