"""Draw one image with a registered version."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sfgrpo.errors import ConfigError
from sfgrpo.factory import use_threads
from sfgrpo.registry.register import connect_globally, draw
from sfgrpo.registry.versions import download_version, find_version
from sfgrpo.runtime.environment import Environment
from sfgrpo.runtime.files import atomic_write, temporary_directory


def sample(environment: Environment, address: str, prompt: str, out: Path, params: dict[str, Any]) -> None:
    """Draws one image by a registered version, whose files are checked first, and prints where it is.

    Raises:
        ConfigError: the prompt is empty, or `out` is no PNG file.
        RegistryError: there is no such version, or it is not what was registered.
    """
    if not prompt.strip():
        raise ConfigError("the prompt is empty; say what is to be drawn, in quotes")
    if out.suffix != ".png":
        raise ConfigError(f"--out {out} is no PNG file; give a name that ends in .png")
    client = connect_globally(environment.tracking_uri)
    use_threads(environment)
    version = find_version(client, address)
    with temporary_directory(environment.scratch_dir, "sample") as folder:
        package = download_version(version, folder)
        (image,) = draw(environment.tracking_uri, str(package.folder), [prompt], **params)
    atomic_write(out, image)
    print(f"{out} by version {version.number} of {version.model}")
