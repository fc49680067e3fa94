"""The file of an adapter: what it says about itself, and whether its weights can be used."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from sfgrpo.errors import AdapterError

WEIGHTS_NAME = "pytorch_lora_weights.safetensors"
METADATA_KEY = "lora_adapter_metadata"
"""Key of the file's metadata, by diffusers."""
PREFIX = "transformer."
"""Start of every key and every tensor's name, by diffusers: the component that is adapted."""
TRAIN_AGAIN = "`python -m sfgrpo train` writes an intact one"
MATRIX = re.compile(rf"{re.escape(PREFIX)}(?P<layer>.+)\.lora_(?P<side>[AB])\.weight")
PLAIN_LORA: Mapping[str, Any] = {
    "alpha_pattern": {},
    "rank_pattern": {},
    "bias": "none",
    "lora_bias": False,
    "use_dora": False,
    "use_rslora": False,
    "modules_to_save": None,
    "layers_to_transform": None,
    "exclude_modules": None,
    "fan_in_fan_out": False,
}
"""peft's settings that change what the weights mean, with the only values that policies know."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Base:
    """The pipeline that an adapter belongs to."""

    name: str
    """Folder or hub name."""
    revision: str
    """What never means another pipeline: the commit on the hub, or `sha256:` and the digest of a folder's files."""

    @property
    def is_folder(self) -> bool:
        """Whether it was read from a folder and not from the hub."""
        return self.revision.startswith("sha256:")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Adapter:
    """The content of an adapter's file."""

    path: Path
    sha256: str
    """Of the file."""
    rank: int
    alpha: int
    targets: tuple[str, ...]
    """Suffixes of the names of the adapted layers, sorted."""
    base: Base | None
    """None where the file names none, as those of other programs."""
    weights: Mapping[str, Tensor] = dataclasses.field(repr=False)

    @property
    def changes_nothing(self) -> bool:
        """Whether the product B A is 0 in every layer, as before the first update."""
        pairs = ((name, name.replace(".lora_B.", ".lora_A.")) for name in self.weights if ".lora_B." in name)
        # Column i of B meets row i of A alone.
        return not any(bool((self.weights[b].any(dim=0) & self.weights[a].any(dim=1)).any()) for b, a in pairs)


def read_adapter(folder: Path, cure: str = TRAIN_AGAIN) -> Adapter:
    """Read the adapter in a folder, once: digest, settings and weights are those of the same bytes.

    Args:
        folder: Holds the file that diffusers names `pytorch_lora_weights.safetensors`.
        cure: What to do about an unusable file; ends the error's message.

    Raises:
        AdapterError: The file is absent, truncated or none of safetensors, does not say what adapter it is, or has
            weights that do not fit what it says or are not finite.
    """
    path = folder / WEIGHTS_NAME
    try:
        content = _content_of(path)
        settings = _settings_of(_header_of(content))
        weights = _weights_of(content)
        rank, alpha, targets = _shape_of(settings)
        _require_fit(weights, rank, targets)
        _require_finite(weights)
    except ValueError as error:
        raise AdapterError(f"{path} {error}; {cure}") from error
    return Adapter(
        path=path,
        sha256=hashlib.sha256(content).hexdigest(),
        rank=rank,
        alpha=alpha,
        targets=targets,
        base=_base_of(settings),
        weights=weights,
    )


def read_effective_adapter(folder: Path, cure: str = TRAIN_AGAIN) -> Adapter:
    """Read an adapter as `read_adapter` does; raise `AdapterError` if it changes nothing, too."""
    adapter = read_adapter(folder, cure)
    if adapter.changes_nothing:
        raise AdapterError(f"{adapter.path} changes nothing, for its product B A is 0 in every layer; {cure}")
    return adapter


def require_base(adapter: Adapter, base: Base | None) -> None:
    """Raise `AdapterError` if an adapter names another base model than `base`; where one is unknown, accept it."""
    trained_on = adapter.base
    if trained_on is not None and base is not None and trained_on.revision != base.revision:
        raise AdapterError(
            f"{adapter.path} was trained on {trained_on.name} ({trained_on.revision}) and the base model is "
            f"{base.name} ({base.revision}); set policy.pretrained to the former, or train again"
        )


