"""Evaluation of one adapter: images, scores, metrics and a grid of samples, put into the store."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path

from accelerate import Accelerator

from sfgrpo.config.stages import TrainStage
from sfgrpo.evaluation.evaluate import SamplingProtocol, evaluate_policy, mean_rewards, protocol_of
from sfgrpo.evaluation.store import keep_evaluation
from sfgrpo.policies.base import Policy
from sfgrpo.rewards import Reward, build_reward, distinct_rewards
from sfgrpo.runtime.timing import PhaseClock
from sfgrpo.tracking.sample_grid import pick_rows, sample_grid
from sfgrpo.types import Prompt

HELD_OUT = ("geneval", "likeness")
"""Rewards that a training measures in evaluation beside the one it trains on."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Evaluator:
    """What all adapters of a training are evaluated by."""

    prompts: Sequence[Prompt]
    rewards: Sequence[Reward]
    selected_by: str
    """Metric whose highest value selects the best adapter."""
    is_correct: Reward = dataclasses.field(default_factory=lambda: build_reward("geneval_correct"))
    """1 for a correct image, 0 for any other."""
    protocol: SamplingProtocol
    training_protocol: SamplingProtocol | None
    """That of the training's own sampler, where its mean rewards are measured too."""

    @classmethod
    def of(cls, config: TrainStage, prompts: Sequence[Prompt], reward: Reward) -> Evaluator:
        """Make the evaluator of a training that trains on `reward`."""
        protocol = protocol_of(config.evaluation)
        training_protocol = dataclasses.replace(protocol, **dataclasses.asdict(config.sampling))
        return cls(
            prompts=prompts,
            rewards=distinct_rewards(reward, *map(build_reward, HELD_OUT)),
            # Over the same images a mean reward scatters less than GenEval's verdicts, which are 0 or 1.
            selected_by=f"evaluation/{reward.name}",
            protocol=protocol,
            training_protocol=training_protocol if config.evaluation.training_sampler else None,
        )

    def evaluate(
        self,
        policy: Policy,
        store: Path,
        key: str,
        accelerator: Accelerator | None = None,
        on_pass: Callable[[], None] = lambda: None,
    ) -> None:
        """Evaluate the policy as it is; the main process puts the result into the store."""
        shown = pick_rows(self.prompts, seed=self.protocol.seed)
        clock = PhaseClock(
            policy.device, {"evaluation": ("evaluation.micro_batch_size", self.protocol.micro_batch_size)}
        )
        with clock("evaluation"):
            evaluation = evaluate_policy(
                policy,
                self.prompts,
                self.rewards,
                self.protocol,
                is_correct=self.is_correct,
                shown=shown,
                accelerator=accelerator,
                on_pass=on_pass,
            )
            noisy = {}
            if self.training_protocol is not None:
                noisy = mean_rewards(policy, self.prompts, self.rewards, self.training_protocol, accelerator, on_pass)
        if accelerator is None or accelerator.is_main_process:
            metrics = evaluation.to_dict() | {f"evaluation_noisy/{name}": value for name, value in noisy.items()}
            grid = sample_grid(self.prompts, {"policy": evaluation.samples}, shown)
            keep_evaluation(store, key, evaluation, metrics | clock.metrics(), grid)
