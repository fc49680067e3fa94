"""What the files of a version may hold: weights, text and pictures, and no code but the serving code of this project.

A manifest proves that files are those that were registered, and not who registered them: whoever may write to the
artifact store and to the database can register a version of his own. Therefore everything by which MLflow, diffusers or
transformers would run other code than this project's is refused, whatever the manifest says.
"""

from __future__ import annotations

import json
import re
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from sfgrpo.runtime.manifest import sha256_of_file
from sfgrpo.tracking.delivery import first_line

MODEL_FILE = "MLmodel"
SERVING = "serving.py"
ADAPTER_FILE = "pytorch_lora_weights.safetensors"
SHIPPED_SERVING: Mapping[str, str] = {
    "f171159c042ef893fc6b3f05b3d83cb4ce438621030ed6ed700c1cff7c05809e": "the first with a manifest",
    "c411daf52afc1fa7b3907bfff9fc69a2048d40b83b98c42ebbca89c7028915ce": "other comments",
    "4c0fdddcc5d594176dd004f4b0618e8089498d198ca53b0e92e941078214e8d4": "other type comments",
    "b79db92a536d2262776e25871bfca587ef0b60a63f585c051a1bb71f721be547": "limits of a request; all files are verified",
}
"""SHA-256 of every serving code that this project has registered versions with. A new one is added, and none removed
but to withdraw the versions that have it."""
PLAIN_SUFFIXES = frozenset({".json", ".md", ".png", ".safetensors", ".txt", ".yaml"})
PLAIN_NAMES = frozenset({MODEL_FILE, "LICENSE", ".gitattributes", "spiece.model"})
FLAVOR = "python_function"
LOADER = "mlflow.pyfunc.loaders.code_model"
FLAVOR_KEYS = frozenset(
    {
        "artifacts",
        "cloudpickle_version",
        "code",
        "config",
        "env",
        "loader_module",
        "model_code_path",
        "python_version",
        "streamable",
    }
)
DTYPES = ("float32", "bfloat16", "float16")
HUB_NAME = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")
COMPONENT_LIBRARIES = (None, "diffusers", "transformers")
"""Where the classes of a pipeline may come from; diffusers would import any module that `model_index.json` names."""
CODE_KEYS = ("auto_map", "custom_pipelines", "attn_implementation", "_attn_implementation")
"""Keys of configurations by which transformers and diffusers look for code in a file or on the hub."""


class ForeignContentError(ValueError):
    """A version holds something by which code would run that is not this project's, or that is no plain data."""


def read_model_file(folder: Path) -> dict[str, Any]:
    """Check all files of a version and return what its MLmodel says on loading it: `artifacts` and `config`.

    Raises:
        ForeignContentError: A file is no plain data or serving code that this project has shipped, or some
            configuration names other code; the message is about one file, by its relative name.
    """
    for path in sorted(folder.rglob("*")):
        _check_file(path, path.relative_to(folder).as_posix())
    flavor = _flavor_of(folder / MODEL_FILE)
    _check_flavor(flavor)
    for entry in flavor["artifacts"].values():
        if not (folder / entry["path"]).is_dir():
            raise ForeignContentError(f"{MODEL_FILE} names {entry['path']}, which does not exist")
    return flavor


def _check_file(path: Path, name: str) -> None:
    mode = path.lstat().st_mode
    if stat.S_ISDIR(mode):
        return
    if not stat.S_ISREG(mode):
        raise ForeignContentError(f"{name} is a link or no regular file")
    if name == SERVING:
        if (found := sha256_of_file(path)) not in SHIPPED_SERVING:
            raise ForeignContentError(f"{name} is code that this project has never shipped (sha256 {found})")
    elif path.suffix not in PLAIN_SUFFIXES and path.name not in PLAIN_NAMES:
        raise ForeignContentError(
            f"holds {name}; a version may hold safetensors, text, JSON and PNG files only, and {SERVING}"
        )
    elif path.suffix == ".json":
        for problem in _code_in_json(path):
            raise ForeignContentError(f"{name} {problem}")


def _code_in_json(path: Path) -> Iterator[str]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        # Whoever reads it will say so.
        return
    if not isinstance(content, dict):
        return
    for key in CODE_KEYS:
        if content.get(key) is not None:
            yield f"has {key}, by which other code would be loaded"
    if path.name == "model_index.json":
        for component, place in content.items():
            if isinstance(place, list) and (len(place) != 2 or place[0] not in COMPONENT_LIBRARIES):
                yield f"takes {component} from {place!r}, and a pipeline takes its parts from diffusers or transformers"


def _flavor_of(path: Path) -> dict[str, Any]:
    """Return the only flavor of an MLmodel file."""
    try:
        content = YAML(typ="safe", pure=True).load(path.read_text(encoding="utf-8"))
        flavors = content["flavors"]
        flavor = dict(flavors[FLAVOR])
    except (OSError, UnicodeDecodeError, YAMLError, KeyError, TypeError, ValueError) as error:
        raise ForeignContentError(f"{MODEL_FILE} describes no {FLAVOR} ({first_line(error)})") from error
    if list(flavors) != [FLAVOR]:
        raise ForeignContentError(f"{MODEL_FILE} has the flavors {', '.join(map(str, flavors))} instead of {FLAVOR}")
    return flavor


def _check_flavor(flavor: Mapping[str, Any]) -> None:
    """Raise unless MLflow would load the serving code with artifacts of the version, and nothing else."""
    if unknown := sorted(flavor.keys() - FLAVOR_KEYS):
        raise ForeignContentError(f"{MODEL_FILE} has {', '.join(unknown)}, by which other code might be loaded")
    code = PurePosixPath(str(flavor.get("model_code_path", "")).replace("\\", "/")).name
    for name, found, wanted in (
        ("loader_module", flavor.get("loader_module"), LOADER),
        ("model_code_path", code, SERVING),
        ("code", flavor.get("code"), None),
    ):
        if found != wanted:
            raise ForeignContentError(f"{MODEL_FILE} has {name} {found!r} instead of {wanted!r}")
    artifacts, config = flavor.get("artifacts"), flavor.get("config")
    if not isinstance(artifacts, dict) or not {"adapter"} <= artifacts.keys() <= {"adapter", "pipeline"}:
        raise ForeignContentError(f"{MODEL_FILE} has artifacts {artifacts!r} instead of adapter and pipeline")
    for entry in artifacts.values():
        path = PurePosixPath(str(entry.get("path")) if isinstance(entry, dict) else "/")
        if path.parts[:1] != ("artifacts",) or len(path.parts) < 2 or ".." in path.parts:
            raise ForeignContentError(f"{MODEL_FILE} takes files from {path}, which is not below artifacts")
    if not isinstance(config, dict):
        raise ForeignContentError(f"{MODEL_FILE} has no config")
    _check_config(config, has_pipeline="pipeline" in artifacts)


def _check_config(config: Mapping[str, Any], *, has_pipeline: bool) -> None:
    if config.get("adapter_file") != ADAPTER_FILE:
        raise ForeignContentError(f"{MODEL_FILE} has adapter_file {config.get('adapter_file')!r}, not {ADAPTER_FILE}")
    if config.get("dtype") not in DTYPES:
        raise ForeignContentError(f"{MODEL_FILE} has dtype {config.get('dtype')!r}, which is none of {DTYPES}")
    if not has_pipeline and not HUB_NAME.fullmatch(str(config.get("pretrained"))):
        raise ForeignContentError(
            f"{MODEL_FILE} takes the base model from {config.get('pretrained')!r}, which is no name on the hub"
        )
