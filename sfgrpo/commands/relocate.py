"""Correct the addresses of artifacts after the folder of a SQLite store was moved."""

from __future__ import annotations

from sfgrpo.config.addresses import sqlite_path
from sfgrpo.errors import ConfigError
from sfgrpo.runtime.environment import Environment
from sfgrpo.tracking.moved import artifact_root, relocate


def relocate_store(environment: Environment) -> None:
    """Make all records of the SQLite store name the artifacts beside it, and print how many have changed.

    Raises:
        ConfigError: The store is no file, or the artifacts are not beside it.
    """
    database = sqlite_path(environment.tracking_uri)
    if database is None or not database.is_file():
        raise ConfigError(
            f"MLFLOW_TRACKING_URI: {environment.tracking_uri} is no file of this machine; a server keeps no addresses "
            "that a move of this folder could change"
        )
    changed = relocate(database)
    print(f"{changed} records of {database} name {artifact_root(database)} now" if changed else "nothing has moved")
