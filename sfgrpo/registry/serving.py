"""The registered model: prompts in, PNG files out.

MLflow copies this file into every version and runs it there. It therefore imports nothing of sfgrpo: loading a version
needs only diffusers, peft and MLflow.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import mlflow
import pandas as pd
import torch
import transformers
from diffusers import StableDiffusion3Pipeline
from diffusers.utils.logging import disable_progress_bar
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import INVALID_PARAMETER_VALUE
from mlflow.pyfunc.model import PythonModel, PythonModelContext

MANIFEST = "manifest.json"
RESOLVED_BY_MLFLOW = "registered_model_meta"
BYTECODE = "__pycache__"
"""What MLflow and Python add to a version when it is loaded."""
PARAMS = ("num_inference_steps", "guidance_scale", "seed")
LIMITS: Mapping[str, float] = {"max_prompts": 16, "max_steps": 100, "max_guidance_scale": 20.0}
"""Limits of versions that were registered without any."""
MAX_SEED = 2**32 - 1
MAX_CHARACTERS = 10_000
"""Characters of a prompt that are read at all: more than any text encoder takes."""


class TextToImage(PythonModel):
    """A diffusers pipeline with the trained LoRA adapter on top."""

    def load_context(self, context: PythonModelContext) -> None:
        """Load base model and adapter; raise `RuntimeError` if a file is not the one that was registered."""
        verify_files(Path(__file__).parent)
        disable_progress_bar()
        transformers.utils.logging.disable_progress_bar()
        settings = context.model_config
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
            context.artifacts["adapter"],
            weight_name=settings["adapter_file"],
            return_lora_metadata=True,
            use_safetensors=True,
        )
        self._pipeline.load_lora_into_transformer(adapter, self._pipeline.transformer, metadata=metadata)
        self._pipeline.to("cuda" if torch.cuda.is_available() else "cpu")
        self._pipeline.set_progress_bar_config(disable=True)

    def predict(
        self, context: PythonModelContext, model_input: pd.DataFrame, params: dict[str, Any] | None = None
    ) -> pd.DataFrame:
        """Draw one image for each prompt of the only column; return PNG files as bytes in the column `png`.

        Image i starts from the noise of `seed` + i, so it does not depend on how many prompts come with it.

        Raises:
            MlflowException: The request exceeds a limit or holds something else than texts and numbers; a server
                answers it with status 400.
        """
        prompts = model_input.iloc[:, 0].tolist()
        check_request(prompts, params or {}, self._settings)
        for position, prompt in enumerate(prompts):
            self._require_fit(position, prompt)
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

    def _require_fit(self, position: int, prompt: str) -> None:
        """Refuse a prompt of which every text encoder would read the beginning alone."""
        pipeline, longest = self._pipeline, self._settings["max_sequence_length"]
        encoders = [(pipeline.tokenizer, pipeline.tokenizer_max_length)]
        encoders += [(pipeline.tokenizer_3, longest)] if longest else []
        counts = [(len(tokenizer(prompt, verbose=False).input_ids), most) for tokenizer, most in encoders]
        if all(found > most for found, most in counts):
            found, most = max(counts, key=lambda count: count[1])
            raise _refusal(
                f"prompt {position} has {found} tokens and the text encoder takes {most}; shorten it, since the rest "
                "would not be drawn"
            )


def check_request(prompts: Sequence[Any], params: Mapping[str, Any], settings: Mapping[str, Any]) -> None:
    """Raise `MlflowException` unless prompts and parameters are texts and numbers within the limits of a version.

    Args:
        prompts: One image is drawn for each.
        params: What the caller sets of `PARAMS`.
        settings: What was registered, with `max_prompts`, `max_steps` and `max_guidance_scale`.
    """
    limits = {name: settings.get(name, limit) for name, limit in LIMITS.items()}
    if unknown := [name for name in params if name not in PARAMS]:
        raise _refusal(f"{unknown[0]!r} is no parameter of a request; allowed are {', '.join(PARAMS)}")
    if not 1 <= len(prompts) <= limits["max_prompts"]:
        raise _refusal(
            f"a request has {len(prompts)} prompts instead of 1 to {limits['max_prompts']}; send the others by further "
            "requests"
        )
    for position, prompt in enumerate(prompts):
        _check_prompt(position, prompt)
    for name, lowest, highest in (("num_inference_steps", 1, limits["max_steps"]), ("seed", 0, MAX_SEED)):
        if not _is_between(value := params.get(name, lowest), (int,), lowest, highest):
            raise _refusal(
                f"{name} {_shown(value)} is not an integer in {lowest}..{highest}; give one, or leave it out"
            )
    highest = limits["max_guidance_scale"]
    if not _is_between(value := params.get("guidance_scale", 0.0), (int, float), 0, highest):
        raise _refusal(f"guidance_scale {_shown(value)} is not a number in 0..{highest}; give one, or leave it out")


def verify_files(folder: Path) -> None:
    """Raise `RuntimeError` unless the files of a version, base model included, are those that its manifest lists."""
    try:
        listed = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["files"]
        expected = {name: entry["sha256"] for name, entry in listed.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise RuntimeError(f"{folder / MANIFEST} is no manifest of the files beside it; register again") from error
    present = (path.relative_to(folder) for path in folder.rglob("*") if not path.is_dir())
    found = {path.as_posix() for path in present if BYTECODE not in path.parts} - {MANIFEST, RESOLVED_BY_MLFLOW}
    for name in sorted(found ^ expected.keys()):
        raise RuntimeError(f"{folder / name} is {'not registered' if name in found else 'absent'}; nothing is loaded")
    for name, sha256 in expected.items():
        with (folder / name).open("rb") as file:
            if (now := hashlib.file_digest(file, "sha256").hexdigest()) != sha256:
                raise RuntimeError(f"{folder / name} is damaged: expected sha256 {sha256}, found {now}")


def _check_prompt(position: int, prompt: Any) -> None:
    if not isinstance(prompt, str):
        raise _refusal(f"prompt {position} is {_shown(prompt)} instead of a text; send a list of texts")
    if not prompt.strip():
        raise _refusal(f"prompt {position} is empty; send the text to draw")
    if len(prompt) > MAX_CHARACTERS:
        raise _refusal(
            f"prompt {position} has {len(prompt)} characters instead of {MAX_CHARACTERS} at most; shorten it"
        )
    try:
        prompt.encode()
    except UnicodeEncodeError:
        raise _refusal(f"prompt {position} holds half a character (a lone surrogate); send text in UTF-8") from None


def _is_between(value: Any, kinds: tuple[type, ...], lowest: float, highest: float) -> bool:
    # By type, since True is an integer for Python; NaN is between nothing.
    return type(value) in kinds and bool(lowest <= value <= highest)


def _refusal(message: str) -> MlflowException:
    # A server answers with the HTTP status of the code, 400.
    return MlflowException(message, error_code=INVALID_PARAMETER_VALUE)


def _shown(value: Any) -> str:
    try:
        text = repr(value)
    except ValueError:
        # Python writes no integer of more than 4,300 digits.
        return f"a huge {type(value).__name__}"
    return text if len(text) <= 40 else f"{text[:40]}..."


def _png(image: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue()


mlflow.models.set_model(TextToImage())
