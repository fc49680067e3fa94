"""Evaluate one adapter: images, scores, metrics and sample grid, kept in the store."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from sfgrpo.config.stages import TrainStage
from sfgrpo.evaluation.evaluate import Evaluation, SamplingProtocol, evaluate_policy, mean_rewards, protocol_of
from sfgrpo.evaluation.store import keep_evaluation
from sfgrpo.policies.base import Policy
from sfgrpo.rewards.base import Reward, distinct_rewards
from sfgrpo.runtime.timing import PhaseClock
from sfgrpo.tracking.sample_grid import pick_rows, sample_grid
from sfgrpo.types import Prompt

GRID_ROWS_PER_TASK = 2


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Evaluator:
    """All that an adapter is judged by."""

    prompts: Sequence[Prompt]
    verdict: Reward
    """GenEval's verdict, 0 or 1, for the table."""
    rewards: Sequence[Reward]
    protocol: SamplingProtocol
    noisy: SamplingProtocol | None
    """That of the training's own sampler, where its mean rewards are measured as well."""

    @classmethod
    def of(
        cls, config: TrainStage, prompts: Sequence[Prompt], verdict: Reward, reward: Reward, held_out: Sequence[Reward]
    ) -> Evaluator:
        """Takes the prompts, and what judges, from a training."""
        protocol, sampling = protocol_of(config.evaluation), config.sampling
        noisy = dataclasses.replace(
            protocol,
            num_steps=sampling.num_steps,
            guidance_scale=sampling.guidance_scale,
            sampler=sampling.sampler,
            noise_level=sampling.noise_level,
        )
        return cls(
            prompts=prompts,
            verdict=verdict,
            rewards=distinct_rewards(reward, *held_out),
            protocol=protocol,
            noisy=noisy if config.evaluation.training_sampler else None,
        )

    def judge(
        self,
        policy: Policy,
        store: Path,
        key: str,
        accelerator: Accelerator | None = None,
        between: Callable[[], None] = lambda: None,
    ) -> None:
        """Judges the policy as it is, and has the main process put what comes of it into the store."""
        shown = pick_rows(self.prompts, GRID_ROWS_PER_TASK)
        clock = PhaseClock(
            policy.device, {"evaluation": ("evaluation.micro_batch_size", self.protocol.micro_batch_size)}
        )
        together: dict[str, Any] = {"accelerator": accelerator, "between": between}
        with clock("evaluation"):
            evaluation = evaluate_policy(
                policy, self.prompts, self.verdict, self.rewards, self.protocol, shown=shown, **together
            )
            noisy = mean_rewards(policy, self.prompts, self.rewards, self.noisy, **together) if self.noisy else {}
        if accelerator is None or accelerator.is_main_process:
            metrics = evaluation.to_dict() | {f"evaluation_noisy/{name}": value for name, value in noisy.items()}
            keep_evaluation(store, key, evaluation, metrics | clock.metrics(), self._grid(evaluation, shown))

    def _grid(self, evaluation: Evaluation, shown: Sequence[int]) -> Any:
        return sample_grid(self.prompts, {"policy": evaluation.images}, {"policy": evaluation.correct}, shown)
