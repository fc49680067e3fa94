"""Whole runs of the trainer on a tiny policy: what is recorded, evaluated, kept, and that a crash changes nothing."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import itertools
import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import sfgrpo.training.collector
from sfgrpo.checkpoint.state import checkpoint_path, latest_checkpoint, load_checkpoint, update_of
from sfgrpo.config.batching import BatchArithmetic
from sfgrpo.errors import NumericsError, Preempted, SanityCheckError
from sfgrpo.evaluation.evaluate import draw_images, protocol_of
from sfgrpo.policies.base import Policy
from sfgrpo.rewards.base import Reward
from sfgrpo.runtime.shutdown import GracefulShutdown
from sfgrpo.training.trainer import Trainer
from sfgrpo.types import Prompt
from tests.support.comparing import assert_same
from tests.support.paths import ROOT
from tests.support.recording import RecordingTracker
from tests.support.tiny import Light, counted_passes, make_tiny_policy
from tests.support.trainings import (
    EVALUATION,
    GROUP_SIZE,
    NUM_IMAGES,
    NUM_LONG_UPDATES,
    NUM_STEPS,
    TRAINING,
    Half,
    Stopping,
    adapter_of,
    lay_out,
    small_config,
    timeless,
    trainer_in,
)

SHARES = (0.0, 1.0, 0.5, 1.0)
"""Of the images that four evaluations find right."""


class Watchful(Light):
    """Light that remembers every prompt it was asked about."""

    def __init__(self) -> None:
        self.asked: list[Prompt] = []

    def __call__(self, images, prompts):
        self.asked += prompts
        return super().__call__(images, prompts)


class Flat(Light):
    """Likes everything alike."""

    def __call__(self, images, prompts):
        return torch.full((len(images),), 0.25)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """A finished run with its folder, which several tests look at."""

    trainer: Trainer
    policy: Policy
    tracker: RecordingTracker
    is_correct: Half
    folder: Path


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run of 5 updates, evaluated after 0, 2, 4 and 5, of which the evaluation after 2 finds most images right."""
    folder, policy = tmp_path_factory.mktemp("run"), make_tiny_policy()
    tracker, is_correct = RecordingTracker(), Half(*SHARES)
    trainer = trainer_in(folder, policy=policy, tracker=tracker, is_correct=is_correct)
    trainer.run()
    return Run(trainer=trainer, policy=policy, tracker=tracker, is_correct=is_correct, folder=folder)


def test_every_update_is_recorded(run):
    assert [record["update"] for record in run.trainer.history] == [1, 2, 3, 4, 5]
    for record in run.trainer.history:
        assert record.keys() >= {
            "reward/mean",
            "reward/std",
            "reward/start",
            "gain/mean",
            *(f"gain/step_{step:02d}/abs_mean" for step in range(NUM_STEPS)),
            "groups/constant_fraction",
            "policy/loss",
            "policy/ratio_mean",
            "policy/ratio_deviation_first_pass",
            "policy/clip_fraction",
            "optim/grad_norm",
            "optim/learning_rate",
            "time/rollout_s",
            "time/estimates_s",
            "time/decode_s",
            "time/reward_s",
            "time/update_s",
        }
        # Not 0, because the batches of rollout and update differ.
        assert record["policy/ratio_deviation_first_pass"] < 1e-5
        total = record["reward/start"] + NUM_STEPS * record["gain/mean"]
        assert record["reward/mean"] == pytest.approx(total, abs=1e-5)
    assert [step for step, _ in run.tracker.metrics["reward/mean"]] == [1, 2, 3, 4, 5]


def test_evaluations_come_first_when_due_and_last(run):
    assert [record["update"] for record in run.trainer.evaluations] == [0, 2, 4, 5]
    for record in run.trainer.evaluations:
        assert record["metrics"].keys() >= {"geneval/overall", "evaluation/light", "time/evaluation_s"}
    assert [step for step, _ in run.tracker.metrics["geneval/overall"]] == [0, 2, 4, 5]
    assert [(key, step) for key, step, _ in run.tracker.images] == [("samples", step) for step in (0, 2, 4, 5)]
    assert all(path.exists() for _, _, path in run.tracker.images)


def test_checkpoints_come_when_due_and_last(run):
    assert [path.name for path in sorted((run.folder / "checkpoints").iterdir())] == [
        "update-000002",
        "update-000004",
        "update-000005",
    ]
    state = load_checkpoint(latest_checkpoint(run.folder / "checkpoints"))
    assert_same(dict(state.adapter), adapter_of(run.policy))
    assert list(state.history) == run.trainer.history
    assert state.extra["evaluations"] == run.trainer.evaluations


