"""Whether an MLflow store can be used, found out at once and with the cure, before anything works with it."""

from __future__ import annotations

import json
import re

from sfgrpo.config.addresses import DATABASES, sqlite_path
from sfgrpo.errors import ConfigError
from sfgrpo.tracking.schema import require_schema
from sfgrpo.tracking.sqlite_store import prepare_database

ANSWER_S = 10.0
OLDEST_SERVER = 3
"""Major version of MLflow whose servers know logged models, which a registration makes."""
AUTHENTICATED = "/api/2.0/mlflow/experiments/search?max_results=1"


def prepare_store(uri: str) -> None:
    """Check that the store at an address is one of this version of MLflow; make a SQLite file that is missing.

    A store that does not answer passes: it may be back when it is needed.

    Raises:
        ConfigError: There is something else than a store, or one that this version cannot use.
        TrackingError: A SQLite file is locked by another process.
    """
    database = sqlite_path(uri)
    if database is not None:
        prepare_database(uri, database)
    elif uri.partition(":")[0].partition("+")[0] in DATABASES:
        _check_database(uri)
    else:
        _check_server(uri)


def server_version(uri: str) -> str | None:
    """Return the version of the MLflow server at an address; None if none answers now, or it is behind a proxy's error.

    Raises:
        ConfigError: What answers is no MLflow server, or refuses the credentials.
    """
    answered = _ask(uri, "/version")
    if answered is None:
        return None
    status, text = answered
    if status == 200 and re.fullmatch(r"\d+(\.\w+)+", text.strip()):
        return text.strip()
    if 300 <= status < 400:
        raise ConfigError(f"MLFLOW_TRACKING_URI: {uri} redirects elsewhere; give the address that it redirects to")
    _refuse_credentials(uri, status)
    kind = "a web page" if text.lstrip()[:1] == "<" else json.dumps(text[:40])
    raise ConfigError(
        f"MLFLOW_TRACKING_URI: {uri} is no MLflow server: {uri.rstrip('/')}/version answers {kind} with status "
        f"{status}; correct host, port and path, or unset the variable to record to a file"
    )


def _check_server(uri: str) -> None:
    version = server_version(uri)
    if version is None:
        return
    if int(version.partition(".")[0]) < OLDEST_SERVER:
        import mlflow

        raise ConfigError(
            f"MLFLOW_TRACKING_URI: {uri} runs MLflow {version}, which has no logged models, so nothing could be "
            f"registered; upgrade the server to {mlflow.__version__}, or name another one"
        )
    answered = _ask(uri, AUTHENTICATED)
    if answered is not None:
        _refuse_credentials(uri, answered[0])


def _refuse_credentials(uri: str, status: int) -> None:
    if status in (401, 403, 407):
        raise ConfigError(
            f"MLFLOW_TRACKING_URI: {uri} refuses the credentials (status {status}); set MLFLOW_TRACKING_USERNAME and "
            "MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN"
        )


def _ask(uri: str, endpoint: str) -> tuple[int, str] | None:
    """Return status and text of an answer, asked as MLflow asks; None for an outage."""
    from mlflow.exceptions import MlflowException
    from mlflow.utils.credentials import get_default_host_creds
    from mlflow.utils.rest_utils import http_request

    try:
        answer = http_request(  # type: ignore[no-untyped-call]  # not annotated in MLflow
            get_default_host_creds(uri),  # type: ignore[no-untyped-call]
            endpoint,
            "GET",
            max_retries=0,
            timeout=ANSWER_S,
            raise_on_status=False,
            allow_redirects=False,
        )
    except (MlflowException, OSError):
        return None
    if answer.status_code in (408, 429) or answer.status_code >= 500:
        return None
    return int(answer.status_code), str(answer.text[:1000])


def _check_database(uri: str) -> None:
    """Check driver and schema of a database that is used without a server."""
    import sqlalchemy
    from sqlalchemy.exc import ArgumentError, NoSuchModuleError, SQLAlchemyError

    try:
        engine = sqlalchemy.create_engine(uri)
    except (ImportError, NoSuchModuleError, ArgumentError) as error:
        raise ConfigError(
            f"MLFLOW_TRACKING_URI: {uri} cannot be opened here ({error}); install the driver of that database, or name "
            "an MLflow server"
        ) from error
    try:
        with engine.connect() as connection:
            tables = set(sqlalchemy.inspect(connection).get_table_names())
            revision = None
            if "alembic_version" in tables:
                revision = connection.execute(sqlalchemy.text("SELECT version_num FROM alembic_version")).scalar()
    except SQLAlchemyError:
        # An outage, or a refusal in the database's own words, which MLflow's request repeats.
        return
    finally:
        engine.dispose()
    require_schema(uri, tables, revision)
