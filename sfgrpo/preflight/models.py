"""Whether the models that the parameters name are of a kind that is supported, by their small JSON files alone."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sfgrpo.config.schema import PolicyConfig, RewardConfig
from sfgrpo.errors import ConfigError, SfgrpoError

INDEX = "model_index.json"
CONFIG = "config.json"
PIPELINE = "StableDiffusion3Pipeline"
SUPPORTED = f"a diffusers {PIPELINE}, which Stable Diffusion 3 and 3.5 are, is supported"
COMPONENTS = {
    "scheduler": "FlowMatchEulerDiscreteScheduler",
    "text_encoder": "CLIPTextModelWithProjection",
    "text_encoder_2": "CLIPTextModelWithProjection",
    "tokenizer": "CLIPTokenizer",
    "tokenizer_2": "CLIPTokenizer",
    "transformer": "SD3Transformer2DModel",
    "vae": "AutoencoderKL",
}
T5_COMPONENTS = {"text_encoder_3": "T5EncoderModel", "tokenizer_3": "T5Tokenizer"}
WITH_WEIGHTS = ("text_encoder", "text_encoder_2", "text_encoder_3", "transformer", "vae")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ModelFiles:
    """The files of a model in a folder, or on the hub, of which single ones are downloaded."""

    parameter: str
    """Dotted path of the parameter that names the model, for messages."""
    pretrained: str
    revision: str | None

    @property
    def folder(self) -> Path | None:
        """The folder; None for a model of the hub."""
        path = Path(self.pretrained)
        return path if path.exists() else None

    def error(self, problem: str) -> ConfigError:
        """Return the error of this model."""
        return ConfigError(f"{self.parameter}: {self.pretrained} {problem}")

    def read(self, name: str) -> Mapping[str, Any] | None:
        """Return the content of a JSON file; None if there is no such file."""
        path = self._download(name) if self.folder is None else self.folder / name
        if path is None or not path.is_file():
            return None
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except (ValueError, RecursionError) as error:
            raise self.error(f"holds a {name} that is no JSON ({error}); restore the file") from error
        if not isinstance(content, dict):
            raise self.error(f"holds a {name} that is no JSON object; restore the file")
        return content

    def _download(self, name: str) -> Path | None:
        """Get one file of the cache of the hub, or of the hub: a model does not change its kind."""
        from huggingface_hub import errors as hub
        from huggingface_hub import hf_hub_download

        try:
            with contextlib.suppress(hub.LocalEntryNotFoundError):
                return Path(hf_hub_download(self.pretrained, name, revision=self.revision, local_files_only=True))
            return Path(hf_hub_download(self.pretrained, name, revision=self.revision))
        except hub.GatedRepoError as error:
            raise self.error(
                "is a gated model of the hub; accept its terms on its page, and set HF_TOKEN to a token of that account"
            ) from error
        except hub.RepositoryNotFoundError as error:
            raise self.error(
                "is neither a folder here nor a model of the hub; correct the name, or set HF_TOKEN if it is private"
            ) from error
        except hub.RevisionNotFoundError as error:
            raise self.error(f"has no revision {self.revision} on the hub; correct {self._revision_name}") from error
        except hub.HFValidationError as error:
            raise self.error("is neither a folder here nor a name that a model of the hub could have") from error
        except (hub.LocalEntryNotFoundError, OSError) as error:
            if isinstance(error, hub.EntryNotFoundError) and not isinstance(error, hub.LocalEntryNotFoundError):
                return None
            raise SfgrpoError(
                f"{self.parameter}: {self.pretrained} is not in the cache of the hub, and the hub cannot be reached; "
                "check the network and HTTPS_PROXY, and unset HF_HUB_OFFLINE, or download it on another machine"
            ) from error

    @property
    def _revision_name(self) -> str:
        return self.parameter.replace("pretrained", "revision")


def check_base_model(config: PolicyConfig) -> str:
    """Check the kind, the components and the resolution of the base model; return what it is.

    Raises:
        ConfigError: It is no model of a supported kind, lacks a part, or cannot draw images of this size.
        SfgrpoError: The hub cannot be reached.
    """
    files = ModelFiles(parameter="policy.pretrained", pretrained=config.pretrained, revision=config.revision)
    if files.folder is None and config.revision is None:
        raise files.error(
            f"is no folder with a {INDEX}; `git checkout` restores the shipped one, and a model of the hub needs its "
            "policy.revision"
        )
    index = files.read(INDEX)
    if index is None:
        raise files.error(f"{_what_it_is_instead(files)}; {SUPPORTED}")
    if (name := index.get("_class_name")) != PIPELINE:
        raise files.error(f"is a {name or 'pipeline without a class'}; {SUPPORTED}")
    _check_components(files, index, uses_t5=config.max_sequence_length > 0)
    _check_resolution(files, config.resolution)
    return f"{config.pretrained} is a {PIPELINE}"


def check_reward_model(config: RewardConfig, section: str = "reward") -> str:
    """Check that the model behind a reward, if it has one, is a CLIP; return what it is.

    Raises:
        ConfigError: It is another kind of model, or lacks a part.
        SfgrpoError: The hub cannot be reached.
    """
    if config.pretrained is None:
        return f"{config.name} needs no model"
    files = ModelFiles(parameter=f"{section}.pretrained", pretrained=config.pretrained, revision=config.revision)
    if files.folder is None and config.revision is None:
        raise files.error(
            f"is no folder with a {CONFIG}; `git checkout` restores the shipped one, and a hub model needs "
            f"{section}.revision"
        )
    settings = files.read(CONFIG)
    if settings is None:
        raise files.error(f"{_what_it_is_instead(files)}; a CLIP of transformers is supported, as a folder")
    if (kind := settings.get("model_type")) != "clip":
        raise files.error(f"is a model of type {kind!r}; a CLIP of transformers, whose type is 'clip', is supported")
    if files.folder is not None:
        _check_weights(files, files.folder, "the model")
    return f"{config.pretrained} is a CLIP"


def _check_components(files: ModelFiles, index: Mapping[str, Any], *, uses_t5: bool) -> None:
    """Refuse an index, or a folder, that lacks a component or has one of another class."""
    wanted = COMPONENTS | (T5_COMPONENTS if uses_t5 else {})
    for component, class_name in wanted.items():
        entry = index.get(component)
        found = entry[1] if isinstance(entry, list) and len(entry) == 2 else None
        if found is None and component in T5_COMPONENTS:
            raise files.error(f"has no {component}, the T5 encoder; set policy.max_sequence_length to 0")
        if not str(found).removesuffix("Fast") == class_name:
            raise files.error(f"has a {component} of class {found} in its {INDEX}, where {class_name} is supported")
        if files.folder is None:
            continue
        part = files.folder / component
        if not part.is_dir() or not any(part.iterdir()):
            raise files.error(f"lacks the folder {component} that its {INDEX} names; restore it")
        if component in WITH_WEIGHTS:
            _check_weights(files, part, component)


def _check_weights(files: ModelFiles, folder: Path, part: str) -> None:
    """Refuse a component without weights in safetensors, or with only some of their files."""
    weights = sorted(path.name for path in folder.glob("*.safetensors"))
    if not weights:
        pickled = any(path.suffix in (".bin", ".pt", ".pth", ".ckpt") for path in folder.iterdir())
        reason = (
            "has its weights in pickles, which can run programs and are never read" if pickled else "has no weights"
        )
        raise files.error(f"is incomplete: {part} {reason}; get it with *.safetensors")
    for listing in folder.glob("*.safetensors.index.json"):
        named = (files.read(str(listing.relative_to(files.folder or folder))) or {}).get("weight_map", {})
        if absent := sorted(set(named.values()) - set(weights)):
            raise files.error(f"is incomplete: {part} lacks {absent[0]}; download it again")
    if empty := [name for name in weights if (folder / name).stat().st_size < 8]:
        raise files.error(f"is incomplete: {part} has an empty {empty[0]}; download it again, or run `git lfs pull`")


def _check_resolution(files: ModelFiles, resolution: int) -> None:
    """Refuse a size of images that the autoencoder cannot make or for which the transformer has no positions."""
    vae, transformer = files.read(f"vae/{CONFIG}") or {}, files.read(f"transformer/{CONFIG}") or {}
    try:
        patch = int(transformer["patch_size"])
        factor = 2 ** (len(vae["block_out_channels"]) - 1) * patch
        largest = factor * int(transformer["pos_embed_max_size"])
    except (KeyError, TypeError, ValueError) as error:
        raise files.error(f"has a {CONFIG} of vae or transformer without {error}; restore the file") from error
    if resolution % factor:
        nearest = sorted({max(factor, resolution // factor * factor), -(-resolution // factor) * factor})
        raise ConfigError(
            f"policy.resolution {resolution} is not a multiple of {factor} (VAE factor times patch size); use "
            f"{' or '.join(map(str, nearest))}"
        )
    if resolution > largest:
        raise ConfigError(
            f"policy.resolution {resolution} is more than the {largest} pixels for which the transformer of "
            f"{files.pretrained} has positions; use {largest} or less"
        )


def _what_it_is_instead(files: ModelFiles) -> str:
    """Describe what is there in place of a pipeline or of a model."""
    folder = files.folder
    if folder is None:
        return f"is a model of the hub without the file that says its kind, {INDEX} or {CONFIG}"
    if folder.is_file():
        return "is a file, perhaps a checkpoint of all weights in one, and no folder"
    if not any(folder.iterdir()):
        return "is an empty folder"
    if (folder / INDEX).exists():
        return f"is a pipeline, {(files.read(INDEX) or {}).get('_class_name')}"
    settings = (files.read(CONFIG) if (folder / CONFIG).is_file() else None) or {}
    if name := settings.get("_class_name") or settings.get("model_type"):
        return f"is a single {name} and no pipeline"
    if any(folder.glob("*.safetensors")) or any(folder.glob("*.ckpt")):
        return "is a folder of weights without a description of them"
    return f"is a folder without {INDEX} or {CONFIG}"
