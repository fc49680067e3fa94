"""The address of an MLflow store, checked without loading MLflow."""

from __future__ import annotations

import re
from pathlib import Path
from urllib.parse import urlsplit

SQLITE = "sqlite:///"
SERVERS = ("http", "https")
DATABASES = ("postgresql", "mysql", "mssql")
ALLOWED = (
    "use a server, http://HOST:PORT, a file, sqlite:///mlflow.db or sqlite:////absolute/path/mlflow.db, or a database, "
    "postgresql://..."
)


def checked_tracking_uri(uri: str) -> str:
    """Return the address of a tracking server or database; raise `ValueError` if it is none that MLflow can use."""
    if uri.startswith("sqlite"):
        _check_sqlite(uri)
        return uri
    if re.fullmatch(r"[\w.-]+:[0-9]+(/.*)?", uri):
        raise ValueError(f"the address has no http:// or https:// before its host; {ALLOWED}")
    try:
        parts = urlsplit(uri)
        host = parts.hostname
        _ = parts.port
    except ValueError as error:
        # Python's own message would show a part of the password.
        raise ValueError(
            f"the host or the port cannot be read; write a / or @ in a password as %2F or %40, and {ALLOWED}"
        ) from error
    if parts.scheme in ("", "file"):
        raise ValueError(
            f"a folder is no store any more: this MLflow keeps runs in databases; {ALLOWED}, and "
            "`python -m mlflow migrate-filestore` takes the runs of a folder over"
        )
    if parts.scheme.partition("+")[0] not in (*SERVERS, *DATABASES):
        raise ValueError(f"{parts.scheme}:// is no kind of store that is known here; {ALLOWED}")
    if not host or re.search(r"\s", uri):
        raise ValueError(f"the address names no host, or holds a space; {ALLOWED}")
    return uri


def sqlite_path(uri: str) -> Path | None:
    """Return the file of a SQLite store, or None for any other store."""
    return Path(uri.removeprefix(SQLITE)) if uri.startswith(SQLITE) else None


def _check_sqlite(uri: str) -> None:
    path = uri.removeprefix(SQLITE)
    if path == uri or path in ("", "/", ":memory:") or path.startswith("~") or "?" in path:
        raise ValueError(f"the address names no file of its own; {ALLOWED}")