def _content_of(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise ValueError("does not exist") from None
    except OSError as error:
        raise ValueError(f"cannot be read ({error.strerror})") from error


def _header_of(content: bytes) -> dict[str, Any]:
    """Read the header of a safetensors file: 8 bytes of its length, and JSON; refuse a file that is cut short."""
    size = int.from_bytes(content[:8], "little")
    if len(content) < 8 or (content[8:9] == b"{" and 8 + size > len(content)):
        raise ValueError(f"is truncated: it has {len(content)} bytes, and its header needs {8 + max(size, 1)}")
    try:
        header = json.loads(content[8 : 8 + size])
        tensors = {name: entry for name, entry in header.items() if name != "__metadata__"}
        end = 8 + size + max((entry["data_offsets"][1] for entry in tensors.values()), default=0)
    except (ValueError, KeyError, IndexError, TypeError, AttributeError):
        raise ValueError("is not a safetensors file") from None
    if len(content) < end:
        raise ValueError(f"is truncated: it has {len(content)} of {end} bytes")
    return dict(header)


def _settings_of(header: Mapping[str, Any]) -> dict[str, Any]:
    """Return peft's settings of the adapter, without their prefix."""
    try:
        stored = json.loads(header["__metadata__"][METADATA_KEY])
        settings = {key.removeprefix(PREFIX): value for key, value in stored.items() if key.startswith(PREFIX)}
    except (KeyError, TypeError, ValueError, AttributeError):
        raise ValueError(f"has no metadata {METADATA_KEY}, so its rank and alpha are unknown") from None
    for name, plain in PLAIN_LORA.items():
        if (found := settings.get(name, plain)) not in (plain, None):
            raise ValueError(f"is no plain LoRA: its {name} is {found!r}, where policies know only {plain!r}")
    return settings


def _shape_of(settings: Mapping[str, Any]) -> tuple[int, int, tuple[str, ...]]:
    targets = settings.get("target_modules")
    if not isinstance(targets, list) or not targets or not all(isinstance(target, str) for target in targets):
        raise ValueError(f"has unusable metadata: target_modules is {targets!r} instead of a list of layers")
    return _positive(settings, "r"), _positive(settings, "lora_alpha"), tuple(sorted(targets))


def _positive(settings: Mapping[str, Any], name: str) -> int:
    value = settings.get(name)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"has unusable metadata: {name} is {value!r} instead of a positive integer")
    return value


def _base_of(settings: Mapping[str, Any]) -> Base | None:
    name, revision = settings.get("base_model_name_or_path"), settings.get("revision")
    if not isinstance(name, str) or not isinstance(revision, str):
        return None
    return Base(name=name, revision=revision)


def _weights_of(content: bytes) -> dict[str, Tensor]:
    try:
        return safetensors.torch.load(content)
    except SafetensorError as error:
        raise ValueError(f"is not a safetensors file ({error})") from error


def _require_fit(weights: Mapping[str, Tensor], rank: int, targets: tuple[str, ...]) -> None:
    """Raise unless every tensor is a matrix of a target, both of its pair are there, and no target lacks any."""
    used: set[str] = set()
    for name, weight in weights.items():
        parts = MATRIX.fullmatch(name)
        matching = [target for target in targets if parts and f".{parts['layer']}".endswith(f".{target}")]
        if parts is None or not matching:
            raise ValueError(f"has the tensor {name}, which its targets {', '.join(targets)} do not explain")
        # A is [rank, inputs] and B is [outputs, rank].
        rank_axis, other_side = (0, "B") if parts["side"] == "A" else (1, "A")
        if weight.ndim != 2 or weight.shape[rank_axis] != rank:
            raise ValueError(f"has the tensor {name} of shape {list(weight.shape)}, which is not of its rank {rank}")
        other = f"{PREFIX}{parts['layer']}.lora_{other_side}.weight"
        if other not in weights:
            raise ValueError(f"has the tensor {name} and lacks {other}")
        used.update(matching)
    if absent := [target for target in targets if target not in used]:
        raise ValueError(f"has no weights for its targets {', '.join(absent)}")


def _require_finite(weights: Mapping[str, Tensor]) -> None:
    if broken := [name for name, weight in weights.items() if not bool(torch.isfinite(weight).all())]:
        raise ValueError(f"has NaN or infinite weights in {len(broken)} of {len(weights)} tensors, first {broken[0]}")
