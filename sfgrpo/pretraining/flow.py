"""Train the shapes transformer and its text encoders from scratch by conditional flow matching, resumably."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from diffusers import StableDiffusion3Pipeline
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from sfgrpo.types import Prompt

logger = logging.getLogger(__name__)

PADDING_TOKENS = 256
"""Zero tokens that a StableDiffusion3Pipeline without T5 appends when it is called with its own defaults."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class FlowRecipe:
    """How the flow model is trained; every number shapes the result."""

    num_steps: int
    batch_size: int
    learning_rate: float
    """AdamW: embeddings, modulations, norms, text encoders."""
    muon_learning_rate: float
    """Muon: the matrices of attention and feed-forward; RMS-matched to AdamW."""
    decay_fraction: float
    """Share of the steps at the end over which both rates fall linearly to zero; constant before."""
    warmup_steps: int
    ema_decay: float
    caption_dropout: float
    """Share of captions replaced by the empty one, which guidance needs."""
    padded_every_num_steps: int
    """Every so many steps the text is followed by the pipeline's default padding, so that plain calls work too."""
    bfloat16: bool
    """Whether forward and backward run under bfloat16 autocast; weights and optimisers stay float32."""
    compile: bool
    """Whether torch.compile builds the transformer (needs a C++ compiler)."""


def encode_tokens(pipeline: StableDiffusion3Pipeline, token_ids: Tensor) -> tuple[Tensor, Tensor]:
    """Encode token ids [N, L] as the pipeline does: (tokens [N, L, D], pooled [N, E])."""
    first, second = (
        encoder(token_ids, output_hidden_states=True) for encoder in (pipeline.text_encoder, pipeline.text_encoder_2)
    )
    tokens = torch.cat([first.hidden_states[-2], second.hidden_states[-2]], dim=-1)
    return tokens, torch.cat([first.text_embeds, second.text_embeds], dim=-1)


def tokenize(pipeline: StableDiffusion3Pipeline, prompts: tuple[Prompt, ...]) -> Tensor:
    """Tokenise every prompt, and the empty caption as the last row: ids [num_prompts + 1, L]."""
    texts = [*(prompt.text for prompt in prompts), ""]
    length = pipeline.tokenizer.model_max_length
    return pipeline.tokenizer(
        texts, padding="max_length", max_length=length, truncation=True, return_tensors="pt"
    ).input_ids


class FlowTraining:
    """The state of one training: pipeline, averaged weights, two optimizers and the step reached."""

    def __init__(self, pipeline: StableDiffusion3Pipeline, recipe: FlowRecipe) -> None:
        self.pipeline = pipeline
        self.recipe = recipe
        self.step = 0
        self._modules = nn.ModuleDict(
            {
                "transformer": pipeline.transformer,
                "text_encoder": pipeline.text_encoder,
                "text_encoder_2": pipeline.text_encoder_2,
            }
        )
        named = dict(self._modules.named_parameters())
        matrices = [
            value
            for name, value in named.items()
            if "transformer_blocks" in name and value.ndim == 2 and (".attn." in name or ".ff" in name)
        ]
        chosen = {id(value) for value in matrices}
        others = [value for value in named.values() if id(value) not in chosen]
        self._parameters: list[Tensor] = list(named.values())
        self._names = list(named)
        self._averaged = [value.detach().clone() for value in self._parameters]
        self._optimizers: dict[str, tuple[torch.optim.Optimizer, float]] = {
            "adamw": (
                torch.optim.AdamW(others, lr=recipe.learning_rate, betas=(0.9, 0.95), weight_decay=0.01),
                recipe.learning_rate,
            ),
            "muon": (
                torch.optim.Muon(
                    matrices, lr=recipe.muon_learning_rate, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"
                ),
                recipe.muon_learning_rate,
            ),
        }
        self._velocity = torch.compile(pipeline.transformer) if recipe.compile else pipeline.transformer

    def learning_rate_factor(self) -> float:
        """Warm-up, then constant, then linear decay to zero."""
        recipe = self.recipe
        decay_steps = max(1, round(recipe.decay_fraction * recipe.num_steps))
        return min(1.0, (self.step + 1) / recipe.warmup_steps, (recipe.num_steps - self.step) / decay_steps)

    def loss(self, latents: Tensor, token_ids: Tensor, padding_tokens: int, generator: torch.Generator) -> Tensor:
        """Flow-matching loss at logit-normal times: ||v(x_t, t) - (x1 - x0)||^2, mean over elements."""
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
        """Train to the recipe's last step and yields (steps done, loss); a step's randomness is its seed and index."""
        empty = len(token_ids) - 1
        prompt_ids = torch.from_numpy(prompt_index)
        while self.step < self.recipe.num_steps:
            padded = self.step % self.recipe.padded_every_num_steps == 0
            size = self.recipe.batch_size // 4 if padded else self.recipe.batch_size
            generator = torch.Generator().manual_seed(seed * 1_000_003 + self.step)
            rows = torch.randint(len(latents), (size,), generator=generator)
            dropped = torch.rand(size, generator=generator) < self.recipe.caption_dropout
            ids = token_ids[torch.where(dropped, empty, prompt_ids[rows])]
            # Autocast keeps its casts of the weights until its block ends, so every step needs a block of its own.
            with torch.autocast("cpu", torch.bfloat16, enabled=self.recipe.bfloat16):
                loss = self.loss(latents[rows], ids, PADDING_TOKENS if padded else 0, generator)
            loss.backward()
            nn.utils.clip_grad_norm_(self._parameters, 1.0)
            for optimizer, rate in self._optimizers.values():
                optimizer.param_groups[0]["lr"] = rate * self.learning_rate_factor()
                optimizer.step()
                optimizer.zero_grad()
            self.step += 1
            decay = min(self.recipe.ema_decay, (1 + self.step) / (10 + self.step))
            torch._foreach_lerp_(self._averaged, [value.detach() for value in self._parameters], 1.0 - decay)
            yield self.step, loss.item()

    def use_averaged_weights(self) -> None:
        """Copy the averaged weights into the pipeline: the end of training."""
        with torch.no_grad():
            torch._foreach_copy_(self._parameters, self._averaged)

    def save(self, path: Path) -> None:
        """Write weights, averages and optimizer states to one safetensors file, atomically."""
        tensors = {f"weights/{name}": value.detach() for name, value in zip(self._names, self._parameters, strict=True)}
        tensors |= {f"averaged/{name}": value for name, value in zip(self._names, self._averaged, strict=True)}
        for kind, (optimizer, _) in self._optimizers.items():
            for index, state in optimizer.state_dict()["state"].items():
                tensors |= {f"{kind}/{index}/{key}": torch.as_tensor(value) for key, value in state.items()}
        temporary = path.with_suffix(".partial")
        save_file(
            {key: value.contiguous() for key, value in tensors.items()}, temporary, {"step": json.dumps(self.step)}
        )
        os.replace(temporary, path)

    def load(self, path: Path) -> None:
        """Read what `save` wrote and continues from its step."""
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
        with path.open("rb") as file:
            header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        self.step = int(header["__metadata__"]["step"])
        logger.info("continuing from step %d", self.step)
