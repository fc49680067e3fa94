"""Stores whose folder was moved: MLflow records absolute addresses of artifacts beside its database."""

from __future__ import annotations

import contextlib
import os
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import unquote, urlsplit

from sfgrpo.errors import ConfigError

ARTIFACTS = "mlartifacts"
"""Folder beside a SQLite store that holds the files of its runs and models."""
ADDRESSES = (
    ("experiments", "artifact_location"),
    ("runs", "artifact_uri"),
    ("logged_models", "artifact_location"),
    ("model_versions", "source"),
    ("model_versions", "storage_location"),
)
"""Columns of MLflow's database that hold such addresses."""
OF_THIS_STORE = (ARTIFACTS, "mlruns")
"""Folders beside the database; the second one is that of MLflow's own default experiment."""


def artifact_root(database: Path) -> Path:
    """Return the folder of the artifacts of a SQLite store."""
    return database.resolve().parent / ARTIFACTS


def moved_roots(connection: sqlite3.Connection, database: Path) -> list[Path]:
    """Return the folders that experiments of this project name for their artifacts, other than the one beside it."""
    here = artifact_root(database)
    recorded = [location for (location,) in connection.execute("SELECT DISTINCT artifact_location FROM experiments")]
    paths = {path for path in map(_local_path, recorded) if path is not None and path.name == ARTIFACTS}
    return [path for path in sorted(paths) if path != here and not _same(path, here)]


def relocate(database: Path) -> int:
    """Make all records name the folder beside the database, in one transaction; return how many changed.

    Raises:
        ConfigError: Files of the models are not in that folder, so that the records would be wrong afterwards too.
    """
    with contextlib.closing(sqlite3.connect(database, timeout=30.0, isolation_level=None)) as connection:
        connection.execute("BEGIN IMMEDIATE")
        roots = moved_roots(connection, database)
        if absent := list(_absent_models(connection, roots, database)):
            raise ConfigError(
                f"{artifact_root(database)} lacks the files of {len(absent)} models, such as {absent[0]}; move or copy "
                f"the folder {roots[0]} beside {database} first"
            )
        changed = sum(
            _replace(connection, table, column, root.parent, database.resolve().parent)
            for root in roots
            for table, column in ADDRESSES
        )
        connection.execute("COMMIT")
    return changed


def _absent_models(connection: sqlite3.Connection, roots: list[Path], database: Path) -> Iterator[Path]:
    """Yield the folders of models, as they will be recorded, that do not exist, though there are files elsewhere."""
    here = artifact_root(database)
    for (location,) in connection.execute("SELECT artifact_location FROM logged_models"):
        path = _local_path(location)
        for root in roots:
            if path is not None and path.is_relative_to(root):
                moved = here / path.relative_to(root)
                if not moved.exists() and (path.exists() or not here.exists()):
                    yield moved


def _replace(connection: sqlite3.Connection, table: str, column: str, old: Path, new: Path) -> int:
    """Replace the start of all addresses of a column that lie below the folder of a store; return how many."""
    changed = 0
    for name in OF_THIS_STORE:
        for before, after in (
            ((old / name).as_uri(), (new / name).as_uri()),
            (str(old / name), str(new / name)),
        ):
            changed += connection.execute(
                f"UPDATE {table} SET {column} = :after || substr({column}, length(:before) + 1) "
                f"WHERE {column} = :before OR substr({column}, 1, length(:before) + 1) = :before || '/'",
                {"before": before, "after": after},
            ).rowcount
    return changed


def _local_path(address: str | None) -> Path | None:
    """Return the path of a `file:` address or of a plain path; None for anything else."""
    if address is None:
        return None
    parts = urlsplit(address)
    if parts.scheme == "file":
        return Path(unquote(parts.path))
    return Path(address) if address.startswith(os.sep) else None


def _same(first: Path, second: Path) -> bool:
    """Return whether two paths lead to one folder, as through a link or a mount."""
    try:
        return first.samefile(second)
    except OSError:
        return False
