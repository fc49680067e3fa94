"""The policy with everything that training changes: its adapter, the optimiser, the loss scale, the moving average."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any, Self

import torch
from torch import Tensor

from sfgrpo.config.stages import TrainStage
from sfgrpo.grpo.update import make_scaler
from sfgrpo.policies.base import Policy
from sfgrpo.training.ema import Ema


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Learner:
    """What an update changes. Its state comes back bit for bit."""

    policy: Policy
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    ema: Ema

    @classmethod
    def of(cls, policy: Policy, config: TrainStage) -> Self:
        """Make the optimiser, loss scaler and moving average of a policy's adapter."""
        update = config.update
        optimizer = torch.optim.AdamW(
            policy.adapter_parameters().values(),
            lr=update.learning_rate,
            betas=update.betas,
            weight_decay=update.weight_decay,
        )
        return cls(
            policy=policy,
            optimizer=optimizer,
            scaler=make_scaler(config.policy.dtype, policy.device),
            ema=Ema(policy.adapter_parameters(), config.ema.decay),
        )

    def average(self) -> None:
        """Update the moving average with the adapter as it is now."""
        self.ema.update(self.policy.adapter_parameters())

    def averaged(self) -> AbstractContextManager[None]:
        """Put the averaged adapter, which is what gets published, into the policy for a block."""
        return self.ema.swapped_in(self.policy.module)

    def state(self) -> dict[str, Any]:
        """Return this object's fields of `TrainingState`."""
        return {
            "adapter": {name: value.detach() for name, value in self.policy.adapter_parameters().items()},
            "ema": self.ema.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
        }

    def load(
        self,
        *,
        adapter: Mapping[str, Tensor],
        ema: Mapping[str, Tensor],
        optimizer: Mapping[str, Any],
        scaler: Mapping[str, Any],
    ) -> None:
        """Go back to what `state` returned."""
        with torch.no_grad():
            for name, parameter in self.policy.adapter_parameters().items():
                parameter.copy_(adapter[name])
        self.ema.load_state_dict(ema)
        self.optimizer.load_state_dict(dict(optimizer))
        self.scaler.load_state_dict(dict(scaler))
