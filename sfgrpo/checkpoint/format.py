"""The version of the files of a run."""

from __future__ import annotations

from pathlib import Path

from sfgrpo.errors import ConfigError

FORMAT = 1
"""Version of the files of checkpoints and snapshots; raise it when an older reader would misread them."""


def require_format(found: object, path: Path) -> None:
    """Raise `ConfigError` unless a file says that it has the format that this version reads."""
    if found != FORMAT:
        raise ConfigError(
            f"{path} has format {found or 'none'}, and this version of sfgrpo reads format {FORMAT} only; go on with "
            "the version that wrote it, or move the run's folder away to start anew"
        )
