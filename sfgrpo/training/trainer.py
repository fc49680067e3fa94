"""The training run: rollout, rewards of every state, advantages, update; checkpoints and evaluations when due."""

from __future__ import annotations

import dataclasses
import functools
import logging
import math
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, NoReturn

import torch
from accelerate import Accelerator
from torch import Tensor

from sfgrpo.checkpoint.state import (
    CHECKPOINTS,
    TrainingState,
    latest_checkpoint,
    read_checkpoint,
    save_checkpoint,
    state_of,
    update_of,
)
from sfgrpo.config.batching import BatchArithmetic
from sfgrpo.config.stages import TrainStage, to_flat_dict
from sfgrpo.errors import Preempted
from sfgrpo.evaluation.evaluator import Evaluator
from sfgrpo.evaluation.periodic import EvaluationPaths, PeriodicEvaluation
from sfgrpo.grpo.advantages import group_advantages
from sfgrpo.grpo.distributed import (
    Partition,
    any_of,
    even_slices,
    highest,
    require_same_everywhere,
    row_slices,
    shared_files,
)
from sfgrpo.grpo.gains import step_gains
from sfgrpo.grpo.noise import gaussian_noise
from sfgrpo.grpo.nonfinite import NumericalGuard
from sfgrpo.grpo.rollout import roll_out
from sfgrpo.grpo.sanity import require_changed_sampler
from sfgrpo.grpo.scoring import StateScorer, collect_rewards
from sfgrpo.grpo.update import Objective, update_policy
from sfgrpo.policies.base import Policy
from sfgrpo.prompts import prompts_of_update
from sfgrpo.rewards.base import Reward
from sfgrpo.runtime.shutdown import GracefulShutdown
from sfgrpo.runtime.timing import PhaseClock
from sfgrpo.tracking.base import Tracker
from sfgrpo.tracking.progress import Progress
from sfgrpo.training.learner import Learner, read_best, restore_best
from sfgrpo.types import Conditioning, Prompt, RolloutBatch, Trajectory, joined

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class TrainerInputs:
    """What a run works with: prompts, what judges images, where state and records go."""

    prompts: Sequence[Prompt]
    evaluation_prompts: Sequence[Prompt]
    reward: Reward
    """Trained on."""
    verdict: Reward
    """GenEval's verdict, 0 or 1, for the table."""
    held_out: Sequence[Reward]
    """Measured in evaluation only; training sees none but `reward`, which may be listed again."""
    folder: Path
    """Resumable state: checkpoints, snapshots, the best adapter, sample grids."""
    evaluations: Path
    """Store of all evaluations."""
    scope: str
    """Digest of all that shapes an evaluation but the adapter."""
    aside: bool = False
    """Whether other processes evaluate while the training goes on."""
    tracker: Tracker
    shutdown: GracefulShutdown
    """Tells when the run has to make room."""
    saved: Callable[[], None] = lambda: None
    """Called by the main process when the folder has a new checkpoint."""


class _ToldToStop(Exception):
    """Unwinds what is being done between two updates; it has changed nothing that a checkpoint holds."""


