"""The training loop: rollout, update, and evaluations and checkpoints when due."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from sfgrpo.config.batching import BatchArithmetic
from sfgrpo.config.stages import TrainStage
from sfgrpo.errors import Preempted
from sfgrpo.evaluation.evaluator import Evaluator
from sfgrpo.evaluation.periodic import EvaluationPaths, PeriodicEvaluation
from sfgrpo.grpo.distributed import any_of
from sfgrpo.grpo.nonfinite import NumericalGuard
from sfgrpo.grpo.sanity import require_changed_sampler
from sfgrpo.grpo.update import Objective, UpdateOutcome, update_policy
from sfgrpo.policies.base import Policy
from sfgrpo.rewards.base import Reward
from sfgrpo.runtime.shutdown import GracefulShutdown
from sfgrpo.runtime.timing import PhaseClock
from sfgrpo.tracking.base import Tracker
from sfgrpo.tracking.progress import Progress
from sfgrpo.training.collector import Collected, Collector
from sfgrpo.training.learner import Learner
from sfgrpo.training.resume import Checkpointer
from sfgrpo.types import Prompt


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class TrainerInputs:
    """Dependencies of a run: prompts, rewards, evaluation, paths, tracker."""

    prompts: Sequence[Prompt]
    """Trained on."""
    reward: Reward
    """Trained on; the evaluator may have others."""
    evaluator: Evaluator
    paths: EvaluationPaths
    """The run's folder, with all that a resumed run needs, and the store of evaluations."""
    tracker: Tracker
    shutdown: GracefulShutdown
    """Its `stop_requested` ends the run at the next pass of the model."""
    on_checkpoint: Callable[[], None] = lambda: None
    """Called by the main process after every checkpoint."""


class _StopRequested(Exception):
    """Unwinds an update or an evaluation; what a checkpoint holds is as it was before."""


