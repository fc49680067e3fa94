"""The policy with everything that training changes: its adapter, the optimiser, the loss scale, the moving average."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from diffusers.training_utils import EMAModel

from sfgrpo.checkpoint.state import TrainingState
from sfgrpo.config.schema import UpdateConfig
from sfgrpo.config.stages import TrainStage
from sfgrpo.grpo.update import make_scaler
from sfgrpo.policies.base import Policy


def learning_rate_at(update: UpdateConfig, update_index: int) -> float:
    """Return the learning rate of an update, the first of which has the index 0."""
    if update.lr_scheduler == "constant":
        return update.learning_rate
    return update.learning_rate * (1.0 - update_index / update.num_updates)


class Learner:
    """What an update changes. Its state comes back bit for bit."""

    def __init__(self, policy: Policy, config: TrainStage) -> None:
        parameters, update = list(policy.adapter_parameters().values()), config.update
        self.policy, self._update = policy, update
        self.optimizer = torch.optim.AdamW(
            parameters, lr=update.learning_rate, betas=update.betas, weight_decay=update.weight_decay
        )
        self.scaler = make_scaler(config.policy.dtype, policy.device)
        self.ema = EMAModel(parameters, decay=config.ema.decay)
        """Average of the adapter; the decay of update n is min(ema.decay, n / (9 + n)), and 0 for the first."""

    @property
    def learning_rate(self) -> float:
        """Learning rate of the latest update."""
        return float(self.optimizer.param_groups[0]["lr"])

    def set_learning_rate(self, update_index: int) -> None:
        """Set the learning rate of an update; it depends on the index alone, so that a run resumes exactly."""
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate_at(self._update, update_index)

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

    @contextmanager
    def undone_by(self, kind: type[Exception]) -> Iterator[None]:
        """Take back all optimiser steps of a block that ends with an error of this kind."""
        parameters = self.policy.adapter_parameters()
        before = copy.deepcopy(
            ({name: value.detach() for name, value in parameters.items()}, self.optimizer.state_dict())
        )
        scale = self.scaler.state_dict()
        try:
            yield
        except kind:
            adapter, optimizer = before
            with torch.no_grad():
                for name, parameter in parameters.items():
                    parameter.copy_(adapter[name])
            self.optimizer.load_state_dict(optimizer)
            self.optimizer.zero_grad()
            self.scaler.load_state_dict(scale)
            raise

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

    def load(self, state: TrainingState) -> None:
        """Go back to what `state` returned."""
        parameters = self.policy.adapter_parameters()
        with torch.no_grad():
            for (name, parameter), average in zip(parameters.items(), self.ema.shadow_params, strict=True):
                parameter.copy_(state.adapter[name])
                average.copy_(state.ema["averages"][name])
        self.ema.optimization_step = state.ema["num_updates"]
        self.optimizer.load_state_dict(dict(state.optimizer))
        self.scaler.load_state_dict(dict(state.scaler))
