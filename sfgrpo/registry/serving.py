"""The registered model: prompts in, PNG files out.

MLflow copies this file into every version and runs it there. It therefore imports nothing of sfgrpo: loading a version
needs only diffusers, peft and MLflow.
"""

from __future__ import annotations

import hashlib
import io
from pathlib import Path
from typing import Any

import mlflow
import pandas as pd
import torch
import transformers
from diffusers import StableDiffusion3Pipeline
from diffusers.utils.logging import disable_progress_bar
from mlflow.pyfunc.model import PythonModel, PythonModelContext


class TextToImage(PythonModel):
    """A diffusers pipeline with the trained LoRA adapter on top."""

    def load_context(self, context: PythonModelContext) -> None:
        """Load base model and adapter; raise `RuntimeError` if the adapter is not the registered one."""
        disable_progress_bar()
        transformers.utils.logging.disable_progress_bar()
        settings = context.model_config
        weights = Path(context.artifacts["adapter"], settings["adapter_file"])
        found = hashlib.sha256(weights.read_bytes()).hexdigest()
        if found != settings["adapter_sha256"]:
            raise RuntimeError(f"{weights} is damaged: expected sha256 {settings['adapter_sha256']}, found {found}")
        without_t5 = {} if settings["max_sequence_length"] else {"text_encoder_3": None, "tokenizer_3": None}
        self._settings = settings
        self._pipeline = StableDiffusion3Pipeline.from_pretrained(
            context.artifacts.get("pipeline", settings["pretrained"]),
            revision=settings["revision"],
            dtype=getattr(torch, settings["dtype"]),
            use_safetensors=True,
            **without_t5,
        )
        adapter, metadata = self._pipeline.lora_state_dict(
            context.artifacts["adapter"], weight_name=weights.name, return_lora_metadata=True, use_safetensors=True
        )
        self._pipeline.load_lora_into_transformer(adapter, self._pipeline.transformer, metadata=metadata)
        self._pipeline.to("cuda" if torch.cuda.is_available() else "cpu")
        self._pipeline.set_progress_bar_config(disable=True)

    def predict(
        self, context: PythonModelContext, model_input: pd.DataFrame, params: dict[str, Any] | None = None
    ) -> pd.DataFrame:
        """Draw one image for each prompt of the only column; return PNG files as bytes in the column `png`.

        Image i starts from the noise of `seed` + i, so it does not depend on how many prompts come with it.
        """
        prompts = model_input.iloc[:, 0].tolist()
        settings = self._settings | (params or {})
        images = self._pipeline(
            prompts,
            num_inference_steps=settings["num_inference_steps"],
            guidance_scale=settings["guidance_scale"],
            height=settings["resolution"],
            width=settings["resolution"],
            max_sequence_length=settings["max_sequence_length"],
            generator=[torch.Generator().manual_seed(settings["seed"] + index) for index in range(len(prompts))],
        ).images
        return pd.DataFrame({"png": [_png(image) for image in images]})


def _png(image: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue()


mlflow.models.set_model(TextToImage())
