"""Write the training, validation and evaluation prompts."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path

from sfgrpo.config.stages import PromptsStage
from sfgrpo.errors import ConfigError
from sfgrpo.paths import EVALUATION_PROMPTS, PROMPTS, TRAINING_PROMPTS, VALIDATION_PROMPTS
from sfgrpo.prompt_checks import check_prompts
from sfgrpo.prompts import PromptFile, make_prompts, to_lines
from sfgrpo.runtime.environment import Environment
from sfgrpo.runtime.files import atomic_directory
from sfgrpo.runtime.manifest import MANIFEST, manifest_digests, sha256_of_file, write_manifest
from sfgrpo.types import Prompt


def prompts(config: PromptsStage, _: Environment) -> None:
    """Write training, validation and evaluation prompts, with a manifest by which the next call knows what is its own.

    Raises:
        ConfigError: the folder holds what a person has written or edited.
    """
    split = make_prompts(config)
    check_prompts(
        _file(EVALUATION_PROMPTS, split.evaluation),
        (),
        validation=_file(VALIDATION_PROMPTS, split.validation),
        training=_file(TRAINING_PROMPTS, split.training),
    )
    wanted = {
        TRAINING_PROMPTS.name: to_lines(split.training),
        VALIDATION_PROMPTS.name: to_lines(split.validation),
        EVALUATION_PROMPTS.name: to_lines(split.evaluation),
    }
    require_own(PROMPTS, wanted)
    with atomic_directory(PROMPTS) as partial:
        for name, text in wanted.items():
            (partial / name).write_text(text, encoding="utf-8")
        write_manifest(partial)
    unique = len({prompt.text for prompt in split.training})
    print(
        f"{len(split.training)} training prompts ({unique} unique), {len(split.validation)} validation prompts and "
        f"{len(split.evaluation)} evaluation prompts in {PROMPTS}"
    )


def _file(path: Path, prompts: Sequence[Prompt]) -> PromptFile:
    return PromptFile(path=path, prompts=prompts, lines=range(1, len(prompts) + 1))


def require_own(folder: Path, wanted: Mapping[str, str]) -> None:
    """Refuse to replace a folder in which anything is neither as its manifest says nor as it is going to be.

    What is missing may be written anew: only what is there can be lost.
    """
    if not folder.is_dir():
        if folder.exists() or folder.is_symlink():
            raise ConfigError(f"{folder}: is no folder, and the prompts need one of that name; move it away")
        return
    digests = {name: {hashlib.sha256(text.encode()).hexdigest()} for name, text in wanted.items()}
    for name, digest in _recorded(folder).items():
        digests.setdefault(name, set()).add(digest)
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_dir() or name == MANIFEST:
            continue
        if name not in digests or _digest(path) not in digests[name]:
            change = "was edited after" if name in digests else "was not written by"
            raise ConfigError(
                f"{path}: {change} `python -m sfgrpo prompts`, which would delete it; to train with it, "
                f"give it to DVC by `dvc commit --force prompts`, or to have prompts drawn anew, move {folder} away"
            )


def _digest(path: Path) -> str | None:
    """Return the SHA-256 of a file; None if it cannot be read, or is a pipe that might never end."""
    try:
        return sha256_of_file(path) if path.is_file() else None
    except OSError:
        return None


def _recorded(folder: Path) -> dict[str, str]:
    """Return the digests of the manifest; none if it is absent or damaged."""
    try:
        return manifest_digests(folder)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}