def test_best_evaluation_is_the_earliest_of_the_highest_and_its_adapter_is_kept(run):
    assert run.trainer.best["update"] == 2
    kept = make_tiny_policy(seed=3)
    kept.load_adapter(run.folder / "best")
    state = load_checkpoint(checkpoint_path(run.folder / "checkpoints", 2))
    averages = state.ema["averages"]
    assert_same(adapter_of(kept), averages)
    assert any(not torch.equal(value, state.adapter[name]) for name, value in averages.items())


def test_averaged_adapter_is_the_one_that_is_judged(run):
    kept, options = make_tiny_policy(), small_config().evaluation
    kept.load_adapter(run.folder / "best")
    images = draw_images(kept, kept.encode([prompt.text for prompt in EVALUATION]), protocol_of(options))
    assert (images == run.is_correct.shown[1]).all()
    assert (run.is_correct.shown[0] != run.is_correct.shown[1]).any()


def test_start_noise_belongs_to_the_group_and_step_noise_to_the_image(tmp_path, monkeypatch):
    rolled_out = []

    def watched(*arguments, **options):
        rolled_out.append(arguments[2:4])
        return original(*arguments, **options)

    original = sfgrpo.training.collector.roll_out
    monkeypatch.setattr(sfgrpo.training.collector, "roll_out", watched)
    trainer_in(tmp_path, small_config(update={"num_updates": 2})).run()
    updates = [[torch.cat(parts) for parts in zip(*rolled_out[first : first + 2], strict=True)] for first in (0, 2)]
    for start, noise in updates:
        groups = start.unflatten(0, (2, GROUP_SIZE))
        assert torch.equal(groups, groups[:, :1].expand_as(groups))
        assert not torch.equal(groups[0], groups[1])
        assert len(torch.unique(noise.flatten(1), dim=0)) == NUM_IMAGES
    assert not torch.equal(updates[0][0], updates[1][0])
    assert not torch.equal(updates[0][1], updates[1][1])


def without_evaluation(asked: list[Prompt]) -> int:
    return sum(prompt in TRAINING for prompt in asked)


def test_stepwise_credit_scores_every_state_at_the_announced_cost(tmp_path):
    config, reward, policy = small_config(update={"num_updates": 1}), Watchful(), make_tiny_policy()
    trainer = trainer_in(tmp_path, config, policy, reward=reward)
    with counted_passes(policy) as sizes:
        trainer.run()
    assert without_evaluation(reward.asked) == 2 + NUM_IMAGES * NUM_STEPS
    evaluations = 2 * len(EVALUATION) * config.evaluation.num_steps
    canary, trained = GROUP_SIZE, NUM_STEPS - 1
    per_image = NUM_STEPS + BatchArithmetic(config=config).estimate_passes + trained
    assert sum(sizes) == evaluations + canary + round(NUM_IMAGES * per_image)


def test_terminal_credit_scores_final_images_only(tmp_path):
    config = small_config(advantage={"credit": "terminal"}, update={"num_updates": 1})
    reward, policy = Watchful(), make_tiny_policy()
    trainer = trainer_in(tmp_path, config, policy, reward=reward)
    with counted_passes(policy) as sizes:
        trainer.run()
    assert without_evaluation(reward.asked) == NUM_IMAGES
    evaluations, canary = 2 * len(EVALUATION) * config.evaluation.num_steps, GROUP_SIZE
    assert sum(sizes) == evaluations + canary + NUM_IMAGES * (2 * NUM_STEPS - 1)
    assert not [key for key in trainer.history[0] if key.startswith("gain/") or key == "reward/start"]


@pytest.mark.parametrize("credit", ["joint", "per_step", "step_mean", "terminal"])
def test_reward_that_never_differs_changes_nothing_and_raises_no_alarm(tmp_path, credit):
    policy = make_tiny_policy()
    start = adapter_of(policy)
    trainer = trainer_in(
        tmp_path, small_config(advantage={"credit": credit}, update={"num_updates": 2}), policy, reward=Flat()
    )
    trainer.run()
    assert [record["groups/constant_fraction"] for record in trainer.history] == [1.0, 1.0]
    assert_same(adapter_of(policy), start)


def test_adapter_that_does_not_learn_stops_the_run(tmp_path):
    config = small_config(update={"learning_rate": 1e-30})
    with pytest.raises(SanityCheckError, match=r"not attached to the policy, or update\.learning_rate is too small"):
        trainer_in(tmp_path, config).run()


