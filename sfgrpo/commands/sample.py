"""Draw one image with a registered version."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sfgrpo.errors import ConfigError
from sfgrpo.factory import use_threads
from sfgrpo.registry.drawing import draw
from sfgrpo.registry.package import verified_copy
from sfgrpo.registry.register import connect_globally
from sfgrpo.registry.versions import find_version
from sfgrpo.runtime.environment import Environment
from sfgrpo.runtime.files import atomic_write


def sample(environment: Environment, address: str, prompt: str, out: Path, params: dict[str, Any]) -> None:
    """Draw one image with a registered version, after its files are verified, and print where it is.

    Raises:
        ConfigError: The prompt is empty, `out` is no PNG file, or the version's limits refuse prompt or parameters.
        RegistryError: There is no such version, or it is not what was registered.
    """
    if not prompt.strip():
        raise ConfigError("the prompt is empty; give the text to draw, in quotes")
    if out.suffix != ".png":
        raise ConfigError(f"--out {out} is no PNG file; give a name that ends in .png")
    client = connect_globally(environment.tracking_uri)
    use_threads(environment)
    version = find_version(client, address)
    with verified_copy(version, environment.scratch_dir) as package:
        (image,) = draw(package, [prompt], **params)
    atomic_write(out, image)
    print(f"{out} by version {version.number} of {version.model}")