class Trainer:
    """One run of `config`; making it resumes from the latest checkpoint in the folder, if there is one.

    Every process of the run makes one. All numbers that a decision hangs on are those of all processes, so that they
    decide alike; files are written by the main process.
    """

    def __init__(self, config: TrainStage, policy: Policy, materials: TrainerInputs, accelerator: Accelerator) -> None:
        self._config, self._policy, self._materials, self._accelerator = config, policy, materials, accelerator
        self._batches = BatchArithmetic(config=config, num_processes=accelerator.num_processes)
        self._partition = Partition(
            num_images=config.rollout.num_images,
            num_steps=config.update.steps_per_update,
            num_processes=accelerator.num_processes,
        )
        self._learner = Learner.of(policy, config)
        self._objective = Objective.of(policy, config.sampling, config.update, self._batches.update_micro_batch)
        self._scorer = StateScorer(
            policy=policy,
            reward=materials.reward,
            sigmas_S=self._objective.sigmas_S,
            states=config.scored_states,
            num_substeps=config.estimates.num_substeps,
            guidance_scale=config.sampling.guidance_scale,
            micro_batch_size=self._batches.rollout_micro_batch,
            cut=functools.partial(even_slices, accelerator=accelerator),
        )
        self._texts = sorted({prompt.text for prompt in materials.prompts})
        self._encoded = _encode_in_batches(policy, self._texts)
        self.history: list[dict[str, Any]] = []
        self._saved: tuple[int, int] | None = None
        """Updates and evaluations of the newest checkpoint."""
        self._seconds_of_update = math.inf
        """What the last update took, and an update is expected to take."""
        self._seconds_of_save = 0.0
        self._sampler_changed = False
        self._periodic = PeriodicEvaluation(
            policy,
            Evaluator.of(config, materials.evaluation_prompts, materials.verdict, materials.reward, materials.held_out),
            EvaluationPaths(
                folder=materials.folder, store=materials.evaluations, scope=materials.scope, aside=materials.aside
            ),
            materials.tracker,
            accelerator,
            self._heed_notice,
            config.checkpoint.keep,
        )
        # All noise is addressed by seed and update; this is for what a library may draw by itself.
        torch.manual_seed(config.seed)
        self._restore()
        self._guard = NumericalGuard(
            config.update.max_broken_updates,
            materials.folder / "nonfinite.jsonl",
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
    def best(self) -> dict[str, Any]:
        """The evaluation with the highest GenEval score, the earliest of equals."""
        return self._periodic.best

    @property
    def _done(self) -> tuple[int, int]:
        return self.update_index, len(self.evaluations)

    def averaged(self) -> AbstractContextManager[None]:
        """Puts the averaged adapter, which is what gets published, into the policy for a block."""
        return self._learner.averaged()

    def run(self) -> None:
        """Trains to the last update, evaluating and saving on the way.

        Raises:
            Preempted: the run was told to stop, and its state is saved.
        """
        config = self._config
        with Progress(
            config.update.num_updates,
            config.rollout.num_images,
            first_update=self.update_index,
            shown=self._accelerator.is_main_process,
        ) as progress:
            try:
                self._run(progress)
            except _ToldToStop:
                self._leave()

    def _run(self, progress: Progress) -> None:
        config = self._config
        while True:
            is_last = self.update_index == config.update.num_updates
            if self._is_due(config.evaluation.every_num_updates, first=True):
                self._periodic.ask(self.update_index, self.averaged())
            self._periodic.finish() if is_last else self._periodic.advance()
            if self._is_due(config.checkpoint.every_num_updates) and self._saved != self._done:
                self._save()
            if is_last:
                return
            self._heed_notice()
            metrics = self._update(self.update_index)
            self._learner.average()
            self.history.append({"update": self.update_index + 1, **metrics})
            self._materials.tracker.log_metrics(metrics, self.update_index)
            progress.show(self.update_index - 1, metrics)

    def _is_due(self, every_num_updates: int, first: bool = False) -> bool:
        if self.update_index == 0:
            return first
        last = self.update_index == self._config.update.num_updates
        return last or self.update_index % every_num_updates == 0

    def _heed_notice(self, seconds_to_go: float = math.inf) -> None:
        """Leaves if some process was told to stop and has less time than what is to be done would take."""
        shutdown = self._materials.shutdown
        needed_s = seconds_to_go + 2 * self._seconds_of_save
        if any_of(shutdown.stop_requested and shutdown.remaining_s < needed_s, self._accelerator):
            raise _ToldToStop

    def _leave(self) -> NoReturn:
        """Saves the state after the last update, of which nothing has changed since, and says so."""
        if self._saved != self._done:
            self._save()
        raise Preempted(
            f"the run was told to stop; its state after update {self.update_index} is saved, and starting it again "
            "goes on"
        )

    def _update(self, update_index: int) -> dict[str, float]:
        """Does one update: rollout, rewards of all states, advantages, optimiser steps."""
        config, clock, started = self._config, self._clock(), time.monotonic()
        rows = self._partition.rows(self._accelerator.process_index)
        prompts = self._prompts_of(update_index)
        conditioning = self._conditioning_of([prompts[row] for row in rows.tolist()])
        trajectories, rewards = [], []
        for part in row_slices(len(rows), self._batches.rollout_micro_batch):
            own = rows[part].tolist()
            with clock("rollout"):
                trajectories.append(self._roll_out(update_index, own, conditioning[part]))
            # The first image of a group scores the start state, which all of them share.
            first_rows = [row for row, image in enumerate(own) if image % config.rollout.group_size == 0]
            own_prompts = [prompts[image] for image in own]
            rewards.append(self._scorer.score(trajectories[-1], conditioning[part], own_prompts, first_rows, clock))
            self._heed_notice(self._seconds_of_update - (time.monotonic() - started))
        rewards_NS, unrewarded_N = collect_rewards(
            torch.cat(rewards),
            states=config.scored_states,
            group_size=config.rollout.group_size,
            partition=self._partition,
            accelerator=self._accelerator,
        )
        advantages = group_advantages(
            rewards_NS,
            group_size=config.rollout.group_size,
            states=config.scored_states,
            credit=config.advantage.credit,
            std=config.advantage.std,
            clip=config.advantage.clip,
            gae_lambda=config.advantage.gae_lambda,
        )
        batch = RolloutBatch(
            trajectory=joined(trajectories),
            conditioning=conditioning,
            advantages_NK=advantages.values_NK[rows].to(self._policy.device),
            constant_N=advantages.constant_N[rows].to(self._policy.device),
        )
        with clock("update"):
            optimizer, scaler = self._learner.optimizer, self._learner.scaler
            outcome = update_policy(self._policy, optimizer, batch, self._objective, self._accelerator, scaler)
        if not self._sampler_changed and outcome.trained:
            num_rows = self._batches.rollout_micro_batch
            require_changed_sampler(self._policy, batch, num_rows, self._objective, self._accelerator)
            self._sampler_changed = True
        broken = {
            "reward": unrewarded_N,
            "loss": self._partition.gather(outcome.broken_loss_N, self._accelerator),
            "gradient": self._partition.gather(outcome.broken_gradient_N, self._accelerator),
        }
        for what, images in broken.items():
            self._guard.record(update_index, what, [prompts[image] for image in images.nonzero().flatten().tolist()])
        self._seconds_of_update = time.monotonic() - started
        return {
            **_reward_metrics(rewards_NS, config.scored_states),
            "groups/constant_fraction": float(advantages.constant_N.float().mean()),
            **outcome.metrics,
            "guards/broken": float(any(images.any() for images in broken.values())),
            **clock.metrics(),
            "time/total_s": self._seconds_of_update,
        }

    def _clock(self) -> PhaseClock:
        rollout = ("rollout.micro_batch_size", self._batches.rollout_micro_batch)
        settings = dict.fromkeys(("rollout", "estimates", "decode", "reward"), rollout) | {
            "update": ("update.micro_batch_size", self._batches.update_micro_batch)
        }
        return PhaseClock(self._policy.device, settings)

    def _prompts_of(self, update_index: int) -> list[Prompt]:
        """Picks the prompts of an update, one per image."""
        config, pool = self._config, self._materials.prompts
        positions = prompts_of_update(pool, update_index, config.rollout.prompts_per_update, config.seed)
        return [pool[position] for position in positions for _ in range(config.rollout.group_size)]

    def _conditioning_of(self, prompts: Sequence[Prompt]) -> Conditioning:
        return self._encoded[[self._texts.index(prompt.text) for prompt in prompts]].to(self._policy.device)

    def _roll_out(self, update_index: int, images: Sequence[int], conditioning: Conditioning) -> Trajectory:
        """Samples images of an update; start noise belongs to the group, step noise to the image."""
        config, shape = self._config, self._policy.latent_shape
        groups = [image // config.rollout.group_size for image in images]
        step_shape = (config.sampling.num_steps, *shape)
        return roll_out(
            self._policy,
            conditioning,
            gaussian_noise(config.seed, "start_noise", update_index, groups, shape).to(self._policy.device),
            gaussian_noise(config.seed, "step_noise", update_index, images, step_shape).to(self._policy.device),
            self._objective.sigmas_S,
            config.sampling,
        )

    def _save(self) -> None:
        """Writes a checkpoint of everything that the rest of the run depends on."""
        materials, started = self._materials, time.monotonic()
        require_same_everywhere(self._policy.adapter_parameters(), self._accelerator)
        self._saved = self._done
        if not self._accelerator.is_main_process:
            return
        state = TrainingState(
            update_index=self.update_index,
            **self._learner.state(),
            rng={"torch": torch.get_rng_state()},
            config=to_flat_dict(self._config),
            history=self.history,
            best=read_best(materials.folder),
            extra=self._periodic.state(),
        )
        save_checkpoint(materials.folder / CHECKPOINTS, state, self._config.checkpoint.keep)
        self._periodic.prune()
        self._seconds_of_save = time.monotonic() - started
        materials.saved()

    def _restore(self) -> None:
        state = self._newest_state()
        if state is None:
            return
        self._learner.load(adapter=state.adapter, ema=state.ema, optimizer=state.optimizer, scaler=state.scaler)
        torch.set_rng_state(torch.as_tensor(state.rng["torch"]))
        self.history = [dict(metrics) for metrics in state.history]
        self._periodic.load(state.extra)
        self._saved = self._done
        self._sampler_changed = True
        if self._accelerator.is_main_process:
            self._restore_records(state)
        logger.info("resuming after update %d", state.update_index)

    def _newest_state(self) -> TrainingState | None:
        """Reads the newest checkpoint that any process finds on its disk; None when there is none."""
        path = latest_checkpoint(self._materials.folder / CHECKPOINTS)
        found = -1 if path is None else update_of(path)
        newest = round(highest([found], self._accelerator)[0])
        if newest < 0:
            return None
        files = read_checkpoint(path) if path is not None and found == newest else None
        return state_of(shared_files(files, self._accelerator))

    def _restore_records(self, state: TrainingState) -> None:
        """Puts the best adapter back, and what the tracker may have missed before the process died."""
        materials = self._materials
        restore_best(state.best, materials.folder)
        for entry in self.history:
            materials.tracker.log_metrics({k: v for k, v in entry.items() if k != "update"}, entry["update"])
        self._periodic.record_again()


def _encode_in_batches(policy: Policy, texts: Sequence[str], batch_size: int = 128) -> Conditioning:
    """Encodes all texts once, before training; the result waits on the CPU."""
    cpu = torch.device("cpu")
    parts = [policy.encode(texts[start : start + batch_size]).to(cpu) for start in range(0, len(texts), batch_size)]
    return Conditioning(
        tokens=torch.cat([part.tokens for part in parts]), pooled=torch.cat([part.pooled for part in parts])
    )


def _reward_metrics(rewards_NS: Tensor, states: Sequence[int]) -> dict[str, float]:
    """Summarises rewards and, where further states were scored, the gains between them, by the step they start at."""
    metrics = {"reward/mean": float(rewards_NS[:, -1].mean()), "reward/std": float(rewards_NS[:, -1].std())}
    if rewards_NS.shape[1] == 1:
        return metrics
    gains_NK = step_gains(rewards_NS)
    starts = zip(states[:-1], gains_NK.unbind(1), strict=True)
    per_step = {f"gain/step_{state:02d}/abs_mean": float(gain.abs().mean()) for state, gain in starts}
    return {**metrics, "reward/start": float(rewards_NS[:, 0].mean()), "gain/mean": float(gains_NK.mean()), **per_step}