def test_adapter_that_is_cut_off_stops_the_run(tmp_path):
    policy = make_tiny_policy()

    class CuttingOff(RecordingTracker):
        def log_metrics(self, metrics, step):
            policy.pipeline.transformer.disable_adapters()

    with pytest.raises(SanityCheckError, match="no trainable parameter takes part in the loss"):
        trainer_in(tmp_path, policy=policy, tracker=CuttingOff()).run()


def test_training_raises_what_is_rewarded(tmp_path):
    config = small_config(
        rollout={"group_size": 12, "micro_batch_size": 24},
        update={"num_updates": 16, "learning_rate": 3e-2, "clip_range": 0.2, "micro_batch_size": 12},
        checkpoint={"every_num_updates": 16},
        evaluation={"every_num_updates": 16, "images_per_prompt": 8},
    )
    trainer = trainer_in(tmp_path, config)
    trainer.run()
    before, after = (record["metrics"]["evaluation/light"] for record in trainer.evaluations)
    assert after > before + 0.004


@pytest.mark.parametrize("stopped_at", [1, 3, 4])
def test_stopped_run_ends_as_if_it_had_never_been_stopped(run, tmp_path, stopped_at, caplog):
    with pytest.raises(KeyboardInterrupt):
        trainer_in(tmp_path, tracker=Stopping(stopped_at), is_correct=Half(0.0, 1.0)).run()
    torch.manual_seed(99)
    trainer = trainer_in(tmp_path, policy=make_tiny_policy(seed=0), is_correct=Half(*SHARES[num_evaluated(tmp_path) :]))
    assert trainer.update_index == (stopped_at - 1) // 2 * 2
    trainer.run()
    ours, theirs = (load_checkpoint(latest_checkpoint(folder / "checkpoints")) for folder in (tmp_path, run.folder))
    for field in ("update_index", "adapter", "ema", "optimizer", "config"):
        assert_same(getattr(ours, field), getattr(theirs, field))
    assert timeless(trainer.history) == timeless(run.trainer.history)
    assert timeless(trainer.evaluations) == timeless(run.trainer.evaluations)
    ours, theirs = ((folder / "best" / "pytorch_lora_weights.safetensors") for folder in (tmp_path, run.folder))
    assert ours.read_bytes() == theirs.read_bytes()


def num_evaluated(folder: Path) -> int:
    """Counts the evaluations in the store of a run."""
    return len(list(folder.glob("evaluations/*/metrics.json")))


class Told(GracefulShutdown):
    """Is told to stop at a look that the training takes once an update is recorded."""

    def __init__(self, look: int = 0) -> None:
        super().__init__(grace_s=60.0)
        self.look, self.num_looks, self.is_counting = look, 0, False

    @property
    def stop_requested(self) -> bool:
        self.num_looks += self.is_counting
        return self.num_looks > self.look


class Telling(RecordingTracker):
    """Lets the looks of the shutdown be counted when an update is recorded."""

    def __init__(self, shutdown: Told, update: int) -> None:
        super().__init__()
        self.shutdown, self.update = shutdown, update

    def log_metrics(self, metrics, step):
        super().log_metrics(metrics, step)
        self.shutdown.is_counting |= "reward/mean" in metrics and step == self.update


def assert_ends_as(run: Run, folder: Path) -> None:
    trainer = trainer_in(folder, policy=make_tiny_policy(seed=0), is_correct=Half(*SHARES[num_evaluated(folder) :]))
    trainer.run()
    ours, theirs = (load_checkpoint(latest_checkpoint(place / "checkpoints")) for place in (folder, run.folder))
    for field in ("update_index", "adapter", "ema", "optimizer", "scaler", "best", "rng"):
        assert_same(getattr(ours, field), getattr(theirs, field))
    assert timeless(trainer.history) == timeless(run.trainer.history)
    assert timeless(trainer.evaluations) == timeless(run.trainer.evaluations)


def len_of(folder: Path) -> int:
    """Counts the evaluations that the newest checkpoint of a run remembers."""
    return len(load_checkpoint(latest_checkpoint(folder / "checkpoints")).extra["evaluations"])


def saved_updates(folder: Path) -> list[int]:
    return sorted(map(update_of, (folder / "checkpoints").iterdir()))


@pytest.mark.parametrize("update", [1, 3, 4])
def test_run_that_is_told_to_stop_after_an_update_saves_it(run, tmp_path, update):
    shutdown = Told()
    with pytest.raises(Preempted, match=f"its state after update {update} is saved"):
        trainer_in(tmp_path, tracker=Telling(shutdown, update), shutdown=shutdown, is_correct=Half(0.0, 1.0, 0.5)).run()
    assert saved_updates(tmp_path)[-1] == update
    assert_ends_as(run, tmp_path)


