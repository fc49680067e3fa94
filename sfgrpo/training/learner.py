"""The policy with everything that training changes: its adapter, the optimiser, the loss scale, the moving average."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Self

import torch
from diffusers.training_utils import EMAModel
from torch import Tensor

from sfgrpo.config.stages import TrainStage
from sfgrpo.grpo.update import make_scaler
from sfgrpo.policies.base import Policy


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Learner:
    """What an update changes. Its state comes back bit for bit."""

    policy: Policy
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    ema: EMAModel
    """Average of the adapter; the decay of update n is min(ema.decay, n / (9 + n)), and 0 for the first."""

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
            ema=EMAModel(policy.adapter_parameters().values(), decay=config.ema.decay),
        )

    def average(self) -> None:
        """Update the moving average with the adapter as it is now."""
        self.ema.step(self.policy.adapter_parameters().values())

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Put the averaged adapter, which is what gets published, into the policy for a block."""
        parameters = list(self.policy.adapter_parameters().values())
        self.ema.store(parameters)
        self.ema.copy_to(parameters)
        try:
            yield
        finally:
            self.ema.restore(parameters)

    def state(self) -> dict[str, Any]:
        """Return this object's fields of `TrainingState`."""
        return {
            "adapter": {name: value.detach() for name, value in self.policy.adapter_parameters().items()},
            "ema": {
                "num_updates": self.ema.optimization_step,
                "averages": dict(zip(self.policy.adapter_parameters(), self.ema.shadow_params, strict=True)),
            },
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
        }

    def load(
        self,
        *,
        adapter: Mapping[str, Tensor],
        ema: Mapping[str, Any],
        optimizer: Mapping[str, Any],
        scaler: Mapping[str, Any],
    ) -> None:
        """Go back to what `state` returned."""
        with torch.no_grad():
            for name, parameter in self.policy.adapter_parameters().items():
                parameter.copy_(adapter[name])
            for name, average in zip(self.policy.adapter_parameters(), self.ema.shadow_params, strict=True):
                average.copy_(ema["averages"][name])
        self.ema.optimization_step = ema["num_updates"]
        self.optimizer.load_state_dict(dict(optimizer))
        self.scaler.load_state_dict(dict(scaler))
