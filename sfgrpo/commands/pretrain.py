"""Train the models of the shapes world that ship with the repository."""

from __future__ import annotations

from sfgrpo.config.stages import PretrainRewardStage, PretrainStage, config_digest
from sfgrpo.factory import use_threads
from sfgrpo.runtime.environment import Environment


def pretrain(config: PretrainStage, environment: Environment) -> None:
    """Train the base model of the shapes world and publish it with its card; resumable."""
    from sfgrpo.pretraining.base_model import pretrain_base_model

    folder = environment.scratch_dir / f"pretrain-{config_digest(config)[:16]}"
    use_threads(environment)
    pretrain_base_model(config.pretrain, config.seed, folder)


def pretrain_reward(config: PretrainRewardStage, environment: Environment) -> None:
    """Train the model behind the reward `clip` and publish it with its card."""
    from sfgrpo.pretraining.reward_model import pretrain_reward_model

    use_threads(environment)
    pretrain_reward_model(config.pretrain_reward, config.seed)
