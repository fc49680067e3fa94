"""One training from its configuration to its published adapter: run folder, record, mirror, and the training itself."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from sfgrpo.config.schema import LaunchConfig
from sfgrpo.config.stages import TrainStage, to_flat_dict
from sfgrpo.errors import ConfigError, MirrorError, SfgrpoError
from sfgrpo.factory import (
    check_pretrained,
    device_of,
    make_accelerator,
    make_held_out,
    make_policy,
    make_reward,
    use_threads,
)
from sfgrpo.paths import (
    EVALUATION_PROMPTS,
    PARAMS,
    POLICY,
    PROMPTS,
    RUN_PREFIX,
    TRAIN_REPORT,
    TRAINING,
    TRAINING_PROMPTS,
    run_lock,
)
from sfgrpo.prompts import read_prompts
from sfgrpo.runtime.environment import Environment
from sfgrpo.runtime.files import atomic_directory, atomic_write
from sfgrpo.runtime.locks import exclusive_lock
from sfgrpo.runtime.shutdown import GracefulShutdown
from sfgrpo.tracking.provenance import flow_tags, provenance_tags
from sfgrpo.training.fingerprint import evaluation_scope, run_key
from sfgrpo.types import Prompt

if TYPE_CHECKING:
    from accelerate import Accelerator

    from sfgrpo.policies.base import Policy
    from sfgrpo.rewards import Reward
    from sfgrpo.runtime.shutdown import GracefulShutdown
    from sfgrpo.tracking.base import Tracker
    from sfgrpo.training.trainer import Trainer


logger = logging.getLogger(__name__)

EXPERIMENT = "sfgrpo"
INPUTS = "inputs"
"""Folder, below that of a run, with what it was started with."""
PROVENANCE = "provenance.json"
MIRROR_S = 300.0
"""How long the end of a training waits for its mirror."""
LOCK_MARGIN_S = 10.0
"""How much longer a start waits for an earlier process of its run than that has to save its state."""
LEAVING_S = 2.0
"""What is kept of the time that a stopped process has, for the rest of its leaving."""


def find_inputs(name: str, environment: Environment) -> Path:
    """Finds what a run was started with, parameters and prompts, in the scratch folder or in the mirror.

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
    config: TrainStage, environment: Environment, launch: LaunchConfig, inputs: Path | None = None
) -> None:
    """Trains the adapter, going on where an interrupted run of the same configuration, data and code stopped.

    Every process of a distributed training calls this; the first one records and publishes. The prompts are those of
    `inputs`, which `find_inputs` gave, or else those that the stage before this one wrote.

    Raises:
        ConfigError: `inputs` belong to a run of other code or models, or the processes are not of one run.
        Preempted: the process was told to stop; calling this again goes on.
    """
    with GracefulShutdown(environment.grace_s) as shutdown:
        accelerator = make_accelerator(config, environment)
        if launch.sharding == "full" and accelerator.num_processes == 1:
            raise ConfigError(
                "launch.sharding: full spreads the frozen weights over processes, and there is one; use none, or a "
                "launch.num_processes of 2 or more"
            )
        aside = _evaluates_aside(environment)
        reward = make_reward(config.reward)
        check_pretrained(config.policy)
        use_threads(environment)
        prompt_files = [(inputs or PROMPTS) / path.name for path in (TRAINING_PROMPTS, EVALUATION_PROMPTS)]
        prompts, evaluation_prompts = map(read_prompts, prompt_files)
        key = run_key(config, prompts, evaluation_prompts)
        folder = environment.scratch_dir / f"{RUN_PREFIX}{key[:16]}"
        if inputs is not None and inputs.parent != folder:
            _refuse_other_code(inputs)
        _require_same_run(key, accelerator)
        folder.mkdir(parents=True, exist_ok=True)
        if accelerator.is_main_process:
            atomic_write(TRAINING, json.dumps({"folder": str(folder.resolve())}) + "\n")
        with (
            _only_trainer(folder, environment, accelerator),
            _mirrored(folder, environment, shutdown, accelerator) as saved,
            _recorded(config, environment, key, folder, accelerator, prompt_files) as tracker,
        ):
            policy = make_policy(config.policy, config.seed, environment, launch.sharding)
            trainer = make_trainer(
                config,
                accelerator,
                policy,
                reward,
                prompts,
                evaluation_prompts,
                folder,
                tracker,
                shutdown,
                saved,
                aside=aside,
            )
            with shutdown.deferred():
                trainer.run()
            if accelerator.is_main_process:
                _publish(trainer, config, environment, key, folder, tracker)
        accelerator.end_training()


@contextlib.contextmanager
def _only_trainer(folder: Path, environment: Environment, accelerator: Accelerator) -> Iterator[None]:
    """Keeps others on this disk from training the run too, and lets one that was just told to stop save its state.

    The other processes of the run wait for the first one.
    """
    if not accelerator.is_main_process:
        yield
        return
    with exclusive_lock(run_lock(folder), environment.grace_s + LOCK_MARGIN_S) as alone:
        if not alone:
            raise SfgrpoError(
                f"another process trains run {folder.name}; wait until it is done, or stop it, then start this again"
            )
        yield


