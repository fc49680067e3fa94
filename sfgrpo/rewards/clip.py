"""The similarity of image and prompt under a CLIP: PickScore at full scale, our own small CLIP for the shapes."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sfgrpo.geneval.metadata import shown
from sfgrpo.policies.text_encoders import TextEncoder
from sfgrpo.rewards.base import Reward
from sfgrpo.runtime.manifest import MANIFEST, verify_manifest
from sfgrpo.types import Prompt

if TYPE_CHECKING:
    from transformers import CLIPModel, CLIPTokenizer


PICKSCORE_UNIT = 26.0
"""Raw score that is worth 1: Flow-GRPO's divisor for PickScore (arXiv:2505.05470)."""
PROCESSORS = {"yuvalkirstain/PickScore_v1": "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"}
"""Models whose tokenizer and preprocessing are those of another model."""
MICRO_BATCH_SIZE = 64
"""Images that are embedded together."""
MAX_CACHED_TEXTS = 4096


class ClipReward(Reward):
    """PickScore's formula (arXiv:2305.01569) for any CLIP: exp(logit scale) * cos(image, text) / 26.

    PickScore's own scale is about 100, and a sampled image is worth about 0.7 to 0.9; the scale of `models/shapes-clip`
    is 26, so its value is the cosine.
    """

    name = "clip"

    def __init__(
        self, model: CLIPModel, tokenizer: CLIPTokenizer, *, mean: Sequence[float], std: Sequence[float]
    ) -> None:
        """Take a CLIP, its tokenizer, and mean and standard deviation of red, green and blue, in 0..1."""
        self._model = model.eval().requires_grad_(False)
        self._tokenizer = tokenizer
        self._mean, self._std = tuple(mean), tuple(std)
        self._scale = model.logit_scale.exp().item() / PICKSCORE_UNIT
        self._longest = model.config.text_config.max_position_embeddings
        self._text = functools.lru_cache(maxsize=MAX_CACHED_TEXTS)(self._embedded_text)

    @classmethod
    def from_pretrained(
        cls, pretrained: str, *, revision: str | None = None, device: str | torch.device = "cpu"
    ) -> ClipReward:
        """Load a CLIP in float32 from a folder, or from the hub at a commit.

        Raises:
            ValueError: `pretrained` is neither a folder with a model nor a hub name with its revision.
            IntegrityError: the folder differs from its manifest.
        """
        # Imported here: they take seconds, and only this reward needs them.
        from transformers import CLIPModel, CLIPTokenizer
        from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

        folder = Path(pretrained)
        if (folder / MANIFEST).exists():
            verify_manifest(folder)
        elif revision is None and not (folder / "config.json").exists():
            raise ValueError(
                f"{pretrained} is no folder with a config.json; `git checkout` restores the shipped one, and a hub "
                "model needs reward.revision"
            )
        processor = PROCESSORS.get(pretrained, pretrained)
        at = {"revision": revision} if processor == pretrained else {}
        model = CLIPModel.from_pretrained(pretrained, revision=revision, dtype=torch.float32, use_safetensors=True)
        settings = CLIPImageProcessorPil.from_pretrained(processor, **at)
        tokenizer = CLIPTokenizer.from_pretrained(processor, **at)
        return cls(model.to(device), tokenizer, mean=settings.image_mean, std=settings.image_std)

    def check_prompt(self, prompt: Prompt) -> None:
        encoder = TextEncoder(name=f"reward {self.name}", tokenizer=self._tokenizer, max_tokens=self._longest)
        (tokens,) = encoder.tokenize([prompt.text])
        if (problem := encoder.problem(tokens)) is not None:
            raise ValueError(f"{problem} ({shown(prompt.text)}); shorten or reword the prompt, or use another reward")

    @torch.no_grad()
    def __call__(self, images: NDArray[np.uint8], prompts: Sequence[Prompt]) -> Tensor:
        scores = [
            self._scores(images[start : start + MICRO_BATCH_SIZE], prompts[start : start + MICRO_BATCH_SIZE])
            for start in range(0, len(images), MICRO_BATCH_SIZE)
        ]
        return torch.cat([torch.empty(0), *scores])

    def _scores(self, images: NDArray[np.uint8], prompts: Sequence[Prompt]) -> Tensor:
        texts = torch.stack([self._text(prompt.text) for prompt in prompts])
        size = self._model.config.vision_config.image_size
        levels = torch.from_numpy(images).to(self._model.device)
        pixels = preprocess(levels, size=size, mean=self._mean, std=self._std)
        scores: Tensor = self._scale * (embed_images(self._model, pixels) * texts).sum(dim=1)
        return scores.cpu()

    def _embedded_text(self, text: str) -> Tensor:
        """Embed one prompt, [D]; one longer than the model's context is cut off."""
        tokens = self._tokenizer(text, truncation=True, max_length=self._longest, return_tensors="pt")
        return embed_texts(self._model, tokens.input_ids.to(self._model.device))[0]


def preprocess(images: Tensor, *, size: int, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Turn levels [N, H, W, 3] in 0..255 into a CLIP's pixels [N, 3, size, size], as its image processor does.

    The shorter side is resized to `size`, bicubic and antialiased, the middle is cut out and colours are standardised.

    Differs: the image processor rounds to whole levels after each axis of the resize, this only after both.
    """
    levels = images.permute(0, 3, 1, 2).float()
    height, width = levels.shape[2:]
    shorter = min(height, width)
    if shorter != size:
        target = [size * height // shorter, size * width // shorter]
        resized = torch.nn.functional.interpolate(levels, target, mode="bicubic", antialias=True)
        levels = resized.clamp(0.0, 255.0).round()
    top, left = ((side - size) // 2 for side in levels.shape[2:])
    middle = levels[:, :, top : top + size, left : left + size]
    center, spread = (middle.new_tensor(values).view(3, 1, 1) for values in (mean, std))
    return (middle / 255.0 - center) / spread


def embed_images(model: CLIPModel, pixels: Tensor) -> Tensor:
    """Embed a CLIP's pixels [N, 3, H, W] on the unit sphere: [N, D]."""
    return torch.nn.functional.normalize(model.get_image_features(pixel_values=pixels).pooler_output, dim=-1)


def embed_texts(model: CLIPModel, token_ids: Tensor) -> Tensor:
    """Embed token ids [N, L] on the unit sphere: [N, D]."""
    return torch.nn.functional.normalize(model.get_text_features(input_ids=token_ids).pooler_output, dim=-1)
