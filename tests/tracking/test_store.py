"""Stores that cannot be used are named at once, each with its own cure; and a moved one is mended."""

from __future__ import annotations

import contextlib
import http.server
import os
import socket
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from sfgrpo.config.addresses import checked_tracking_uri
from sfgrpo.errors import ConfigError, TrackingError
from sfgrpo.runtime.environment import read_environment
from sfgrpo.tracking import sqlite_store
from sfgrpo.tracking.mlflow_client import connect, find_or_create_experiment
from sfgrpo.tracking.mlflow_tracker import MlflowTracker
from sfgrpo.tracking.schema import _revisions
from sfgrpo.tracking.store import prepare_store, server_version
from tests.support.stores import copy_database

# Not ours to mend: SQLAlchemy's and MLflow's own deprecations.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")

AT_ONCE_S = 15.0
"""On a busy machine, the import of MLflow included; a retried error took a minute."""


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    database = tmp_path_factory.mktemp("store") / "mlflow.db"
    connect(f"sqlite:///{database}")
    return database


@pytest.fixture
def database(template: Path, tmp_path: Path) -> Path:
    copy_database(template, tmp_path / "mlflow.db")
    return tmp_path / "mlflow.db"


def execute(database: Path, *statements: str) -> None:
    with contextlib.closing(sqlite3.connect(database)) as connection:
        for statement in statements:
            connection.execute(statement)
        connection.commit()


def refused(database: Path | str, complaint: str, error: type[Exception] = ConfigError) -> None:
    started = time.monotonic()
    with pytest.raises(error, match=complaint):
        connect(database if isinstance(database, str) else f"sqlite:///{database}")
    assert time.monotonic() - started < AT_ONCE_S


def test_new_store_is_made_with_its_folder_and_can_be_used_by_two_at_once(tmp_path):
    uri = f"sqlite:///{tmp_path / 'new' / 'mlflow.db'}"
    errors: list[Exception] = []

    def use() -> None:
        try:
            connect(uri).search_experiments()
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=use) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert [path.name for path in (tmp_path / "new").iterdir() if "mlflow.db" not in path.name] == []


def test_empty_file_is_a_new_store(tmp_path):
    (tmp_path / "mlflow.db").touch()
    assert connect(f"sqlite:///{tmp_path / 'mlflow.db'}").search_experiments()


@pytest.mark.slow
def test_database_of_an_older_mlflow_is_refused_untouched_and_the_advice_cures_it(tmp_path):
    from alembic import command
    from alembic.script import ScriptDirectory
    from mlflow.store.db.utils import _get_alembic_config
    from mlflow.store.tracking.dbmodels.initial_models import Base
    from sqlalchemy import create_engine

    database = tmp_path / "mlflow.db"
    uri = f"sqlite:///{database}"
    engine = create_engine(uri)
    Base.metadata.create_all(engine)
    config = _get_alembic_config(uri)
    older = list(ScriptDirectory.from_config(config).walk_revisions())[4].revision
    with engine.begin() as connection:
        config.attributes["connection"] = connection
        command.upgrade(config, older)
    engine.dispose()
    before = database.read_bytes()
    refused(database, rf"was made by an older MLflow \(schema {older}, .*`python -m mlflow db upgrade {uri}`")
    assert database.read_bytes() == before
    environment = os.environ | {"MLFLOW_DISABLE_TELEMETRY": "true"}
    subprocess.run([sys.executable, "-m", "mlflow", "db", "upgrade", uri], check=True, env=environment)
    assert connect(uri).search_experiments()


def test_database_without_a_revision_is_that_of_an_older_mlflow(database):
    execute(database, "DROP TABLE alembic_version")
    refused(database, "was made by an older MLflow")


def test_database_of_a_newer_mlflow_is_not_to_be_upgraded(database):
    execute(database, "UPDATE alembic_version SET version_num = 'feedc0ffee00'")
    refused(database, r"was made by a newer MLflow \(schema feedc0ffee00, .*; install that version, or name another")


def test_database_of_another_program_is_left_alone(tmp_path):
    database = tmp_path / "prefect.db"
    execute(database, "CREATE TABLE flow_run (id)", "CREATE TABLE alembic_version (version_num)")
    before = database.read_bytes()
    refused(database, r"prefect\.db is a database of another program \(tables alembic_version, flow_run\)")
    assert database.read_bytes() == before


