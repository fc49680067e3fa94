"""Stable Diffusion 3 and 3.5 as a policy: any diffusers SD3 pipeline, with a LoRA adapter by peft."""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import StableDiffusion3Pipeline
from numpy.typing import NDArray
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard

from sfgrpo.errors import AdapterError
from sfgrpo.policies.adapter import METADATA_KEY, PREFIX, WEIGHTS_NAME, Adapter, Base, read_adapter, require_base
from sfgrpo.policies.base import Policy
from sfgrpo.types import Conditioning, joined

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
ADAPTER = "default"


class SD3Policy(Policy):
    """A diffusers StableDiffusion3Pipeline whose transformer carries a trainable LoRA adapter.

    Frozen weights are held in `dtype`; the adapter is float32 and the transformer runs under autocast when `dtype` is
    not float32. Latents, velocities and everything computed from them are float32.
    """

    def __init__(
        self,
        pipeline: StableDiffusion3Pipeline,
        *,
        resolution: int,
        max_sequence_length: int,
        lora_rank: int,
        lora_alpha: int,
        lora_targets: Sequence[str],
        dtype: torch.dtype = torch.float32,
        seed: int = 0,
        base: Base | None = None,
    ) -> None:
        """Add a fresh adapter of the seed; `base` is what the files of the adapter name as their pipeline."""
        if resolution % (factor := pipeline.vae_scale_factor * pipeline.patch_size):
            raise ValueError(
                f"policy.resolution {resolution} is not a multiple of {factor} (VAE factor times patch size)"
            )
        self.pipeline = pipeline
        self._resolution = resolution
        self._max_sequence_length = max_sequence_length
        self._dtype = dtype
        self._base = base
        if max_sequence_length == 0:
            pipeline.register_modules(text_encoder_3=None, tokenizer_3=None)
        for module in pipeline.components.values():
            if isinstance(module, nn.Module):
                module.requires_grad_(False).eval()
        targets = _existing_targets(pipeline.transformer, lora_targets)
        config = LoraConfig(r=lora_rank, lora_alpha=lora_alpha, init_lora_weights="gaussian", target_modules=targets)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            pipeline.transformer.add_adapter(config, adapter_name=ADAPTER)
        for parameter in self.adapter_parameters().values():
            parameter.data = parameter.data.float()
        # Convolutions of the decoder run a third faster in this layout.
        pipeline.vae.to(memory_format=torch.channels_last)

    @classmethod
    def from_pretrained(
        cls, pretrained: str | Path, *, revision: str | None = None, dtype: str = "float32", **options: Any
    ) -> SD3Policy:
        """Load a pipeline from a folder or from the Hugging Face hub (`revision` pins the latter)."""
        # An unused T5 is not read: SD3's has 9.5 GB, and a pipeline may lack one.
        left_out = {"text_encoder_3": None, "tokenizer_3": None} if options["max_sequence_length"] == 0 else {}
        pipeline = StableDiffusion3Pipeline.from_pretrained(
            pretrained, revision=revision, dtype=DTYPES[dtype], use_safetensors=True, **left_out
        )
        # The options are those of __init__, which checks them when it is called.
        return cls(pipeline, dtype=DTYPES[dtype], **options)

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        side = self._resolution // self.pipeline.vae_scale_factor
        return self.pipeline.transformer.config.in_channels, side, side

    @property
    def module(self) -> nn.Module:
        return self.pipeline.transformer

    @property
    def device(self) -> torch.device:
        return self.pipeline.transformer.device

    def sigmas(self, num_steps: int) -> Tensor:
        scheduler = self.pipeline.scheduler
        scheduler.set_timesteps(num_steps)
        return scheduler.sigmas.float().cpu()

    @torch.no_grad()
    def encode(self, texts: Sequence[str]) -> Conditioning:
        tokens, _, pooled, _ = self.pipeline.encode_prompt(
            prompt=list(texts),
            prompt_2=None,
            prompt_3=None,
            do_classifier_free_guidance=False,
            max_sequence_length=self._max_sequence_length,
        )
        return Conditioning(tokens=tokens, pooled=pooled)

    @functools.cached_property
    def _unconditional(self) -> Conditioning:
        return self.encode([""])

    def velocity(
        self, latents: Tensor, sigma: Tensor, conditioning: Conditioning, guidance_scale: float = 1.0
    ) -> Tensor:
        if not len(latents):
            # diffusers' attention takes no empty batch, but a sharded transformer needs every process in every pass.
            return self.velocity(_one_row(latents), _one_row(sigma), self._unconditional, guidance_scale)[:0]
        is_guided, device = guidance_scale != 1.0, self.device
        if is_guided:
            conditioning = joined([self._unconditional[[0] * len(latents)], conditioning])
            latents, sigma = latents.repeat(2, 1, 1, 1), sigma.repeat(2)
        with torch.autocast(device.type, self._dtype, enabled=self._dtype != torch.float32):
            velocity: Tensor = self.pipeline.transformer(
                hidden_states=latents.to(device, self._dtype),
                encoder_hidden_states=conditioning.tokens.to(device),
                pooled_projections=conditioning.pooled.to(device),
                timestep=sigma.to(device) * self.pipeline.scheduler.config.num_train_timesteps,
                return_dict=False,
            )[0].float()
        if not is_guided:
            return velocity
        unconditional, conditional = velocity.chunk(2)
        return unconditional + guidance_scale * (conditional - unconditional)

    @torch.no_grad()
    def reference_velocity(
        self, latents: Tensor, sigma: Tensor, conditioning: Conditioning, guidance_scale: float = 1.0
    ) -> Tensor:
        self.pipeline.transformer.disable_adapters()
        try:
            return self.velocity(latents, sigma, conditioning, guidance_scale)
        finally:
            self.pipeline.transformer.enable_adapters()

    def shard(self) -> None:
        """Shard the transformer's frozen weights over all processes, which gather them block by block (FSDP2).

        The adapter stays whole on each: it is small, and code that updates, averages or saves it stays simple.
        """
        transformer = self.pipeline.transformer
        adapter = set(self.adapter_parameters().values())
        for block in transformer.transformer_blocks:
            fully_shard(block, ignored_params=adapter)
        fully_shard(transformer, ignored_params=adapter)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> NDArray[np.uint8]:
        if not len(latents):
            return self.decode(_one_row(latents))[:0]
        vae = self.pipeline.vae
        scaled = latents / vae.config.scaling_factor + vae.config.shift_factor
        latents = scaled.to(vae.device, vae.dtype).to(memory_format=torch.channels_last)
        return to_images(vae.decode(latents, return_dict=False)[0])

    def save_adapter(self, folder: Path) -> None:
        """Write `pytorch_lora_weights.safetensors`, which `pipeline.load_lora_weights` reads in plain diffusers."""
        transformer = self.pipeline.transformer
        # Not the transformer's whole state dict: to build it, a sharded model changes its state on this process alone.
        weights = get_peft_model_state_dict(transformer, dict(self.adapter_parameters()), adapter_name=ADAPTER)
        settings = {
            key: sorted(value) if isinstance(value, set) else value for key, value in self._lora.to_dict().items()
        }
        if self._base is not None:
            settings |= {"base_model_name_or_path": self._base.name, "revision": self._base.revision}
        # Not by pipeline.save_lora_weights: safetensors writes several metadata keys in any order, so equal weights
        # would give files with different digests.
        save_file(
            {f"{PREFIX}{name}": value.detach().cpu().contiguous() for name, value in weights.items()},
            folder / WEIGHTS_NAME,
            {METADATA_KEY: json.dumps({f"{PREFIX}{key}": settings[key] for key in settings}, sort_keys=True)},
        )

    def load_adapter(self, folder: Path) -> None:
        adapter = read_adapter(folder)
        self._require_fit(adapter)
        stripped = {name.removeprefix(PREFIX): weight for name, weight in adapter.weights.items()}
        result = set_peft_model_state_dict(self.pipeline.transformer, stripped, adapter_name=ADAPTER)
        missing = [key for key in result.missing_keys if "lora_" in key]
        if missing or result.unexpected_keys:
            raise AdapterError(
                f"{adapter.path} does not fit the policy: {len(missing)} weights missing, "
                f"{len(result.unexpected_keys)} unexpected; use the base model that it was trained on"
            )

    @property
    def _lora(self) -> LoraConfig:
        return self.pipeline.transformer.peft_config[ADAPTER]

    def _require_fit(self, adapter: Adapter) -> None:
        """Raise `AdapterError` if the adapter was trained with other settings, by which its weights mean other things.

        Alpha scales the weights and leaves no trace in their shapes.
        """
        for parameter, ours, theirs in (
            ("policy.lora_rank", self._lora.r, adapter.rank),
            ("policy.lora_alpha", self._lora.lora_alpha, adapter.alpha),
            ("policy.lora_targets", sorted(self._lora.target_modules), list(adapter.targets)),
        ):
            if ours != theirs:
                raise AdapterError(
                    f"{adapter.path} does not fit the policy: it was trained with {theirs} and the policy has {ours}; "
                    f"set {parameter} to {theirs}"
                )
        require_base(adapter, self._base)


def to_images(pixels: Tensor) -> NDArray[np.uint8]:
    """Convert pixels [N, 3, H, W] in -1..1 to uint8 images [N, H, W, 3], rounding as the pipeline does."""
    levels = pixels.float().add(1.0).mul(127.5).clamp(0, 255).round()
    return levels.to(torch.uint8).permute(0, 2, 3, 1).contiguous().cpu().numpy()


def _existing_targets(transformer: nn.Module, targets: Sequence[str]) -> list[str]:
    names = [name for name, module in transformer.named_modules() if isinstance(module, nn.Linear)]
    unknown = [target for target in targets if not any(name.endswith(f".{target}") for name in names)]
    if unknown:
        endings = sorted({name.split("transformer_blocks.")[-1].split(".", 1)[-1] for name in names})
        raise ValueError(
            f"policy.lora_targets {unknown} match no linear layer of the transformer; layers end in {endings}"
        )
    return list(targets)


def _one_row(empty: Tensor) -> Tensor:
    return empty.new_zeros(1, *empty.shape[1:])