@contextlib.contextmanager
def _recorded(
    config: TrainStage,
    environment: Environment,
    key: str,
    folder: Path,
    accelerator: Accelerator,
    prompt_files: Sequence[Path],
) -> Iterator[Tracker]:
    """Keeps what the run starts with, opens its record and ends it with the block; the first process alone does so."""
    from sfgrpo.checkpoint.state import CHECKPOINTS, latest_checkpoint
    from sfgrpo.tracking.base import SilentTracker, ending
    from sfgrpo.tracking.mlflow_tracker import MlflowTracker

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
    provenance = provenance_tags(Path.cwd(), prompt_files[0])
    if not (folder / INPUTS).exists():
        with atomic_directory(folder / INPUTS) as partial:
            # JSON is YAML.
            (partial / PARAMS).write_text(json.dumps(dataclasses.asdict(config), indent=1) + "\n", encoding="utf-8")
            (partial / PROVENANCE).write_text(json.dumps(provenance, indent=1) + "\n", encoding="utf-8")
            for file in prompt_files:
                shutil.copy(file, partial / file.name)
    with ending(tracker):
        is_new = latest_checkpoint(folder / CHECKPOINTS) is None
        logger.info("%s run %s", "new" if is_new else "going on with", folder.name)
        if is_new:
            # A run that is new finds out about a store that is away before it costs anything; others go on without.
            tracker.open()
        tracker.log_params(to_flat_dict(config))
        tracker.set_tags(provenance | flow_tags(environment, Path.cwd()))
        tracker.log_prompts(prompt_files[0], "training-prompts", "training")
        tracker.log_prompts(prompt_files[1], "evaluation-prompts", "evaluation")
        yield tracker


@contextlib.contextmanager
def _mirrored(
    folder: Path, environment: Environment, shutdown: GracefulShutdown, accelerator: Accelerator
) -> Iterator[Callable[[], None]]:
    """Brings back what the mirror has of the run, and gives what asks the mirror to catch up with its folder."""
    if environment.mirror is None or not accelerator.is_main_process:
        accelerator.wait_for_everyone()
        yield lambda: None
        return
    from sfgrpo.checkpoint.state import CHECKPOINTS, latest_checkpoint
    from sfgrpo.storage.mirror import Mirror
    from sfgrpo.storage.restore import restore_run

    mirror = Mirror(environment.mirror, folder, environment.s3_encryption)
    try:
        restore_run(environment.mirror, folder)
    except MirrorError as error:
        if latest_checkpoint(folder / CHECKPOINTS) is None:
            raise
        logger.warning("the run goes on from what this machine has of it: %s", error)
    # What an earlier start could not upload any more.
    mirror.sync()
    accelerator.wait_for_everyone()
    try:
        yield mirror.sync
    finally:
        mirror.close(min(MIRROR_S, shutdown.remaining_s - LEAVING_S))


def _evaluates_aside(environment: Environment) -> bool:
    """Tells whether evaluations have a device of their own; refuses one on which figures would come out otherwise."""
    kind, wanted = device_of(environment).partition(":")[0], environment.evaluation_device
    if wanted is not None and wanted.partition(":")[0] != kind:
        raise ConfigError(
            f"environment: SFGRPO_EVALUATION_DEVICE: {wanted} is no device of the training's kind, {kind}, and would "
            f"give other figures; use {kind} and a number, or unset the variable"
        )
    return wanted is not None


def _require_same_run(key: str, accelerator: Accelerator) -> None:
    """Refuses to train unless all processes have the same configuration, prompts, models and code."""
    from sfgrpo.grpo.distributed import agree

    if not agree(key, accelerator):
        raise ConfigError(
            "the nodes differ in parameters, prompts, models or code, so that their run keys do; bring all of them to "
            "the same commit and data"
        )


def _refuse_other_code(inputs: Path) -> NoReturn:
    commit = json.loads((inputs / PROVENANCE).read_text(encoding="utf-8"))["git_commit"]
    raise ConfigError(
        f"run {inputs.parent.name} was started with other code or models, and would not be the same run; check out "
        f"commit {commit}, or start anew without --resume"
    )


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
    # One number to sort runs by, and not all of them: each has a chart of its own, and these would come first.
    tracker.log_metrics({"best/geneval/overall": best["metrics"]["geneval/overall"]}, trainer.update_index)
    tracker.set_tags({"best_update": str(best["update"])})
    print(f"best of {len(evaluations)} evaluations: update {best['update']}, adapter in {POLICY}")


def make_trainer(
    config: TrainStage,
    accelerator: Accelerator,
    policy: Policy,
    reward: Reward,
    prompts: Sequence[Prompt],
    evaluation_prompts: Sequence[Prompt],
    folder: Path,
    tracker: Tracker,
    shutdown: GracefulShutdown,
    saved: Callable[[], None] = lambda: None,
    *,
    aside: bool = False,
) -> Trainer:
    """Makes the trainer, which goes on from the latest checkpoint in `folder`, if there is one.

    It heeds `shutdown`, calls `saved` after every checkpoint, and has others evaluate `aside` if there are any. The
    evaluations of all runs are kept beside `folder`.
    """
    from sfgrpo.evaluation.store import EVALUATIONS
    from sfgrpo.rewards import build_reward
    from sfgrpo.training.trainer import Trainer, TrainerInputs

    materials = TrainerInputs(
        prompts=prompts,
        evaluation_prompts=evaluation_prompts,
        reward=reward,
        verdict=build_reward("geneval_correct"),
        held_out=make_held_out(),
        folder=folder,
        evaluations=folder.parent / EVALUATIONS,
        scope=evaluation_scope(config, evaluation_prompts, policy.device.type),
        aside=aside,
        tracker=tracker,
        shutdown=shutdown,
        saved=saved,
    )
    return Trainer(config, policy, materials, accelerator)
