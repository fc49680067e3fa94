"""The schema of an MLflow database: that of this version, of an older or of a newer one."""

from __future__ import annotations

import functools
from collections.abc import Collection

from sfgrpo.errors import ConfigError


def require_schema(place: str, tables: Collection[str], revision: str | None) -> None:
    """Raise `ConfigError` unless these tables and this revision of a database are those of the installed MLflow.

    A database without tables passes: MLflow makes them.

    Args:
        place: file or address, for the message and for the command that upgrades it.
    """
    if not set(tables) - {"alembic_version"}:
        return
    if "experiments" not in tables:
        raise ConfigError(
            f"MLFLOW_TRACKING_URI: {place} is a database of another program (tables {', '.join(sorted(tables)[:3])}); "
            "name another one"
        )
    known, newest = _revisions()
    if revision == newest:
        return
    import mlflow

    if revision is None or revision in known:
        uri = place if "://" in place else f"sqlite:///{place}"
        raise ConfigError(
            f"MLFLOW_TRACKING_URI: {place} was made by an older MLflow (schema {revision}, {mlflow.__version__} has "
            f"{newest}); make a copy of it, then run `python -m mlflow db upgrade {uri}`"
        )
    raise ConfigError(
        f"MLFLOW_TRACKING_URI: {place} was made by a newer MLflow (schema {revision}, which {mlflow.__version__} does "
        "not know); install that version, or name another file or database"
    )


@functools.cache
def _revisions() -> tuple[frozenset[str], str]:
    """Return all revisions that the installed MLflow knows, and the newest one."""
    from alembic.script import ScriptDirectory
    from mlflow.store.db.utils import _get_alembic_config

    scripts = ScriptDirectory.from_config(_get_alembic_config(db_url=""))  # type: ignore[no-untyped-call]  # MLflow's
    newest = scripts.get_current_head()
    assert newest is not None, "MLflow has one newest revision"
    return frozenset(script.revision for script in scripts.walk_revisions()), newest
