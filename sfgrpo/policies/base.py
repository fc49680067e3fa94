"""The contract of every flow model."""

from __future__ import annotations

import contextlib
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from sfgrpo.types import Conditioning


class Policy(ABC):
    """A text-to-image flow model with a trainable adapter on a frozen start policy."""

    @property
    @abstractmethod
    def latent_shape(self) -> tuple[int, int, int]:
        """Channels, height and width of a latent."""

    @property
    @abstractmethod
    def device(self) -> torch.device:
        """Device that latents and conditioning must be on."""

    @abstractmethod
    def sigmas(self, num_steps: int) -> Tensor:
        """Noise levels of the states of a run of `num_steps` steps: [num_steps + 1], from 1 to 0, float32."""

    @abstractmethod
    def encode(self, texts: Sequence[str]) -> Conditioning:
        """Encode texts without gradients; guidance takes the empty text as the unconditional one."""

    @abstractmethod
    def velocity(
        self, latents: Tensor, sigma: Tensor, conditioning: Conditioning, guidance_scale: float = 1.0
    ) -> Tensor:
        """Predict noise minus clean latent at `latents` [N, C, H, W] and noise levels `sigma` [N], in float32.

        A guidance scale of 1 costs one pass through the transformer, any other two. No rows at all still cost one:
        processes that share a model must call this equally often.
        """

    @abstractmethod
    def reference_velocity(
        self, latents: Tensor, sigma: Tensor, conditioning: Conditioning, guidance_scale: float = 1.0
    ) -> Tensor:
        """Predict the velocity of the frozen start policy, without gradients."""

    @abstractmethod
    def save_adapter(self, folder: Path) -> None:
        """Write the adapter in the format that the model's own library loads."""

    @abstractmethod
    def load_adapter(self, folder: Path) -> None:
        """Read an adapter that `save_adapter` wrote; raise `AdapterError` if it is damaged or of another policy."""

    @abstractmethod
    def decode(self, latents: Tensor) -> NDArray[np.uint8]:
        """Decode clean latents [N, C, H, W] to RGB images [N, H, W, 3]."""

    @property
    @abstractmethod
    def module(self) -> nn.Module:
        """Module whose trainable parameters are the adapter."""

    def adapter_parameters(self) -> dict[str, nn.Parameter]:
        """Return the parameters that training changes, by name."""
        return {name: value for name, value in self.module.named_parameters() if value.requires_grad}


@contextlib.contextmanager
def use_adapter(policy: Policy, files: Mapping[str, bytes]) -> Iterator[None]:
    """Load an adapter, given by its files, into the policy for a block, then restore the previous one."""
    originals = {name: parameter.detach().clone() for name, parameter in policy.adapter_parameters().items()}
    try:
        with tempfile.TemporaryDirectory() as folder:
            for name, content in files.items():
                Path(folder, name).write_bytes(content)
            policy.load_adapter(Path(folder))
        yield
    finally:
        with torch.no_grad():
            for name, parameter in policy.adapter_parameters().items():
                parameter.copy_(originals[name])