@pytest.mark.parametrize("content", [b"# Notes\n" * 100, b"SQLite format 3\x00" + b"\xff" * 5000], ids=["text", "torn"])
def test_file_that_is_no_database_is_refused(tmp_path, content):
    (tmp_path / "mlflow.db").write_bytes(content)
    refused(tmp_path / "mlflow.db", "is no SQLite database, or a damaged one .*; restore it from a copy")


def test_folder_is_no_database(tmp_path):
    refused(tmp_path, "is no file; name another one, or unset the variable")


def test_folder_that_cannot_be_made_is_refused(tmp_path):
    (tmp_path / "file").touch()
    refused(tmp_path / "file/mlflow.db", r"no database can be made in .*file \((File exists|Not a directory)\)")


def test_folder_on_a_disk_that_cannot_be_written_is_refused():
    refused("sqlite:////proc/mlflow.db", r"/proc.*; (name a file|make the file and its folder writable)")


def test_file_that_cannot_be_written_is_refused(database, monkeypatch):
    # The superuser, who runs many tests, may write any file, so SQLite opens it as on a disk of that kind.
    monkeypatch.setattr(sqlite_store, "_address", lambda path: f"file:{path}?mode=ro")
    refused(database, r"cannot be opened for writing \(attempt to write a readonly database\); make the file")


def test_locked_database_is_named_with_the_way_to_find_who_locks_it(database, monkeypatch):
    monkeypatch.setattr(sqlite_store, "LOCKED_S", 0.2)
    with contextlib.closing(sqlite3.connect(database)) as other:
        other.execute("BEGIN IMMEDIATE")
        refused(database, rf"mlflow\.db is locked by another process.*`fuser {database}`", TrackingError)


def test_new_run_is_refused_at_once_by_a_store_of_another_version(database):
    execute(database, "UPDATE alembic_version SET version_num = 'feedc0ffee00'")
    started = time.monotonic()
    with pytest.raises(ConfigError, match="was made by a newer MLflow"):
        MlflowTracker(uri=f"sqlite:///{database}", experiment="e").open()
    assert time.monotonic() - started < AT_ONCE_S


@pytest.mark.parametrize(
    "uri",
    [
        *("sqlite:///mlflow.db", "sqlite:////a/b.db", "http://localhost:5000", "https://u:p@host/mlflow/"),
        *("postgresql://u:p@h/db", "postgresql+psycopg2://u@h:5432/db", "mysql+pymysql://h/db", "http://[::1]:5000"),
    ],
)
def test_address_of_a_store_is_taken(uri):
    assert checked_tracking_uri(uri) == uri


@pytest.mark.parametrize(
    ("uri", "complaint"),
    [
        ("./mlruns", "a folder is no store any more: .*`python -m mlflow migrate-filestore`"),
        ("mlruns", "a folder is no store any more"),
        ("/data/mlruns", "a folder is no store any more"),
        ("file:///data/mlruns", "a folder is no store any more"),
        ("localhost:5000", "the address has no http:// or https:// before its host"),
        ("10.0.0.1:5000/mlflow", "the address has no http:// or https:// before its host"),
        ("htp://localhost:5000", "htp:// is no kind of store"),
        ("s3://bucket/mlflow", "s3:// is no kind of store"),
        ("databricks://profile", "databricks:// is no kind of store"),
        ("http://", "the address names no host"),
        ("http://:5000", "the address names no host"),
        ("http://host:port", "the host or the port cannot be read"),
        ("http://host:99999", "the host or the port cannot be read"),
        ("http://[::1", "the host or the port cannot be read"),
        ("http://a host", "the address names no host, or holds a space"),
        ("sqlite://mlflow.db", "names no file of its own"),
        ("sqlite://", "names no file of its own"),
        ("sqlite:///", "names no file of its own"),
        ("sqlite:///:memory:", "names no file of its own"),
        ("sqlite:///~/mlflow.db", "names no file of its own"),
        ("sqlite:///mlflow.db?mode=ro", "names no file of its own"),
        ("sqlite+pysqlite:///mlflow.db", "names no file of its own"),
    ],
)
def test_address_that_is_none_is_a_wrong_environment(monkeypatch, uri, complaint):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    with pytest.raises(ConfigError, match=f"environment: MLFLOW_TRACKING_URI: .*{complaint}"):
        read_environment()


