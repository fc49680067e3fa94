"""One training from its configuration to its published adapter: run folder, record, mirror, and the training itself."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from sfgrpo.assembly import (
    check_pretrained,
    make_accelerator,
    make_policy,
    make_reward,
    make_trainer,
    run_key,
    use_threads,
)
from sfgrpo.config import TrainStage, to_flat_dict
from sfgrpo.environment import Environment
from sfgrpo.files import atomic_directory
from sfgrpo.preemption import StopNotice
from sfgrpo.prompts import read_prompts
from sfgrpo.provenance import provenance_tags
from sfgrpo.sections import LaunchConfig

if TYPE_CHECKING:
    from accelerate import Accelerator

    from sfgrpo.tracking import Tracker
    from sfgrpo.trainer import Trainer

EXPERIMENT = "sfgrpo"
PROMPTS = Path("data/prompts")
TRAINING_PROMPTS = PROMPTS / "train.jsonl"
EVALUATION_PROMPTS = PROMPTS / "evaluation.jsonl"
POLICY = Path("models/policy")
TRAIN_REPORT = Path("reports/train")
MIRROR_S = 300.0
"""How long the end of a training waits for its mirror."""
LEAVING_S = 2.0
"""What is kept of the time that a stopped process has, for the rest of its leaving."""


def train_policy(config: TrainStage, environment: Environment, launch: LaunchConfig) -> None:
    """Trains the adapter, going on where an interrupted run of the same configuration, data and code stopped.

    Every process of a distributed training calls this; the first one records and publishes.

    Raises:
        Preempted: the process was told to stop; calling this again goes on.
    """
    with StopNotice(environment.grace_s) as notice:
        accelerator = make_accelerator(config, environment)
        reward = make_reward(config.reward)
        check_pretrained(config.policy)
        use_threads(environment)
        prompts, evaluation_prompts = read_prompts(TRAINING_PROMPTS), read_prompts(EVALUATION_PROMPTS)
        key = run_key(config, prompts, evaluation_prompts)
        folder = environment.scratch_dir / f"train-{key[:16]}"
        folder.mkdir(parents=True, exist_ok=True)
        with (
            _mirrored(folder, environment, notice, accelerator) as saved,
            _recorded(config, environment, key, folder, accelerator) as tracker,
        ):
            policy = make_policy(config.policy, config.seed, environment, launch.sharding)
            trainer = make_trainer(
                config, accelerator, policy, reward, prompts, evaluation_prompts, folder, tracker, notice, saved
            )
            with notice.deferred():
                trainer.run()
            if accelerator.is_main_process:
                _publish(trainer, config, environment, key, folder, tracker)
        accelerator.end_training()


@contextlib.contextmanager
def _recorded(
    config: TrainStage, environment: Environment, key: str, folder: Path, accelerator: Accelerator
) -> Iterator[Tracker]:
    """Opens the run's record and ends it with the block; only the first process has one."""
    from sfgrpo.checkpoint import CHECKPOINTS, latest_checkpoint
    from sfgrpo.mlflow_tracking import MlflowTracker
    from sfgrpo.tracking import SilentTracker, ending

    if not accelerator.is_main_process:
        yield SilentTracker()
        return
    tracker = MlflowTracker(
        uri=environment.tracking_uri,
        experiment=EXPERIMENT,
        run_name=f"{config.advantage.credit}-{key[:8]}",
        run_id=environment.run_id,
        key=key,
    )
    with ending(tracker):
        if latest_checkpoint(folder / CHECKPOINTS) is None:
            # A run that is new finds out about a store that is away before it costs anything; others go on without.
            tracker.open()
        tracker.log_params(to_flat_dict(config))
        tracker.set_tags(provenance_tags(Path.cwd(), TRAINING_PROMPTS))
        tracker.log_prompts(TRAINING_PROMPTS, "training-prompts", "training")
        tracker.log_prompts(EVALUATION_PROMPTS, "evaluation-prompts", "evaluation")
        yield tracker


@contextlib.contextmanager
def _mirrored(
    folder: Path, environment: Environment, notice: StopNotice, accelerator: Accelerator
) -> Iterator[Callable[[], None]]:
    """Brings back what the mirror has of the run, and gives what asks the mirror to catch up with its folder."""
    if environment.mirror is None or not accelerator.is_main_process:
        accelerator.wait_for_everyone()
        yield lambda: None
        return
    from sfgrpo.mirror import Mirror

    mirror = Mirror(environment.mirror, folder)
    mirror.restore()
    accelerator.wait_for_everyone()
    try:
        yield mirror.sync
    finally:
        mirror.close(min(MIRROR_S, notice.remaining_s - LEAVING_S))


def _publish(
    trainer: Trainer, config: TrainStage, environment: Environment, key: str, folder: Path, tracker: Tracker
) -> None:
    """Copies the best adapter and the reports to where the pipeline expects them."""
    # The record names the run, so the run has to be there.
    tracker.open()
    best = trainer.best
    record = {
        "update": best["update"],
        "num_updates": trainer.update_index,
        "images": trainer.update_index * config.rollout.num_images,
        "run_key": key,
        "mlflow_run_id": tracker.run_id,
        "tracking_uri": environment.tracking_uri,
    }
    evaluations = [{"update": evaluation["update"], **evaluation["metrics"]} for evaluation in trainer.evaluations]
    reports = {
        "history.json": trainer.history,
        "evaluations.json": evaluations,
        "summary.json": {"best_update": best["update"], **best["metrics"]},
    }
    with atomic_directory(POLICY) as partial:
        shutil.copytree(folder / "best", partial / "adapter")
        (partial / "training.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    with atomic_directory(TRAIN_REPORT) as partial:
        for name, content in reports.items():
            (partial / name).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        for grid in sorted(folder.glob("samples_*.png")):
            shutil.copy(grid, partial / grid.name)
    tracker.log_metrics({f"best/{name}": value for name, value in best["metrics"].items()}, trainer.update_index)
    tracker.set_tags({"best_update": str(best["update"])})
    print(f"best of {len(evaluations)} evaluations: update {best['update']}, adapter in {POLICY}")
