"""The moving average of the trained parameters, and the context that swaps it in."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

_COUNT = "num_updates"
_AVERAGE = "average."


class Ema:
    """Exponential moving average, in float32, of named parameters.

    The decay of update n = 0, 1, ... is min(decay, (1 + n) / (10 + n)), so that the start is soon forgotten.
    """

    def __init__(self, parameters: Mapping[str, Tensor], decay: float) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"decay {decay} is not in [0, 1); 0 follows the parameters, 0.9 lags behind them")
        self.decay = decay
        self.num_updates = 0
        self.averages = {name: tensor.detach().float().clone() for name, tensor in parameters.items()}

    @torch.no_grad()
    def update(self, parameters: Mapping[str, Tensor]) -> None:
        """Moves each average towards its parameter."""
        self._require_names(parameters)
        decay = min(self.decay, (1 + self.num_updates) / (10 + self.num_updates))
        for name, average in self.averages.items():
            average.lerp_(parameters[name].to(average), 1 - decay)
        self.num_updates += 1

    @contextlib.contextmanager
    def swapped_in(self, module: nn.Module) -> Iterator[None]:
        """Lets the module's parameters of the averaged names hold the averages until the block ends."""
        parameters = {name: tensor for name, tensor in module.named_parameters() if name in self.averages}
        self._require_names(parameters)
        originals = {name: tensor.detach().clone() for name, tensor in parameters.items()}
        try:
            _copy(self.averages, parameters)
            yield
        finally:
            _copy(originals, parameters)

    def state_dict(self) -> dict[str, Tensor]:
        """Gives copies of the averages and the count of updates."""
        averages = {_AVERAGE + name: tensor.clone() for name, tensor in self.averages.items()}
        return {_COUNT: torch.tensor(self.num_updates)} | averages

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Takes over what `state_dict` gave; the names must be those of the averaged parameters."""
        averages = {name.removeprefix(_AVERAGE): tensor for name, tensor in state.items() if name != _COUNT}
        self._require_names(averages)
        _copy(averages, self.averages)
        self.num_updates = int(state[_COUNT])

    def _require_names(self, tensors: Mapping[str, Tensor]) -> None:
        if different := self.averages.keys() ^ tensors.keys():
            raise ValueError(
                f"parameters {', '.join(sorted(different))} are on one side only; an average is of exactly the "
                f"{len(self.averages)} parameters that it was made with"
            )


@torch.no_grad()
def _copy(source: Mapping[str, Tensor], target: Mapping[str, Tensor]) -> None:
    for name, tensor in target.items():
        tensor.copy_(source[name])
