"""The SQLite file of an MLflow store: made once, and checked before MLflow opens it.

MLflow retries whatever is wrong with a file for a minute and then calls it an outage; and a file that lacks tables of a
newer version it migrates without asking.
"""

from __future__ import annotations

import contextlib
import os
import sqlite3
from pathlib import Path
from urllib.parse import quote

from sfgrpo.errors import ConfigError, TrackingError
from sfgrpo.runtime.locks import lock_existing
from sfgrpo.tracking.moved import moved_roots
from sfgrpo.tracking.schema import require_schema

LOCKED_S = 4.0
"""How long another process may write before the file counts as locked; MLflow's transactions take milliseconds."""
MADE_S = 600.0
"""How long another process may take to make the tables; on an idle machine four seconds do."""


def prepare_database(uri: str, path: Path) -> None:
    """Make the tables of a SQLite store that has none; check any other one.

    Raises:
        ConfigError: The file is no database of this MLflow, cannot be written, or was moved without its artifacts.
        TrackingError: Another process keeps the file locked.
    """
    if is_new(path):
        _require_folder(path.parent)
        with lock_existing(path.parent, timeout_s=MADE_S):
            if is_new(path):
                _make_tables(uri, path)
    try:
        check_database(path)
    except (ConfigError, TrackingError):
        # Another process may have been making the tables, amid which any check fails.
        with lock_existing(path.parent, timeout_s=MADE_S):
            check_database(path)


def is_new(path: Path) -> bool:
    """Return whether there is no file, or an empty one, which is how SQLite makes them."""
    return not path.exists() or (path.is_file() and path.stat().st_size == 0)


def check_database(path: Path) -> None:
    """Raise unless a file is a database of this version of MLflow that can be written, with its artifacts beside it."""
    if not path.is_file():
        raise ConfigError(f"MLFLOW_TRACKING_URI: {path} is no file; name another one, or unset the variable")
    try:
        # By this mode a missing file is an error.
        with contextlib.closing(sqlite3.connect(_address(path), uri=True, timeout=LOCKED_S)) as connection:
            connection.execute("BEGIN IMMEDIATE")
            _write_nothing(connection)
            require_schema(str(path), *_read_schema(connection))
            roots = moved_roots(connection, path)
            connection.rollback()
    except sqlite3.Error as error:
        raise _error_of(path, error) from error
    if roots:
        raise ConfigError(
            f"MLFLOW_TRACKING_URI: the folder of {path} was moved or copied: its artifacts are recorded below "
            f"{roots[0]}, not beside it; `python -m sfgrpo relocate` corrects the records"
        )


def _address(path: Path) -> str:
    return f"file:{quote(str(path.absolute()))}?mode=rw"


def _write_nothing(connection: sqlite3.Connection) -> None:
    """Fail where the file cannot be written, which a transaction alone does not; it is rolled back."""
    (version,) = connection.execute("PRAGMA user_version").fetchone()
    connection.execute(f"PRAGMA user_version = {version}")


def _read_schema(connection: sqlite3.Connection) -> tuple[set[str], str | None]:
    """Return the names of all tables and the revision of the schema."""
    tables = {name for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
    if "alembic_version" not in tables:
        return tables, None
    row = connection.execute("SELECT version_num FROM alembic_version").fetchone()
    return tables, None if row is None else str(row[0])


def _error_of(path: Path, error: sqlite3.Error) -> ConfigError | TrackingError:
    """Return the error of a file that cannot be used, with its cure."""
    text = str(error)
    if "locked" in text or "busy" in text:
        return TrackingError(
            f"MLFLOW_TRACKING_URI: {path} is locked by another process, for more than {LOCKED_S:g} s; end the one that "
            f"`fuser {path}` names, then start this again"
        )
    if "not a database" in text or "malformed" in text:
        return ConfigError(
            f"MLFLOW_TRACKING_URI: {path} is no SQLite database, or a damaged one ({text}); restore it from a copy, or "
            "move it away to start with an empty one"
        )
    return ConfigError(
        f"MLFLOW_TRACKING_URI: {path} cannot be opened for writing ({text}); make the file and its folder writable, or "
        "name a file on another disk"
    )


def _require_folder(folder: Path) -> None:
    """Make the folder of a new database; raise `ConfigError` where nothing can be written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK):
            raise PermissionError(13, "not writable")
    except OSError as error:
        raise ConfigError(
            f"MLFLOW_TRACKING_URI: no database can be made in {folder} ({error.strerror}); name a file elsewhere"
        ) from error


def _make_tables(uri: str, path: Path) -> None:
    """Create the file with all tables of MLflow."""
    from mlflow import MlflowClient

    try:
        # A write-ahead log halves the time to create the 65 tables, and its readers block no writer.
        with contextlib.closing(sqlite3.connect(path)) as connection:
            connection.execute("PRAGMA journal_mode=WAL")
    except sqlite3.Error as error:
        raise _error_of(path, error) from error
    # Its first request makes them.
    MlflowClient(tracking_uri=uri, registry_uri=uri).search_experiments(max_results=1)
