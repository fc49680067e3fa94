"""Evaluate one snapshot of a training, in a process and on a device of its own, while the training goes on."""

from __future__ import annotations

from pathlib import Path

from sfgrpo.checkpoint.snapshots import Snapshot, evaluation_key, list_snapshots, read_snapshot
from sfgrpo.config.stages import TrainStage, load_config
from sfgrpo.errors import ConfigError, SfgrpoError
from sfgrpo.evaluation.store import EVALUATIONS, claimed_evaluation, read_metrics
from sfgrpo.factory import check_pretrained, make_policy, make_reward, use_threads
from sfgrpo.paths import PARAMS, VALIDATION_PROMPTS
from sfgrpo.preflight.devices import device_of
from sfgrpo.prompts import read_prompts
from sfgrpo.runtime.environment import Environment
from sfgrpo.training.fingerprint import INPUTS, evaluation_fingerprint


def evaluate_snapshot(folder: Path, update: int, environment: Environment) -> None:
    """Evaluate a snapshot of a run and store the result, unless that was done or another process does it.

    Raises:
        SfgrpoError: The run has no snapshot of that update.
        ConfigError: Code, models or kind of device differ from those of the training.
    """
    snapshot = _snapshot_of(folder, update)
    store = folder.parent / EVALUATIONS
    with claimed_evaluation(store, snapshot.key) as is_free:
        if not is_free:
            print(f"update {update} is being evaluated by another process")
        elif read_metrics(store, snapshot.key) is not None:
            print(f"update {update} is evaluated")
        else:
            _evaluate(folder, snapshot, store, environment)


def _snapshot_of(folder: Path, update: int) -> Snapshot:
    snapshots = {snapshot.update: snapshot for snapshot in list_snapshots(folder)}
    if update not in snapshots:
        cure = f"use one of {', '.join(map(str, snapshots))}" if snapshots else "it has none yet"
        raise SfgrpoError(f"{folder} has no snapshot of update {update}; {cure}")
    return snapshots[update]


def _evaluate(folder: Path, snapshot: Snapshot, store: Path, environment: Environment) -> None:
    config = load_config(TrainStage, folder / INPUTS / PARAMS)
    prompts = read_prompts(folder / INPUTS / VALIDATION_PROMPTS.name, "evaluate it with the commit of the training")
    adapter = read_snapshot(folder, snapshot.update)
    kind = device_of(environment).partition(":")[0]
    if evaluation_key(evaluation_fingerprint(config, prompts, kind), adapter) != snapshot.key:
        raise ConfigError(
            f"snapshot {snapshot.update} of {folder.name} was published by other code or models, or for another "
            f"kind of device than {kind}; evaluate it with the commit and on the kind of device of the training"
        )
    reward = make_reward(config.reward)
    check_pretrained(config.policy)
    use_threads(environment)
    policy = make_policy(config.policy, config.seed, environment)
    from sfgrpo.evaluation.evaluator import Evaluator
    from sfgrpo.policies.base import use_adapter

    evaluator = Evaluator.of(config, prompts, reward)
    with use_adapter(policy, adapter):
        evaluator.evaluate(policy, store, snapshot.key)
    print(f"update {snapshot.update} is evaluated")
