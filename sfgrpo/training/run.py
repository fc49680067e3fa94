"""One training from its configuration to its published adapter: run folder, record, mirror, and the training itself."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from sfgrpo import factory
from sfgrpo.config.schema import LaunchConfig
from sfgrpo.config.stages import TrainStage, to_flat_dict
from sfgrpo.errors import ConfigError, MirrorError, SfgrpoError
from sfgrpo.evaluation.store import EVALUATIONS
from sfgrpo.paths import PARAMS, TRAINING, run_lock
from sfgrpo.preflight.devices import check_devices
from sfgrpo.prompt_checks import check_prompts
from sfgrpo.prompts import read_prompt_file
from sfgrpo.runtime.environment import Environment
from sfgrpo.runtime.files import atomic_directory, write_json
from sfgrpo.runtime.imports import without_collection
from sfgrpo.runtime.locks import exclusive_lock
from sfgrpo.runtime.shutdown import GracefulShutdown
from sfgrpo.tracking.provenance import flow_tags, provenance_tags
from sfgrpo.training.fingerprint import FINGERPRINT, INPUTS, PROVENANCE, Run, evaluation_fingerprint

if TYPE_CHECKING:
    from accelerate import Accelerator

    from sfgrpo.rewards import Reward
    from sfgrpo.tracking.base import Tracker

logger = logging.getLogger(__name__)

EXPERIMENT = "sfgrpo"
CODE_CHANGE_TAG = "sfgrpo.code_change"
MIRROR_S = 300.0
"""How long the end of a training waits for its mirror."""
LOCK_MARGIN_S = 10.0
"""How much longer than the grace of an earlier process of the run a start waits for it to save its state and leave."""
LEAVING_S = 2.0
"""How much of its grace a stopped process keeps for the rest of its exit."""


def find_inputs(name: str, environment: Environment) -> Path:
    """Find what a run was started with, parameters and prompts, in the scratch folder or in the mirror.

    Raises:
        SfgrpoError: neither has a run of this name.
    """
    folder = environment.scratch_dir / name
    if not (folder / INPUTS).exists():
        if environment.mirror is None:
            raise SfgrpoError(
                f"no run {name} in {environment.scratch_dir}; set SFGRPO_MIRROR to the bucket that has it, or start it "
                "anew without --resume"
            )
        from sfgrpo.storage.restore import require_run, restore_run

        require_run(environment.mirror, name)
        restore_run(environment.mirror, folder)
    return folder / INPUTS


def train_policy(
    config: TrainStage, environment: Environment, launch: LaunchConfig, inputs: Path | None, *, accept_code_change: bool
) -> None:
    """Train the adapter, going on where an interrupted run of the same configuration, data and code stopped.

    Every process of a distributed training calls this; the first one records and publishes. `inputs` are what
    `find_inputs` returned for a run to resume. With `accept_code_change` a run of other code goes on as a new run.

    Raises:
        ConfigError: `inputs` are of a run with other code or models, or the processes are not of one run.
        Preempted: the process was told to stop; calling this again goes on.
    """
    with without_collection():
        from sfgrpo.evaluation.evaluator import Evaluator
        from sfgrpo.evaluation.periodic import EvaluationPaths
        from sfgrpo.training.publication import publish
        from sfgrpo.training.trainer import Trainer, TrainerInputs

    with GracefulShutdown(environment.grace_s) as shutdown:
        check_devices(environment)
        accelerator = factory.make_accelerator(config, environment, launch.sharding)
        reward = factory.make_reward(config.reward)
        factory.check_pretrained(config.policy)
        factory.use_threads(environment)
        run = Run.of(config, environment, inputs, accept_code_change=accept_code_change)
        _check_prompts(run, config, reward)
        _require_same_run(run.key, accelerator)
        with (
            _only_trainer(run, environment, accelerator),
            _mirrored(run.folder, environment, shutdown, accelerator) as on_checkpoint,
            _recorded(run, config, environment, accelerator) as tracker,
        ):
            policy = factory.make_policy(config.policy, config.seed, environment, launch.sharding)
            trainer_inputs = TrainerInputs(
                prompts=run.prompts,
                reward=reward,
                evaluator=Evaluator.of(config, run.validation_prompts, reward),
                paths=EvaluationPaths(
                    folder=run.folder,
                    store=run.folder.parent / EVALUATIONS,
                    fingerprint=evaluation_fingerprint(config, run.validation_prompts, policy.device.type),
                    in_background=environment.evaluation_device is not None,
                ),
                tracker=tracker,
                shutdown=shutdown,
                on_checkpoint=on_checkpoint,
            )
            trainer = Trainer(config, policy, trainer_inputs, accelerator)
            with shutdown.deferred():
                trainer.run()
            if accelerator.is_main_process:
                publish(trainer, config, environment, run, tracker)
        accelerator.end_training()


@contextlib.contextmanager
def _only_trainer(run: Run, environment: Environment, accelerator: Accelerator) -> Iterator[None]:
    """Make the run's folder and keep others on this disk from training the run too.

    One that was just told to stop is given time to save its state; the other processes of the run wait for the first.
    """
    if not accelerator.is_main_process:
        yield
        return
    with _locked(run.folder, environment):
        if run.predecessor is not None:
            _copy_state(run.predecessor, run.folder, environment)
        run.folder.mkdir(parents=True, exist_ok=True)
        write_json(TRAINING, {"folder": str(run.folder.resolve())})
        yield


@contextlib.contextmanager
def _locked(folder: Path, environment: Environment) -> Iterator[None]:
    with exclusive_lock(run_lock(folder), environment.grace_s + LOCK_MARGIN_S) as alone:
        if not alone:
            raise SfgrpoError(
                f"another process trains run {folder.name}; wait until it is done, or stop it, then start this again"
            )
        yield


def _copy_state(predecessor: Path, folder: Path, environment: Environment) -> None:
    """Start a run from all that another one has, unless it has a checkpoint of its own already."""
    if _has_checkpoint(folder):
        return
    with _locked(predecessor, environment):
        if environment.mirror is not None:
            _restore(environment.mirror, predecessor)
        with atomic_directory(folder) as partial:
            shutil.copytree(predecessor, partial, dirs_exist_ok=True, ignore=shutil.ignore_patterns(INPUTS, ".*"))


@contextlib.contextmanager
def _recorded(run: Run, config: TrainStage, environment: Environment, accelerator: Accelerator) -> Iterator[Tracker]:
    """Keep what the run starts with, open its record and end it with the block; the first process alone does so."""
    from sfgrpo.tracking.base import PROMPT_USES, SilentTracker, ending
    from sfgrpo.tracking.mlflow_tracker import MlflowTracker

    if not accelerator.is_main_process:
        yield SilentTracker()
        return
    tracker = MlflowTracker(
        uri=environment.tracking_uri,
        experiment=EXPERIMENT,
        run_name=f"{config.advantage.credit}-{run.key[:8]}",
        run_id=environment.run_id,
        key=run.key,
    )
    tags = provenance_tags(Path.cwd(), run.prompt_files[0])
    if not (run.folder / INPUTS).exists():
        with atomic_directory(run.folder / INPUTS) as partial:
            # JSON is YAML.
            write_json(partial / PARAMS, dataclasses.asdict(config))
            write_json(partial / PROVENANCE, tags)
            write_json(partial / FINGERPRINT, run.fingerprint)
            for file in run.prompt_files:
                shutil.copy(file, partial / file.name)
    if run.code_change is not None:
        logger.warning("the run goes on from %s with other code: %s", run.fingerprint["predecessor"], run.code_change)
        tags[CODE_CHANGE_TAG] = run.code_change
    with ending(tracker):
        is_new = not _has_checkpoint(run.folder)
        logger.info("%s run %s", "new" if is_new else "going on with", run.folder.name)
        if is_new:
            # A new run fails at once if the store is away, before it costs anything; others go on without it.
            tracker.open()
        tracker.log_params(to_flat_dict(config))
        tracker.set_tags(tags | flow_tags(environment, Path.cwd()))
        for use, file in zip(PROMPT_USES, run.prompt_files, strict=True):
            tracker.log_prompts(file, f"{use}-prompts", use)
        yield tracker


@contextlib.contextmanager
def _mirrored(
    folder: Path, environment: Environment, shutdown: GracefulShutdown, accelerator: Accelerator
) -> Iterator[Callable[[], None]]:
    """Restore what the mirror has of the run; yield what asks the mirror to catch up with the folder."""
    if environment.mirror is None or not accelerator.is_main_process:
        accelerator.wait_for_everyone()
        yield lambda: None
        return
    from sfgrpo.storage.mirror import Mirror

    mirror = Mirror(environment.mirror, folder, environment.s3_encryption)
    _restore(environment.mirror, folder)
    # What an earlier start could not upload any more.
    mirror.sync()
    accelerator.wait_for_everyone()
    try:
        yield mirror.sync
    finally:
        mirror.close(min(MIRROR_S, shutdown.remaining_s - LEAVING_S))


def _restore(uri: str, folder: Path) -> None:
    """Restore what a mirror has of a run; only a run that is nowhere else needs it."""
    from sfgrpo.storage.restore import restore_run

    try:
        restore_run(uri, folder)
    except MirrorError as error:
        if not _has_checkpoint(folder):
            raise
        logger.warning("the run goes on from what this machine has of it: %s", error)


def _has_checkpoint(folder: Path) -> bool:
    from sfgrpo.checkpoint.state import CHECKPOINTS, latest_checkpoint

    return latest_checkpoint(folder / CHECKPOINTS) is not None


def _check_prompts(run: Run, config: TrainStage, reward: Reward) -> None:
    """Refuse prompts that cannot be drawn, judged or counted as they stand."""
    from sfgrpo.evaluation.evaluator import Evaluator

    evaluator = Evaluator.of(config, run.validation_prompts, reward)
    policy = config.policy
    training, validation, evaluation = map(read_prompt_file, run.prompt_files)
    check_prompts(
        evaluation,
        (evaluator.is_correct, *evaluator.rewards),
        validation=validation,
        training=training,
        rewards=(reward,),
        encoders=factory.make_text_encoders(policy.pretrained, policy.revision, policy.max_sequence_length),
    )


def _require_same_run(key: str, accelerator: Accelerator) -> None:
    """Refuse to train unless all processes have the same configuration, prompts, models and code."""
    from sfgrpo.grpo.distributed import agree

    if not agree(key, accelerator):
        raise ConfigError(
            "the nodes differ in parameters, prompts, models or code, so that their run keys do; bring all of them to "
            "the same commit and data"
        )
