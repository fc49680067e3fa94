"""Copy a registered version to a folder, for programs that load models without verifying them."""

from __future__ import annotations

from pathlib import Path

from sfgrpo.errors import ConfigError
from sfgrpo.registry.package import download_version
from sfgrpo.registry.register import connect_globally
from sfgrpo.registry.versions import find_version
from sfgrpo.runtime.environment import Environment
from sfgrpo.runtime.files import atomic_directory


def download(environment: Environment, address: str, out: Path) -> None:
    """Copy a version to the new folder `out`, which appears only if every file is what was registered.

    Raises:
        ConfigError: `out` exists already.
        RegistryError: There is no such version, or it is not what was registered.
    """
    if out.exists():
        raise ConfigError(f"--out {out} exists already; give the name of a new folder")
    version = find_version(connect_globally(environment.tracking_uri), address)
    with atomic_directory(out) as partial:
        download_version(version, partial)
    print(f"{out} is version {version.number} of {version.model}, as it was registered")
