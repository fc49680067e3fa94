"""Resumable training of the shapes transformer and its text encoders from scratch, by conditional flow matching."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from diffusers import StableDiffusion3Pipeline
from numpy.typing import NDArray
from safetensors.torch import load_file, save
from torch import Tensor, nn

from sfgrpo.config.pretrain_schema import TransformerConfig
from sfgrpo.pretraining.optimization import make_optimizers, take_step
from sfgrpo.pretraining.pipeline import tokenize
from sfgrpo.runtime.files import atomic_write
from sfgrpo.types import Prompt

logger = logging.getLogger(__name__)

PADDING_TOKENS = 256
"""Zero tokens that a StableDiffusion3Pipeline without T5 appends by default."""


def encode_tokens(pipeline: StableDiffusion3Pipeline, token_ids: Tensor) -> tuple[Tensor, Tensor]:
    """Encode token ids [N, L] as the pipeline does: (tokens [N, L, D], pooled [N, E])."""
    first, second = (
        encoder(token_ids, output_hidden_states=True) for encoder in (pipeline.text_encoder, pipeline.text_encoder_2)
    )
    tokens = torch.cat([first.hidden_states[-2], second.hidden_states[-2]], dim=-1)
    return tokens, torch.cat([first.text_embeds, second.text_embeds], dim=-1)


def tokenize_captions(pipeline: StableDiffusion3Pipeline, prompts: tuple[Prompt, ...]) -> Tensor:
    """Tokenise every prompt, and the empty caption as the last row: ids [num_prompts + 1, L]."""
    return tokenize(pipeline.tokenizer, [*(prompt.text for prompt in prompts), ""])


class FlowTraining:
    """State of one training: pipeline, averaged weights, two optimisers and the step reached."""

    def __init__(self, pipeline: StableDiffusion3Pipeline, config: TransformerConfig) -> None:
        self.pipeline = pipeline
        self.config = config
        self.step = 0
        modules = {name: getattr(pipeline, name) for name in ("transformer", "text_encoder", "text_encoder_2")}
        named = dict(nn.ModuleDict(modules).named_parameters())
        self._parameters: list[Tensor] = list(named.values())
        self._names = list(named)
        self._averaged = [value.detach().clone() for value in self._parameters]
        self._optimizers = make_optimizers(
            named, lambda name: "transformer_blocks" in name and (".attn." in name or ".ff" in name), config
        )
        self._velocity = torch.compile(pipeline.transformer) if config.compile else pipeline.transformer

    def learning_rate_factor(self) -> float:
        """Return the share of the peak rates: linear warm-up, then constant, then linear decay to zero."""
        config = self.config
        decay_steps = max(1, round(config.decay_fraction * config.num_steps))
        return min(1.0, (self.step + 1) / config.warmup_steps, (config.num_steps - self.step) / decay_steps)

    def loss(self, latents: Tensor, token_ids: Tensor, padding_tokens: int, generator: torch.Generator) -> Tensor:
        """Return the flow-matching loss at logit-normal times: ||v(x_t, t) - (x1 - x0)||^2, mean over elements."""
        noise = torch.randn(latents.shape, generator=generator)
        sigma = torch.sigmoid(torch.randn(len(latents), generator=generator) * 1.1 + 0.2)
        mixed = torch.lerp(latents, noise, sigma[:, None, None, None])
        tokens, pooled = encode_tokens(self.pipeline, token_ids)
        velocity = self._velocity
        if padding_tokens:
            tokens = torch.cat([tokens, tokens.new_zeros(len(tokens), padding_tokens, tokens.shape[2])], dim=1)
            velocity = self.pipeline.transformer
        predicted = velocity(
            hidden_states=mixed,
            encoder_hidden_states=tokens,
            pooled_projections=pooled,
            timestep=sigma * 1000.0,
            return_dict=False,
        )[0]
        return nn.functional.mse_loss(predicted, noise - latents)

    def run(
        self, latents: Tensor, prompt_index: NDArray[np.int64], token_ids: Tensor, seed: int
    ) -> Iterator[tuple[int, float]]:
        """Train to the last step and yield (steps done, loss); a step's randomness depends on seed and step alone."""
        empty = len(token_ids) - 1
        prompt_ids = torch.from_numpy(prompt_index)
        while self.step < self.config.num_steps:
            padded = self.step % self.config.padded_every_num_steps == 0
            size = self.config.batch_size // 4 if padded else self.config.batch_size
            generator = torch.Generator().manual_seed(seed * 1_000_003 + self.step)
            rows = torch.randint(len(latents), (size,), generator=generator)
            dropped = torch.rand(size, generator=generator) < self.config.caption_dropout
            ids = token_ids[torch.where(dropped, empty, prompt_ids[rows])]
            # A block for each step: autocast keeps its casts of the weights until its block ends.
            with torch.autocast("cpu", torch.bfloat16, enabled=self.config.bfloat16):
                loss = self.loss(latents[rows], ids, PADDING_TOKENS if padded else 0, generator)
            loss.backward()
            take_step(self._optimizers, self._parameters, self.learning_rate_factor())
            self.step += 1
            # diffusers' EMAModel starts its ramp one update later, which would change a model trained anew.
            decay = min(self.config.ema_decay, (1 + self.step) / (10 + self.step))
            torch._foreach_lerp_(self._averaged, [value.detach() for value in self._parameters], 1.0 - decay)
            yield self.step, loss.item()

    def use_averaged_weights(self) -> None:
        """Copy the averaged weights into the pipeline, at the end of training."""
        with torch.no_grad():
            torch._foreach_copy_(self._parameters, self._averaged)

    def save(self, path: Path) -> None:
        """Write weights, averages and optimiser states to one safetensors file, atomically."""
        tensors = {"step": torch.tensor(self.step)}
        tensors |= {
            f"weights/{name}": value.detach() for name, value in zip(self._names, self._parameters, strict=True)
        }
        tensors |= {f"averaged/{name}": value for name, value in zip(self._names, self._averaged, strict=True)}
        for kind, (optimizer, _) in self._optimizers.items():
            for index, state in optimizer.state_dict()["state"].items():
                tensors |= {f"{kind}/{index}/{key}": torch.as_tensor(value) for key, value in state.items()}
        atomic_write(path, save({key: value.contiguous() for key, value in tensors.items()}))

    def load(self, path: Path) -> None:
        """Read what `save` wrote and continue from its step."""
        tensors = load_file(path)
        with torch.no_grad():
            for name, value, average in zip(self._names, self._parameters, self._averaged, strict=True):
                value.copy_(tensors[f"weights/{name}"])
                average.copy_(tensors[f"averaged/{name}"])
        for kind, (optimizer, _) in self._optimizers.items():
            state: dict[int, dict[str, Tensor]] = {}
            for key, value in tensors.items():
                if key.startswith(f"{kind}/"):
                    _, index, field = key.split("/")
                    state.setdefault(int(index), {})[field] = value
            optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
        self.step = int(tensors["step"])
        logger.info("continuing from step %d", self.step)