class Trainer:
    """One run of `config`; making it resumes from the latest checkpoint in the folder, if there is one.

    Every process of the run makes one. All numbers that a decision depends on are those of all processes, so that they
    decide alike; files are written by the main process.
    """

    def __init__(self, config: TrainStage, policy: Policy, inputs: TrainerInputs, accelerator: Accelerator) -> None:
        self._config, self._policy, self._inputs, self._accelerator = config, policy, inputs, accelerator
        self._batches = BatchArithmetic(config=config, num_processes=accelerator.num_processes)
        self._learner = Learner(policy, config)
        self._objective = Objective.of(policy, config.sampling, config.update, self._batches.update_micro_batch)
        self._collector = Collector(
            config, policy, inputs.prompts, inputs.reward, self._objective.sigmas_S, accelerator
        )
        self._periodic = PeriodicEvaluation(
            policy,
            inputs.evaluator,
            inputs.paths,
            inputs.tracker,
            accelerator,
            self._stop_if_requested,
            config.checkpoint.keep,
        )
        self._checkpointer = Checkpointer(
            inputs.paths.folder, config, self._learner, self._periodic, accelerator, inputs.on_checkpoint
        )
        # All noise is addressed by seed and update; this is for what a library may draw by itself.
        torch.manual_seed(config.seed)
        self.history: list[dict[str, Any]] = self._checkpointer.restore()
        """Metrics of every update so far."""
        self._sampler_changed = bool(self.history)
        if accelerator.is_main_process:
            self._record_again()
        self._guard = NumericalGuard(
            config.update.max_broken_updates,
            inputs.paths.folder / "nonfinite.jsonl",
            count=sum(int(metrics["guards/broken"]) for metrics in self.history),
            writes=accelerator.is_main_process,
        )

    @property
    def update_index(self) -> int:
        """Updates done."""
        return len(self.history)

    @property
    def evaluations(self) -> list[dict[str, Any]]:
        """Update and metrics of every evaluation so far."""
        return self._periodic.results

    @property
    def selected_by(self) -> str:
        """Metric that selects the best adapter."""
        return self._inputs.evaluator.selected_by

    @property
    def best(self) -> dict[str, Any]:
        """The evaluation with the highest `Evaluator.selected_by`; of equals the earliest that was trained at all."""
        return self._periodic.best

    def averaged(self) -> AbstractContextManager[None]:
        """Put the averaged adapter, which is what gets published, into the policy for a block."""
        return self._learner.averaged()

    def save_averaged(self, folder: Path) -> None:
        """Write the averaged adapter after the last update, as an evaluation gets it, into an existing folder."""
        with self.averaged():
            self._policy.save_adapter(folder)

    def run(self) -> None:
        """Train to the last update, evaluating and saving on the way.

        Raises:
            Preempted: the run was told to stop, and its state is saved.
        """
        num_updates, num_images = self._config.update.num_updates, self._config.rollout.num_images
        is_main = self._accelerator.is_main_process
        with Progress(num_updates, num_images, first_update=self.update_index, shown=is_main) as progress:
            try:
                self._evaluate_and_save()
                while self.update_index < num_updates:
                    self._stop_if_requested()
                    metrics = self._update(self.update_index)
                    self._learner.average()
                    self.history.append({"update": self.update_index + 1, **metrics})
                    self._inputs.tracker.log_metrics(metrics, self.update_index)
                    progress.show(self.update_index - 1, metrics)
                    self._evaluate_and_save()
            except _StopRequested:
                self._checkpointer.save(self.history)
                raise Preempted(self._what_is_saved()) from None

    def _what_is_saved(self) -> str:
        if self.update_index == 0:
            return "the run was told to stop before its first update was done; starting it again begins with that one"
        saved = f"its state after update {self.update_index} is saved, and starting it again goes on"
        return f"the run was told to stop; {saved}"

    def _evaluate_and_save(self) -> None:
        """Evaluate the averaged adapter and write a checkpoint, each if it is due now."""
        update = self.update_index
        is_last = update == self._config.update.num_updates
        if is_last or update % self._config.evaluation.every_num_updates == 0:
            self._periodic.request(update, self.averaged())
        self._periodic.finish() if is_last else self._periodic.advance()
        if is_last or (update > 0 and update % self._config.checkpoint.every_num_updates == 0):
            self._checkpointer.save(self.history)

    def _stop_if_requested(self) -> None:
        """Stop if some process was told to; all processes call this together, between two passes of the model."""
        if any_of(self._inputs.shutdown.stop_requested, self._accelerator):
            raise _StopRequested

    def _update(self, update_index: int) -> dict[str, float]:
        """Sample and score images, then update the policy; return the metrics."""
        clock, started = self._clock(), time.monotonic()
        rng = torch.get_rng_state()
        try:
            collected = self._collector.collect(update_index, clock, self._stop_if_requested)
            with clock("update"):
                outcome = self._learn(update_index, collected)
        except _StopRequested:
            torch.set_rng_state(rng)
            raise
        if not self._sampler_changed and outcome.trained:
            num_rows = self._batches.rollout_micro_batch
            require_changed_sampler(self._policy, collected.batch, num_rows, self._objective, self._accelerator)
            self._sampler_changed = True
        is_broken = self._record_broken(update_index, collected, outcome)
        return {
            **collected.metrics,
            **outcome.metrics,
            "optim/learning_rate": self._learner.learning_rate,
            "guards/broken": float(is_broken),
            **clock.metrics(),
            "time/total_s": time.monotonic() - started,
        }

    def _learn(self, update_index: int, collected: Collected) -> UpdateOutcome:
        """Update the policy; a stop amid the optimiser steps takes it back to where it was before them."""
        learner = self._learner
        with learner.undone_by(_StopRequested):
            learner.set_learning_rate(update_index)
            return update_policy(
                self._policy,
                learner.optimizer,
                collected.batch,
                self._objective,
                self._accelerator,
                learner.scaler,
                self._stop_if_requested,
            )

    def _record_broken(self, update_index: int, collected: Collected, outcome: UpdateOutcome) -> bool:
        """Record the prompts of images with a number that is not finite; return whether there are any."""
        partition = self._collector.partition
        broken = {
            "reward": collected.broken_reward_N,
            "loss": partition.gather(outcome.broken_loss_N, self._accelerator),
            "gradient": partition.gather(outcome.broken_gradient_N, self._accelerator),
        }
        for kind, images_N in broken.items():
            prompts = [collected.prompts[image] for image in images_N.nonzero().flatten().tolist()]
            self._guard.record(update_index, kind, prompts)
        return any(images_N.any() for images_N in broken.values())

    def _clock(self) -> PhaseClock:
        rollout = ("rollout.micro_batch_size", self._batches.rollout_micro_batch)
        settings = dict.fromkeys(("rollout", "estimates", "decode", "reward"), rollout) | {
            "update": ("update.micro_batch_size", self._batches.update_micro_batch)
        }
        return PhaseClock(self._policy.device, settings)

    def _record_again(self) -> None:
        """Record what the tracker may have missed before an earlier process of the run died."""
        for entry in self.history:
            self._inputs.tracker.log_metrics({k: v for k, v in entry.items() if k != "update"}, entry["update"])
        self._periodic.record_again()