def test_loss_scale_of_float16_comes_back_with_the_rest(tmp_path):
    config = small_config(policy={"dtype": "float16"}, update={"ratio_tolerance": 0.1})
    ends = []
    for stops in ((), (2, 4)):
        folder = tmp_path / str(len(ends))
        for stop in stops:
            shutdown = Told()
            policy = make_tiny_policy(dtype=torch.float16)
            with pytest.raises(Preempted):
                trainer_in(folder, config, policy, tracker=Telling(shutdown, stop), shutdown=shutdown).run()
        trainer_in(folder, config, make_tiny_policy(dtype=torch.float16)).run()
        ends.append(load_checkpoint(latest_checkpoint(folder / "checkpoints")))
    assert ends[0].scaler["scale"] != 65536.0 or ends[0].scaler["_growth_tracker"] > 0
    for field in ("adapter", "ema", "optimizer", "scaler"):
        assert_same(getattr(ends[1], field), getattr(ends[0], field))


def test_evaluation_is_broken_off_and_done_again_after_the_resume(run, tmp_path):
    shutdown = Told()
    with pytest.raises(Preempted, match="after update 2 "):
        trainer_in(tmp_path, tracker=Telling(shutdown, 2), shutdown=shutdown, is_correct=Half(0.0, 1.0)).run()
    assert saved_updates(tmp_path) == [2]
    assert len_of(tmp_path) == 1
    assert_ends_as(run, tmp_path)


def assert_is_given_up_everywhere(trainer: Trainer, shutdown: Told, message: str) -> int:
    """Stops the next update at one of its looks after the other, without an effect; gives their number."""
    state, number = copy.deepcopy(trainer._learner.state()), trainer.update_index
    looks = itertools.count()
    for shutdown.look in looks:
        shutdown.num_looks = 0
        with pytest.raises(Preempted, match=message):
            trainer.run()
        if trainer.update_index > number:
            break
        assert_same(trainer._learner.state(), state)
    shutdown.is_counting, shutdown.num_looks = False, 0
    return next(looks) - 1


def test_update_is_given_up_wherever_it_is_and_the_state_before_it_is_saved(run, tmp_path):
    shutdown = Told()
    trainer = trainer_in(tmp_path, tracker=Telling(shutdown, 3), shutdown=shutdown, is_correct=Half(0.0, 1.0, 0.5))
    with pytest.raises(Preempted, match="its state after update 3 is saved, and starting it again goes on"):
        trainer.run()
    assert saved_updates(tmp_path)[-1] == 3
    num_looks = assert_is_given_up_everywhere(trainer, shutdown, "its state after update [34] is saved")
    # Before the update, after each of its steps, its estimates and its batches of images, after each backward pass.
    assert num_looks >= 1 + NUM_STEPS + 1 + NUM_STEPS + 2 * NUM_STEPS
    assert saved_updates(tmp_path)[-1] == 4
    assert_ends_as(run, tmp_path)


def test_run_that_is_told_to_stop_in_its_first_update_says_that_nothing_was_done(run, tmp_path):
    shutdown = Told()
    trainer = trainer_in(tmp_path, shutdown=shutdown, is_correct=Half(0.0))
    trainer._periodic.request(0, trainer.averaged())
    trainer._periodic.advance()
    shutdown.is_counting = True
    with pytest.raises(Preempted, match="before its first update was done; starting it again begins with that one"):
        trainer.run()
    assert saved_updates(tmp_path) == [0]
    assert len_of(tmp_path) == 1, "the evaluation before training is not repeated"
    assert_is_given_up_everywhere(trainer, shutdown, "before its first update was done|its state after update 1")
    assert_ends_as(run, tmp_path)


def test_resumed_run_tells_its_tracker_all_that_it_may_have_missed(run, tmp_path):
    shutil.copytree(run.folder, tmp_path, dirs_exist_ok=True)
    tracker = RecordingTracker()
    trainer_in(tmp_path, tracker=tracker)
    assert tracker.metrics == run.tracker.metrics
    assert [(key, step) for key, step, _ in tracker.images] == [("samples", step) for step in (0, 2, 4, 5)]


def test_best_adapter_comes_back_with_the_checkpoint(run, tmp_path):
    shutil.copytree(run.folder / "checkpoints", tmp_path / "checkpoints")
    trainer_in(tmp_path)
    (ours,), (theirs,) = ((folder / "best").iterdir() for folder in (tmp_path, run.folder))
    assert ours.read_bytes() == theirs.read_bytes()


