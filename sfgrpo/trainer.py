"""The training run: rollout, rewards of every state, advantages, update; checkpoints and evaluations when due."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from sfgrpo.advantages import group_advantages
from sfgrpo.checkpoint import TrainingState, latest_checkpoint, load_checkpoint, save_checkpoint
from sfgrpo.config import TrainStage, to_flat_dict
from sfgrpo.ema import Ema
from sfgrpo.evaluation import Evaluation, evaluate_policy, mean_rewards
from sfgrpo.files import atomic_directory
from sfgrpo.gains import step_gains
from sfgrpo.policies.base import Policy
from sfgrpo.progress import Progress
from sfgrpo.prompts import prompts_of_update
from sfgrpo.random import gaussian_noise
from sfgrpo.report import pick_rows, sample_grid
from sfgrpo.rewards.base import Reward, distinct_rewards
from sfgrpo.rollout import roll_out
from sfgrpo.scoring import score_states
from sfgrpo.sde import trainable_steps
from sfgrpo.timing import PhaseClock
from sfgrpo.tracking import Tracker
from sfgrpo.types import Conditioning, Prompt, RolloutBatch, Trajectory
from sfgrpo.update import Objective, require_changed_sampler, update_policy

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Materials:
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
    """Resumable state: checkpoints, the best adapter, sample grids."""
    tracker: Tracker


class Trainer:
    """One run of `config`; making it resumes from the latest checkpoint in the folder, if there is one."""

    def __init__(self, config: TrainStage, policy: Policy, materials: Materials, accelerator: Accelerator) -> None:
        self._config, self._policy, self._materials, self._accelerator = config, policy, materials, accelerator
        update = config.update
        self._optimizer = torch.optim.AdamW(
            policy.adapter_parameters().values(),
            lr=update.learning_rate,
            betas=update.betas,
            weight_decay=update.weight_decay,
        )
        self._ema = Ema(policy.adapter_parameters(), config.ema.decay)
        self._objective = objective_of(config, policy)
        self._texts = sorted({prompt.text for prompt in materials.prompts})
        self._encoded = _encode_in_batches(policy, self._texts)
        self.history: list[dict[str, Any]] = []
        self.evaluations: list[dict[str, Any]] = []
        self._sampler_changed = False
        self._restore()

    @property
    def update_index(self) -> int:
        """Updates done."""
        return len(self.history)

    @property
    def best(self) -> dict[str, Any]:
        """The evaluation with the highest GenEval score, the earliest of equals."""
        return max(self.evaluations, key=lambda evaluation: evaluation["metrics"]["geneval/overall"])

    def averaged(self) -> AbstractContextManager[None]:
        """Puts the averaged adapter, which is what gets published, into the policy for a block."""
        return self._ema.swapped_in(self._policy.module)

    def run(self) -> None:
        """Trains to the last update, evaluating and saving on the way."""
        config = self._config
        with Progress(config.update.num_updates, config.rollout.num_images, first_update=self.update_index) as progress:
            if not self.evaluations:
                self._evaluate()
            while (update_index := self.update_index) < config.update.num_updates:
                metrics = self._update(update_index)
                self._ema.update(self._policy.adapter_parameters())
                self.history.append({"update": update_index + 1, **metrics})
                self._materials.tracker.log_metrics(metrics, update_index + 1)
                progress.show(update_index, metrics)
                last = self.update_index == config.update.num_updates
                if last or self.update_index % config.evaluation.every_num_updates == 0:
                    self._evaluate()
                if last or self.update_index % config.checkpoint.every_num_updates == 0:
                    self._save()

    def _update(self, update_index: int) -> dict[str, float]:
        """Does one update: rollout, rewards of all states, advantages, optimiser steps."""
        config = self._config
        clock = self._clock()
        prompts, conditioning = self._prompts_of(update_index)
        with clock("rollout"):
            trajectory = self._roll_out(update_index, conditioning)
        rewards_NS = self._score(trajectory, prompts, conditioning, clock)
        advantages = group_advantages(
            self._gathered(rewards_NS),
            group_size=config.rollout.group_size,
            states=config.scored_states,
            credit=config.advantage.credit,
            std=config.advantage.std,
            clip=config.advantage.clip,
            gae_lambda=config.advantage.gae_lambda,
        )
        batch = RolloutBatch(
            trajectory=trajectory,
            conditioning=conditioning,
            advantages_NK=advantages.values_NK[self._own_images].to(self._policy.device),
            constant_N=advantages.constant_N[self._own_images].to(self._policy.device),
        )
        with clock("update"):
            metrics = update_policy(self._policy, self._optimizer, batch, self._objective, self._accelerator)
        if not self._sampler_changed and bool(batch.advantages_NK[:, list(self._objective.trained_steps)].any()):
            require_changed_sampler(self._policy, batch, self._objective)
            self._sampler_changed = True
        constant = float(advantages.constant_N.float().mean())
        rewards = _reward_metrics(rewards_NS, config.scored_states)
        return {**rewards, "groups/constant_fraction": constant, **metrics, **clock.metrics()}

    def _clock(self) -> PhaseClock:
        return PhaseClock(torch.cuda.synchronize) if self._policy.device.type == "cuda" else PhaseClock()

    @property
    def _own_images(self) -> slice:
        """Images of an update that this process samples: whole groups, the same number on every process."""
        share = self._config.rollout.num_images // self._accelerator.num_processes
        return slice(self._accelerator.process_index * share, (self._accelerator.process_index + 1) * share)

    def _gathered(self, rewards_NS: Tensor) -> Tensor:
        gathered: Tensor = self._accelerator.gather(rewards_NS.to(self._accelerator.device))
        return gathered.cpu()

    def _prompts_of(self, update_index: int) -> tuple[list[Prompt], Conditioning]:
        """Picks this process's prompts of an update, one per image."""
        config, pool = self._config, self._materials.prompts
        positions = prompts_of_update(pool, update_index, config.rollout.prompts_per_update, config.seed)
        repeated = [pool[position] for position in positions for _ in range(config.rollout.group_size)]
        prompts = repeated[self._own_images]
        rows = [self._texts.index(prompt.text) for prompt in prompts]
        return prompts, self._encoded[rows].to(self._policy.device)

    def _roll_out(self, update_index: int, conditioning: Conditioning) -> Trajectory:
        """Samples this process's images; start noise belongs to the group, step noise to the image."""
        config, shape = self._config, self._policy.latent_shape
        group_size, num_steps = config.rollout.group_size, config.sampling.num_steps
        images = range(self._own_images.start, self._own_images.stop)
        groups = range(images.start // group_size, images.stop // group_size)
        start = gaussian_noise(config.seed, "start_noise", update_index, groups, shape).repeat_interleave(group_size, 0)
        noise = gaussian_noise(config.seed, "step_noise", update_index, images, (num_steps, *shape))
        return roll_out(
            self._policy,
            conditioning,
            start.to(self._policy.device),
            noise.to(self._policy.device),
            self._objective.sigmas_S,
            sampler=config.sampling.sampler,
            noise_level=config.sampling.noise_level,
            guidance_scale=config.sampling.guidance_scale,
            micro_batch_size=config.rollout.micro_batch_size,
        )

    def _score(
        self, trajectory: Trajectory, prompts: Sequence[Prompt], conditioning: Conditioning, clock: PhaseClock
    ) -> Tensor:
        """Rewards the states that the credit needs."""
        config = self._config
        return score_states(
            self._policy,
            trajectory,
            conditioning,
            prompts,
            self._materials.reward,
            self._objective.sigmas_S,
            config.scored_states,
            group_size=config.rollout.group_size,
            num_substeps=config.estimates.num_substeps,
            guidance_scale=config.sampling.guidance_scale,
            micro_batch_size=config.rollout.micro_batch_size,
            clock=clock,
        )

    def _evaluate(self) -> None:
        """Judges the averaged adapter, records it, and keeps it when it is the best so far."""
        config, materials, clock = self._config.evaluation, self._materials, self._clock()
        rewards = distinct_rewards(materials.reward, *materials.held_out)
        with clock("evaluation"), self.averaged():
            evaluation = evaluate_policy(
                self._policy,
                materials.evaluation_prompts,
                materials.verdict,
                rewards,
                images_per_prompt=config.images_per_prompt,
                num_steps=config.num_steps,
                guidance_scale=config.guidance_scale,
                seed=config.seed,
                micro_batch_size=config.micro_batch_size,
            )
            noisy = self._noisy_rewards(rewards) if config.training_sampler else {}
            metrics = {**evaluation.to_dict(), **{f"evaluation_noisy/{name}": value for name, value in noisy.items()}}
            self.evaluations.append({"update": self.update_index, "metrics": metrics})
            if self.best is self.evaluations[-1] and self._accelerator.is_main_process:
                with atomic_directory(materials.folder / "best") as partial:
                    self._policy.save_adapter(partial)
        metrics |= clock.metrics()
        materials.tracker.log_metrics(metrics, self.update_index)
        self._draw(evaluation)
        logger.info("update %d: GenEval %s", self.update_index, evaluation.table.overall)

    def _noisy_rewards(self, rewards: Sequence[Reward]) -> dict[str, float]:
        """Measures the policy as it is by the sampler of the training, on the evaluation's prompts."""
        sampling, config = self._config.sampling, self._config.evaluation
        return mean_rewards(
            self._policy,
            self._materials.evaluation_prompts,
            rewards,
            images_per_prompt=config.images_per_prompt,
            num_steps=sampling.num_steps,
            guidance_scale=sampling.guidance_scale,
            seed=config.seed,
            micro_batch_size=config.micro_batch_size,
            sampler=sampling.sampler,
            noise_level=sampling.noise_level,
        )

    def _draw(self, evaluation: Evaluation) -> None:
        prompts = self._materials.evaluation_prompts
        path = self._materials.folder / f"samples_{self.update_index:06d}.png"
        name = f"update {self.update_index}"
        sample_grid(prompts, {name: evaluation.images}, {name: evaluation.correct}, pick_rows(prompts, per_tag=2)).save(
            path
        )
        self._materials.tracker.log_image(path, "samples", self.update_index)

    def _save(self) -> None:
        """Writes a checkpoint of everything that the rest of the run depends on."""
        if not self._accelerator.is_main_process:
            return
        state = TrainingState(
            update_index=self.update_index,
            adapter={name: value.detach() for name, value in self._policy.adapter_parameters().items()},
            ema=self._ema.state_dict(),
            optimizer=self._optimizer.state_dict(),
            # All noise is addressed by seed and update; torch's own generator is the only stream with a state.
            rng={"torch": torch.get_rng_state()},
            config=to_flat_dict(self._config),
            history=self.history,
            extra={"evaluations": self.evaluations, "tracked_run": self._materials.tracker.run_id},
        )
        save_checkpoint(self._materials.folder / "checkpoints", state, self._config.checkpoint.keep)

    def _restore(self) -> None:
        path = latest_checkpoint(self._materials.folder / "checkpoints")
        if path is None:
            return
        state = load_checkpoint(path)
        with torch.no_grad():
            for name, parameter in self._policy.adapter_parameters().items():
                parameter.copy_(state.adapter[name])
        self._ema.load_state_dict(state.ema)
        self._optimizer.load_state_dict(dict(state.optimizer))
        torch.set_rng_state(torch.as_tensor(state.rng["torch"]))
        self.history = [dict(metrics) for metrics in state.history]
        self.evaluations = list(state.extra["evaluations"])
        self._sampler_changed = True
        logger.info("resuming after update %d from %s", state.update_index, path.name)


def objective_of(config: TrainStage, policy: Policy) -> Objective:
    """Gathers what an update maximises from the configuration and the policy's schedule."""
    sigmas = policy.sigmas(config.sampling.num_steps).to(policy.device)
    sampling, update = config.sampling, config.update
    steps = trainable_steps(sampling.sampler, sigmas, sampling.noise_level, update.trained_steps)
    return Objective(
        sigmas_S=sigmas,
        sampler=sampling.sampler,
        noise_level=sampling.noise_level,
        guidance_scale=sampling.guidance_scale,
        trained_steps=tuple(steps),
        clip_range=update.clip_range,
        kl_coef=update.kl_coef,
        kl_form=update.kl_form,
        max_grad_norm=update.max_grad_norm,
        steps_per_update=update.steps_per_update,
        micro_batch_size=update.micro_batch_size,
        ratio_tolerance=update.ratio_tolerance,
    )


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
