"""The bare arithmetic of a phase: the same passes, decodes and rewards in a plain loop, with nothing of ours."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from typing import Literal
from unittest import mock

import numpy as np
import torch
from numpy.typing import NDArray
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from sfgrpo.policies.sd3 import SD3Policy
from sfgrpo.rewards import Reward
from sfgrpo.types import Conditioning, Prompt

Kind = Literal["forward", "reference", "backward", "decode", "reward"]
"""Transformer without gradient, the same without the adapter, forward and backward pass, decoder, reward."""


@dataclasses.dataclass(frozen=True, slots=True)
class Call:
    """One call of a model."""

    kind: Kind
    num_rows: int
    scored: tuple[NDArray[np.uint8], Sequence[Prompt]] | None = None
    """What a reward was called with: its time may depend on what the images show."""


class RecordedReward(Reward):
    """A reward that notes every call."""

    def __init__(self, reward: Reward) -> None:
        self.reward, self.name = reward, reward.name
        self.calls: list[Call] = []

    def __call__(self, images: NDArray[np.uint8], prompts: Sequence[Prompt]) -> Tensor:
        self.calls.append(Call("reward", len(images), (images, prompts)))
        return self.reward(images, prompts)


@contextlib.contextmanager
def recorded_calls(policy: SD3Policy, reward: RecordedReward) -> Iterator[list[Call]]:
    """List every call of the policy's models, and of the reward, within the block."""
    calls = reward.calls = []
    adapted = next(module for module in policy.module.modules() if isinstance(module, BaseTunerLayer))
    decode = policy.decode

    def note_pass(module: torch.nn.Module, arguments: object, output: tuple[Tensor]) -> None:
        without_gradient: Kind = "reference" if adapted.disable_adapters else "forward"
        calls.append(Call("backward" if output[0].requires_grad else without_gradient, len(output[0])))

    def note_decode(latents: Tensor) -> NDArray[np.uint8]:
        calls.append(Call("decode", len(latents)))
        return decode(latents)

    hook = policy.module.register_forward_hook(note_pass)
    with mock.patch.object(policy, "decode", note_decode):
        try:
            yield calls
        finally:
            hook.remove()


class BareModels:
    """The models of a policy, called directly: weights and adapter in one dtype, no autocast, random inputs."""

    def __init__(self, policy: SD3Policy, reward: Reward, conditioning: Conditioning) -> None:
        self._policy, self._reward = policy, reward
        self._transformer, self._vae = policy.pipeline.transformer, policy.pipeline.vae
        self._dtype = self._vae.dtype
        self._conditioning = conditioning

    @contextlib.contextmanager
    def adapter_in_dtype(self) -> Iterator[None]:
        """Hold the adapter in the dtype of the frozen weights within the block."""
        parameters = list(self._policy.adapter_parameters().values())
        masters = [parameter.data for parameter in parameters]
        for parameter in parameters:
            parameter.data = parameter.data.to(self._dtype)
            parameter.grad = None
        try:
            yield
        finally:
            for parameter, master in zip(parameters, masters, strict=True):
                parameter.grad = None
                parameter.data = master

    def run(self, calls: Sequence[Call]) -> None:
        """Make the calls, one after the other."""
        for call in calls:
            match call.kind:
                case "forward":
                    self._forward(call.num_rows)
                case "reference":
                    self._transformer.disable_adapters()
                    self._forward(call.num_rows)
                    self._transformer.enable_adapters()
                case "backward":
                    torch.autograd.backward(self._predict(call.num_rows).float().square().mean())
                case "decode":
                    self._decode(call.num_rows)
                case "reward":
                    assert call.scored is not None
                    self._reward(*call.scored)

    def count_flops(self) -> dict[str, float]:
        """Count the floating-point operations of one row of each kind of call; a reward counts as none."""
        flops: dict[str, float] = {"reward": 0.0}
        for kind in ("forward", "reference", "backward", "decode"):
            with FlopCounterMode(display=False) as counter, self.adapter_in_dtype():
                self.run([Call(kind, 1)])
            flops[kind] = float(counter.get_total_flops())
        return flops

    @torch.no_grad()
    def _forward(self, num_rows: int) -> None:
        self._predict(num_rows)

    def _predict(self, num_rows: int) -> Tensor:
        device = self._policy.device
        tokens, pooled = self._conditioning.tokens[:1].to(device), self._conditioning.pooled[:1].to(device)
        velocity: Tensor = self._transformer(
            hidden_states=torch.randn(num_rows, *self._policy.latent_shape, device=device, dtype=self._dtype),
            encoder_hidden_states=tokens.to(self._dtype).expand(num_rows, -1, -1),
            pooled_projections=pooled.to(self._dtype).expand(num_rows, -1),
            timestep=torch.full((num_rows,), 500.0, device=device),
            return_dict=False,
        )[0]
        return velocity

    @torch.no_grad()
    def _decode(self, num_rows: int) -> None:
        latents = torch.randn(num_rows, *self._policy.latent_shape, device=self._policy.device, dtype=self._dtype)
        self._vae.decode(latents.to(memory_format=torch.channels_last), return_dict=False)[0].cpu()