class SometimesBroken(Light):
    """Light that has no number for one of the training prompts."""

    def __call__(self, images, prompts):
        rewards = super().__call__(images, prompts)
        return torch.where(torch.tensor([prompt == TRAINING[0] for prompt in prompts]), torch.nan, rewards)


def test_reward_that_is_not_finite_costs_its_group_and_is_written_down(tmp_path):
    trainer = trainer_in(tmp_path, reward=SometimesBroken())
    trainer.run()
    broken = [record["guards/broken"] for record in trainer.history]
    assert 0 < sum(broken) < len(broken)
    assert all(math.isfinite(value) for record in trainer.history for value in record.values())
    for record in trainer.history:
        assert record["groups/constant_fraction"] >= 0.5 * record["guards/broken"]
    lines = [json.loads(line) for line in (tmp_path / "nonfinite.jsonl").read_text().splitlines()]
    assert {line["update"] + 1 for line in lines} == {
        record["update"] for record in trainer.history if record["guards/broken"]
    }
    assert {(line["kind"], line["prompt"]) for line in lines} == {("reward", TRAINING[0].text)}


def test_too_many_updates_that_are_not_finite_stop_the_run_and_a_resume_remembers_them(tmp_path):
    config = small_config(update={"max_broken_updates": 2}, checkpoint={"every_num_updates": 1})
    with pytest.raises(NumericsError, match=r"3 updates had .* more than update\.max_broken_updates = 2"):
        trainer_in(tmp_path, reward=TrainingBroken(), config=config).run()
    trainer = trainer_in(tmp_path, reward=TrainingBroken(), config=config)
    assert trainer.update_index == 2
    with pytest.raises(NumericsError, match="3 updates had"):
        trainer.run()


class TrainingBroken(Light):
    """Has no number for training prompts."""

    def __call__(self, images, prompts):
        rewards = super().__call__(images, prompts)
        return torch.where(torch.tensor([prompt in TRAINING for prompt in prompts]), torch.nan, rewards)


def test_finished_run_has_nothing_left_to_do(run):
    class Untouched(Reward):
        name = "untouched"

        def __call__(self, images, prompts):
            raise AssertionError("a finished run was scored again")

    trainer = trainer_in(run.folder, reward=Untouched(), is_correct=Untouched())
    trainer.run()
    assert trainer.history == run.trainer.history and trainer.best == run.trainer.best


@contextlib.contextmanager
def training_in(folder: Path):
    """Starts the real thing, with its progress as a stream and its log in a file."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "SFGRPO_NUM_THREADS": "1"}
    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_RUN_ID", "SFGRPO_SCRATCH", "SFGRPO_DEVICE"):
        environment.pop(name, None)
    with (folder / "log").open("a") as log:
        command = [sys.executable, "-m", "sfgrpo", "train"]
        with subprocess.Popen(
            command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=log, text=True
        ) as process:
            try:
                yield process
            finally:
                process.kill()


def finished(process: subprocess.Popen, folder: Path) -> tuple[bytes, bytes]:
    """Waits for the end of a training; reads the adapter that it published and the one that it ended with."""
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output + (folder / "log").read_text()
    (published,) = (folder / "models/policy/adapter").iterdir()
    (last,) = folder.glob(f".scratch/train-*/checkpoints/update-{NUM_LONG_UPDATES:06d}/adapter.safetensors")
    return published.read_bytes(), last.read_bytes()


@pytest.mark.slow
def test_killed_training_publishes_the_same_adapter(tmp_path):
    whole, parts = lay_out(tmp_path / "whole"), lay_out(tmp_path / "parts")
    moments = random.Random(0)
    with training_in(whole) as uninterrupted:
        for _ in range(2):
            with training_in(parts) as process:
                assert any(line.startswith("update ") for line in process.stdout), (parts / "log").read_text()
                time.sleep(moments.uniform(0.0, 0.3))
                process.kill()
                assert process.wait() == -signal.SIGKILL, "the training was over before it was killed"
        assert not (parts / "models").exists()
        with training_in(parts) as process:
            adapters = finished(process, parts)
        assert adapters == finished(uninterrupted, whole)
    assert "resuming after update" in (parts / "log").read_text()
    assert "resuming after update" not in (whole / "log").read_text()
    record, expected = (json.loads((folder / "models/policy/training.json").read_text()) for folder in (parts, whole))
    assert record["run_key"] == expected["run_key"] and record["update"] == expected["update"]