class Answers(http.server.BaseHTTPRequestHandler):
    """A server that gives one answer to everything but the question for its version, if it has one."""

    status = 200
    body = "<html>"
    version: str | None = None

    def do_GET(self) -> None:
        is_version = self.path.endswith("/version") and self.version is not None
        self.send_response(200 if is_version else self.status)
        if 300 <= self.status < 400:
            self.send_header("Location", "/elsewhere")
        self.end_headers()
        self.wfile.write(str(self.version if is_version else self.body).encode())

    def log_message(self, *arguments: object) -> None:
        pass


@contextlib.contextmanager
def answering(**answers: object) -> Iterator[str]:
    handler = type("Handler", (Answers,), answers)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}"
        finally:
            server.shutdown()
            thread.join()


@pytest.mark.parametrize(
    ("answers", "complaint"),
    [
        (
            {"body": "<!doctype html>"},
            "is no MLflow server: .*/version answers a web page with status 200; correct host",
        ),
        ({"body": '{"status": "ok"}'}, r"is no MLflow server: .*answers .*status.* with status 200"),
        ({"body": ""}, 'is no MLflow server: .*answers "" with status 200'),
        ({"status": 404, "body": "Not Found"}, 'is no MLflow server: .*answers "Not Found" with status 404'),
        ({"status": 302}, "redirects elsewhere; give the address that it redirects to"),
        ({"status": 401}, r"refuses the credentials \(status 401\); set MLFLOW_TRACKING_USERNAME"),
        ({"status": 401, "version": "3.1.0"}, r"refuses the credentials \(status 401\); set MLFLOW_TRACKING_USERNAME"),
        ({"status": 403, "version": "3.1.0"}, r"refuses the credentials \(status 403\)"),
        ({"version": "2.22.0"}, r"runs MLflow 2\.22\.0, which has no logged models.*; upgrade the server to"),
    ],
)
def test_server_that_cannot_be_used_is_told_from_one_that_is_away(answers, complaint):
    with answering(**answers) as uri:
        refused(uri, complaint)


@pytest.mark.parametrize("answers", [{"status": 502}, {"status": 503}, {"status": 429}, {"version": "3.1.0"}])
def test_server_that_may_come_back_or_is_one_of_mlflow_passes(answers):
    with answering(**answers) as uri:
        prepare_store(uri)


def test_address_where_nobody_listens_passes_at_once():
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        assert server_version(f"http://127.0.0.1:{unused.getsockname()[1]}") is None


def test_database_whose_driver_is_absent_is_refused():
    refused("mssql+pyodbc2://u@h/db", "cannot be opened here .*; install the driver of that database")


def test_known_revisions_hold_the_newest_one():
    known, newest = _revisions()
    assert newest in known and len(known) > 60


def test_artifacts_through_a_link_are_those_of_the_store(database, tmp_path):
    find_or_create_experiment(connect(f"sqlite:///{database}"), f"sqlite:///{database}", "e")
    (tmp_path / "mlartifacts").mkdir()
    (tmp_path / "link").symlink_to(tmp_path)
    connect(f"sqlite:///{tmp_path / 'link/mlflow.db'}")


def test_store_that_was_moved_is_named_with_the_cure(database, tmp_path):
    uri = f"sqlite:///{database}"
    find_or_create_experiment(connect(uri), uri, "e")
    (tmp_path / "new").mkdir()
    copy_database(database, tmp_path / "new/mlflow.db")
    moved = (
        rf"the folder of .*new/mlflow\.db was moved or copied: its artifacts are recorded below {tmp_path}"
        "/mlartifacts, not beside it; `python -m sfgrpo relocate`"
    )
    refused(tmp_path / "new/mlflow.db", moved)


def test_experiments_with_a_place_of_their_own_are_not_moved_ones(database, tmp_path):
    client = connect(f"sqlite:///{database}")
    for name, location in (("bucket", "s3://bucket/mlartifacts"), ("own", "file:///somewhere/artifacts")):
        client.create_experiment(name, artifact_location=location)
    connect(f"sqlite:///{database}")
