"""Parameter overrides of a run: set by dotted name, and checked as the stages will check them."""

from __future__ import annotations

import io
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePath
from typing import Any

from ruamel.yaml import YAML

from sfgrpo.config.batching import BatchArithmetic
from sfgrpo.config.stages import STAGES, LaunchStage, Stage, TrainStage, load_config, to_flat_dict
from sfgrpo.errors import ConfigError
from sfgrpo.paths import PARAMS

_ABSENT = object()
OF_THE_COMMIT = ("extends", "registry", "serving", "promotion")
"""What a run may not override: other files of the machine, where it is registered, limits, and its gates."""
MODEL = "pretrained"
"""Name of the parameters that are the folder or hub name of a model."""


def changed_parameters(text: str, changes: Mapping[str, Any]) -> str:
    """Set values in the text of a parameter file by dotted name, such as `update.num_updates`; keep its comments.

    An override that equals the present value, or the default of an absent one, changes nothing.

    Raises:
        ConfigError: an override is not a run's to make, a name has a value where a section should be, or a stage would
            refuse the file.
    """
    for name, value in changes.items():
        _refuse_foreign(name, value)
    present = _checked(text)
    changed = {name: value for name, value in changes.items() if present.get(name, _ABSENT) != value}
    if not changed:
        return text
    yaml = YAML()
    yaml.width = 4096
    parameters = yaml.load(text)
    for name, value in changed.items():
        _set(parameters, name, value)
    stream = io.StringIO()
    yaml.dump(parameters, stream)
    _checked(stream.getvalue())
    return stream.getvalue()


def _refuse_foreign(name: str, value: Any) -> None:
    """Raise `ConfigError` for a parameter that no run may override, or a model from outside the checkout."""
    first, *_ = name.split(".")
    if first.strip() in OF_THE_COMMIT:
        raise ConfigError(
            f"{PARAMS}: {name}: no run may override {', '.join(OF_THE_COMMIT)}; commit a {PARAMS} with the new value"
        )
    if isinstance(value, Mapping):
        for key, inner in value.items():
            _refuse_foreign(f"{name}.{key}", inner)
    elif name.split(".")[-1] == MODEL and isinstance(value, str):
        path = PurePath(value)
        if path.is_absolute() or ".." in path.parts or value.startswith("~"):
            raise ConfigError(
                f"{PARAMS}: {name}: {value!r} is outside of the checkout; give a folder in it or a hub name, or commit "
                f"a {PARAMS} with this path"
            )


def _set(parameters: Any, name: str, value: Any) -> None:
    *sections, last = name.split(".")
    place = parameters
    for section in sections:
        place = place.setdefault(section, {})
        if not isinstance(place, dict):
            raise ConfigError(
                f"{PARAMS}: {name}: {section} is a value and no section; `python -m sfgrpo show` lists all"
            )
    place[last] = value


def check_parameters(path: Path, stages: Sequence[type[Stage]] = STAGES) -> dict[str, Any]:
    """Load the parameters of the stages, and check the batch arithmetic of a training; return the values by name."""
    flat = {name: value for stage in stages for name, value in to_flat_dict(load_config(stage, path)).items()}
    if TrainStage in stages:
        launch = load_config(LaunchStage, path).launch
        BatchArithmetic(config=load_config(TrainStage, path), num_processes=launch.world_size)
    return flat


def _checked(text: str) -> dict[str, Any]:
    """Do the same with the text of a parameter file."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, PARAMS)
        path.write_text(text, encoding="utf-8")
        try:
            return check_parameters(path)
        except ConfigError as error:
            raise ConfigError(str(error).replace(str(path), PARAMS)) from error
