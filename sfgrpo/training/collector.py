"""The rollout of an update: prompts, conditioning, images, rewards of their states, advantages."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence

import torch
from accelerate import Accelerator
from torch import Tensor

from sfgrpo.config.batching import BatchArithmetic
from sfgrpo.config.stages import TrainStage
from sfgrpo.grpo.advantages import group_advantages
from sfgrpo.grpo.distributed import Partition, even_slices, row_slices
from sfgrpo.grpo.gains import step_gains
from sfgrpo.grpo.noise import gaussian_noise
from sfgrpo.grpo.rollout import roll_out
from sfgrpo.grpo.scoring import StateScorer, collect_rewards
from sfgrpo.policies.base import Policy
from sfgrpo.prompts import prompts_of_update
from sfgrpo.rewards.base import Reward
from sfgrpo.runtime.timing import PhaseClock
from sfgrpo.types import Conditioning, Prompt, RolloutBatch, joined


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Collected:
    """What an update learns from."""

    batch: RolloutBatch
    """The images of this process."""
    prompts: Sequence[Prompt]
    """Of all images of the update, in their order."""
    broken_reward_N: Tensor
    """True for the images of the update with a reward that is not finite."""
    metrics: dict[str, float]
    """Of all processes together."""


class Collector:
    """Samples and scores the images of this process for one update after the other."""

    def __init__(
        self,
        config: TrainStage,
        policy: Policy,
        pool: Sequence[Prompt],
        reward: Reward,
        sigmas_S: Tensor,
        accelerator: Accelerator,
    ) -> None:
        """Encode all prompts of the pool once."""
        self._config, self._policy, self._pool, self._sigmas_S = config, policy, pool, sigmas_S
        self._accelerator = accelerator
        batches = BatchArithmetic(config=config, num_processes=accelerator.num_processes)
        self._micro_batch_size = batches.rollout_micro_batch
        self.partition = Partition(
            num_images=config.rollout.num_images,
            num_steps=config.update.steps_per_update,
            num_processes=accelerator.num_processes,
        )
        self._scorer = StateScorer(
            policy=policy,
            reward=reward,
            sigmas_S=sigmas_S,
            states=config.scored_states,
            num_substeps=config.estimates.num_substeps,
            guidance_scale=config.sampling.guidance_scale,
            micro_batch_size=self._micro_batch_size,
            # Processes with fewer states to estimate still take part in every pass of a sharded model.
            cut=functools.partial(even_slices, accelerator=accelerator),
        )
        texts = sorted({prompt.text for prompt in pool})
        self._position = {text: index for index, text in enumerate(texts)}
        self._encoded = _encode_in_batches(policy, texts)

    def collect(
        self, update_index: int, clock: PhaseClock | None = None, on_pass: Callable[[], None] = lambda: None
    ) -> Collected:
        """Sample the images of an update, score their states and compare them; `on_pass` follows each model pass."""
        clock, rollout = clock or PhaseClock(self._policy.device), self._config.rollout
        rows = self.partition.rows(self._accelerator.process_index)
        prompts = self._prompts_of(update_index)
        encoded_rows = [self._position[prompts[row].text] for row in rows.tolist()]
        conditioning = self._encoded[encoded_rows].to(self._policy.device)
        trajectories, rewards = [], []
        for part in row_slices(len(rows), self._micro_batch_size):
            images = rows[part].tolist()
            with clock("rollout"):
                noise = self._noise_of(update_index, images)
                inputs = (conditioning[part], *noise, self._sigmas_S, self._config.sampling, on_pass)
                trajectories.append(roll_out(self._policy, *inputs))
            # The first image of a group scores the start state, which the whole group shares.
            first_rows = [row for row, image in enumerate(images) if image % rollout.group_size == 0]
            own_prompts = [prompts[image] for image in images]
            rewards.append(
                self._scorer.score(trajectories[-1], conditioning[part], own_prompts, first_rows, clock, on_pass)
            )
        rewards_NS, broken_reward_N = collect_rewards(
            torch.cat(rewards),
            states=self._config.scored_states,
            group_size=rollout.group_size,
            partition=self.partition,
            accelerator=self._accelerator,
        )
        advantages = group_advantages(
            rewards_NS,
            group_size=rollout.group_size,
            states=self._config.scored_states,
            **dataclasses.asdict(self._config.advantage),
        )
        return Collected(
            batch=RolloutBatch(
                trajectory=joined(trajectories),
                conditioning=conditioning,
                advantages_NK=advantages.values_NK[rows].to(self._policy.device),
                constant_N=advantages.constant_N[rows].to(self._policy.device),
            ),
            prompts=prompts,
            broken_reward_N=broken_reward_N,
            metrics=_reward_metrics(rewards_NS, self._config.scored_states)
            | {"groups/constant_fraction": float(advantages.constant_N.float().mean())},
        )

    def _prompts_of(self, update_index: int) -> list[Prompt]:
        """Pick the prompts of an update, one per image."""
        rollout = self._config.rollout
        positions = prompts_of_update(self._pool, update_index, rollout.prompts_per_update, self._config.seed)
        return [self._pool[position] for position in positions for _ in range(rollout.group_size)]

    def _noise_of(self, update_index: int, images: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Draw the start noise, which belongs to the group, and the step noise, which belongs to the image."""
        config, shape, device = self._config, self._policy.latent_shape, self._policy.device
        groups = [image // config.rollout.group_size for image in images]
        step_shape = (config.sampling.num_steps, *shape)
        start = gaussian_noise(config.seed, "start_noise", update_index, groups, shape)
        return start.to(device), gaussian_noise(config.seed, "step_noise", update_index, images, step_shape).to(device)


def _encode_in_batches(policy: Policy, texts: Sequence[str], batch_size: int = 128) -> Conditioning:
    """Encode all texts once, before training; the result stays on the CPU."""
    cpu = torch.device("cpu")
    return joined([policy.encode(texts[part]).to(cpu) for part in row_slices(len(texts), batch_size)])


def _reward_metrics(rewards_NS: Tensor, states: Sequence[int]) -> dict[str, float]:
    """Summarise rewards and, where earlier states were scored too, the gains between them by the step they start at."""
    metrics = {"reward/mean": float(rewards_NS[:, -1].mean()), "reward/std": float(rewards_NS[:, -1].std())}
    if rewards_NS.shape[1] == 1:
        return metrics
    gains_NK = step_gains(rewards_NS)
    starts = zip(states[:-1], gains_NK.unbind(1), strict=True)
    per_step = {f"gain/step_{state:02d}/abs_mean": float(gain.abs().mean()) for state, gain in starts}
    return {**metrics, "reward/start": float(rewards_NS[:, 0].mean()), "gain/mean": float(gains_NK.mean()), **per_step}
