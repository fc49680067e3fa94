"""PostgreSQL from Debian's package: one database for Prefect and one for MLflow, each with a user of its own."""

from __future__ import annotations

import contextlib
import os
import pwd
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from infra.stack.errors import StackError, UnhealthyError
from infra.stack.folder import Folder
from infra.stack.program import Launch, Program, Stack
from infra.stack.secrets import write_private
from infra.stack.settings import LOOPBACK
from sfgrpo.errors import ConfigError
from sfgrpo.runtime.files import remove_directory

INSTALLED = Path("/usr/lib/postgresql")
SUPERUSER = "postgres"
CONNECT_TIMEOUT_S = 5


def binaries(cluster: Path, installed: Path = INSTALLED) -> Path:
    """Finds the folder of PostgreSQL's programs: of the version that made the cluster, else the newest."""
    found = {path.parent.name: path for path in installed.glob("*/bin") if (path / "initdb").exists()}
    if not found:
        raise StackError(
            f"PostgreSQL is not installed, there is nothing in {installed}; install it by `apt-get install postgresql`"
        )
    versions = sorted(found, key=lambda version: [int(part) for part in version.split(".")])
    version_file = cluster / "PG_VERSION"
    version = version_file.read_text(encoding="utf-8").strip() if version_file.exists() else versions[-1]
    if version not in found:
        raise StackError(
            f"{cluster} was made by PostgreSQL {version}, and installed is {', '.join(versions)}; "
            f"install it by `apt-get install postgresql-{version}`"
        )
    return found[version]


def database_url(stack: Stack, driver: str, name: str, password: str) -> str:
    """Gives the address of a database for SQLAlchemy, with the password in it; its user has its name."""
    return f"postgresql+{driver}://{name}:{password}@{LOOPBACK}:{stack.settings.postgres_port}/{name}"


def require_reachable(path: Path, user: str) -> None:
    """Raises `ConfigError` if the user cannot enter one of the folders that lead to `path`; needs root."""
    for parent in filter(Path.exists, reversed(path.parents)):
        if subprocess.run(["test", "-x", parent], user=user, group=_group(user), extra_groups=[], cwd="/").returncode:
            raise ConfigError(
                f"PostgreSQL does not run as root but as the user {user}, who cannot enter {parent}; set STACK_DIR to "
                "a folder that every user can reach, such as /var/tmp/stack"
            )


def _owner() -> str | None:
    """Gives the user whom PostgreSQL has to run as, since it refuses root; None for whoever runs the stack."""
    return SUPERUSER if os.geteuid() == 0 else None


def _group(user: str) -> int:
    return pwd.getpwnam(user).pw_gid


def _cluster(folder: Folder) -> Path:
    return folder.data("postgres") / "cluster"


def _require(folder: Folder) -> None:
    binaries(_cluster(folder))
    if (user := _owner()) is not None:
        require_reachable(folder.root, user)


def _launch(stack: Stack) -> Launch:
    cluster, user = _cluster(stack.folder), _owner()
    cluster.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    if user is not None:
        os.chown(cluster.parent, pwd.getpwnam(user).pw_uid, _group(user))
    if not cluster.exists():
        _make_cluster(stack, user)
    settings = {
        "listen_addresses": LOOPBACK,
        "port": str(stack.settings.postgres_port),
        # By TCP alone: a socket below a long path would not do.
        "unix_socket_directories": "",
    }
    options = [part for name, value in settings.items() for part in ("-c", f"{name}={value}")]
    return Launch(
        command=[str(binaries(cluster) / "postgres"), "-D", str(cluster), *options],
        environment={"LC_ALL": "C"},
        working_directory=cluster.parent,
        user=user,
    )


def _make_cluster(stack: Stack, user: str | None) -> None:
    """Makes an empty cluster that appears whole or not at all."""
    cluster = _cluster(stack.folder)
    partial, password = cluster.with_suffix(".partial"), cluster.with_name("password")
    if partial.exists():
        remove_directory(partial)
    write_private(password, stack.secrets.postgres_password + "\n")
    try:
        if user is not None:
            os.chown(password, pwd.getpwnam(user).pw_uid, _group(user))
        subprocess.run(
            [
                str(binaries(cluster) / "initdb"),
                f"--pgdata={partial}",
                f"--username={SUPERUSER}",
                f"--pwfile={password}",
                "--auth=scram-sha-256",
                "--encoding=UTF8",
                "--locale=C",
            ],
            check=True,
            cwd=cluster.parent,
            user=user,
            group=None if user is None else _group(user),
            extra_groups=None if user is None else [],
        )
    finally:
        password.unlink()
    partial.rename(cluster)


@contextlib.contextmanager
def _connected(stack: Stack, database: str, user: str, password: str) -> Iterator[Any]:
    import psycopg2

    try:
        connection = psycopg2.connect(
            host=LOOPBACK,
            port=stack.settings.postgres_port,
            dbname=database,
            user=user,
            password=password,
            connect_timeout=CONNECT_TIMEOUT_S,
        )
    except psycopg2.OperationalError as error:
        raise UnhealthyError(f"it takes no connection ({' '.join(str(error).split())})") from error
    connection.autocommit = True
    try:
        with connection.cursor() as cursor:
            yield cursor
    except psycopg2.Error as error:
        raise UnhealthyError(f"it does not answer ({type(error).__name__})") from error
    finally:
        connection.close()


def _check(stack: Stack, started_at: float) -> None:
    with _connected(stack, "postgres", SUPERUSER, stack.secrets.postgres_password) as cursor:
        cursor.execute("SELECT 1")


def _fill(stack: Stack) -> None:
    passwords = {"prefect": stack.secrets.prefect_database_password, "mlflow": stack.secrets.mlflow_database_password}
    with _connected(stack, "postgres", SUPERUSER, stack.secrets.postgres_password) as cursor:
        for name, password in passwords.items():
            cursor.execute("SELECT 1 FROM pg_roles WHERE rolname = %s", (name,))
            if cursor.fetchone() is None:
                cursor.execute(f"CREATE ROLE {name} LOGIN PASSWORD %s", (_hashed(cursor, name, password),))
            cursor.execute("SELECT 1 FROM pg_database WHERE datname = %s", (name,))
            if cursor.fetchone() is None:
                cursor.execute(f"CREATE DATABASE {name} OWNER {name}")


def _hashed(cursor: Any, user: str, password: str) -> str:
    """Hashes a password as the server stores it: what is sent might be seen in its log."""
    from psycopg2.extensions import encrypt_password

    hashed: str = encrypt_password(password, user, cursor.connection, "scram-sha-256")
    return hashed


POSTGRES = Program(
    name="postgres",
    launch=_launch,
    check=_check,
    address=lambda stack: f"{LOOPBACK}:{stack.settings.postgres_port}",
    require=_require,
    fill=_fill,
    port="STACK_POSTGRES_PORT",
    # Does not wait until everybody has disconnected, as it does on SIGTERM.
    stop_signal=signal.SIGINT,
    stop_timeout_s=60,
)
