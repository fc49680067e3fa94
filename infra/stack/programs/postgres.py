"""PostgreSQL from Debian's package: one database for Prefect and one for MLflow, each with its own user."""

from __future__ import annotations

import contextlib
import os
import pwd
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from infra.stack.credentials import write_private
from infra.stack.errors import StackError, UnhealthyError
from infra.stack.folder import Folder
from infra.stack.program import Launch, Program, Stack
from infra.stack.settings import LOOPBACK
from sfgrpo.errors import ConfigError
from sfgrpo.runtime.files import remove_directory

INSTALLED = Path("/usr/lib/postgresql")
SUPERUSER = "postgres"
CONNECT_TIMEOUT_S = 5


def binaries(cluster: Path, installed: Path = INSTALLED) -> Path:
    """Return the folder of PostgreSQL's programs: of the version that made the cluster, or else the newest."""
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
    """Return the SQLAlchemy address of a database, password included; its user has the same name."""
    return f"postgresql+{driver}://{name}:{password}@{LOOPBACK}:{stack.settings.postgres_port}/{name}"


def require_reachable(path: Path, user: str) -> None:
    """Raise `ConfigError` if the user cannot enter one of the folders above `path`; needs root."""
    for parent in filter(Path.exists, reversed(path.parents)):
        if subprocess.run(["test", "-x", parent], user=user, group=_group(user), extra_groups=[], cwd="/").returncode:
            raise ConfigError(
                f"PostgreSQL does not run as root but as the user {user}, who cannot enter {parent}; set STACK_DIR to "
                "a folder that every user can reach, such as /var/tmp/stack"
            )


def _system_user() -> str | None:
    """Return the user to run PostgreSQL as, since it refuses root; None for the user who runs the stack."""
    return SUPERUSER if os.geteuid() == 0 else None


def _group(user: str) -> int:
    return pwd.getpwnam(user).pw_gid


def _cluster(folder: Folder) -> Path:
    return folder.data("postgres") / "cluster"


def _require(folder: Folder) -> None:
    binaries(_cluster(folder))
    if (user := _system_user()) is not None:
        require_reachable(folder.root, user)


def _launch(stack: Stack) -> Launch:
    cluster, user = _cluster(stack.folder), _system_user()
    cluster.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    if user is not None:
        os.chown(cluster.parent, pwd.getpwnam(user).pw_uid, _group(user))
    if not cluster.exists():
        _make_cluster(stack, user)
    settings = {
        "listen_addresses": LOOPBACK,
        "port": str(stack.settings.postgres_port),
        # TCP only: the path of a socket might be too long.
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
    """Make an empty cluster; it appears complete or not at all."""
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


def _check(stack: Stack) -> None:
    with _connected(stack, "postgres", SUPERUSER, stack.secrets.postgres_password) as cursor:
        cursor.execute("SELECT 1")


def _initialise(stack: Stack) -> None:
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
    """Hash a password as the server stores it, since statements may be logged."""
    from psycopg2.extensions import encrypt_password

    hashed: str = encrypt_password(password, user, cursor.connection, "scram-sha-256")
    return hashed


POSTGRES = Program(
    name="postgres",
    launch=_launch,
    check=_check,
    address=lambda stack: f"{LOOPBACK}:{stack.settings.postgres_port}",
    require=_require,
    initialise=_initialise,
    port="STACK_POSTGRES_PORT",
    # On SIGTERM it would wait until all clients have disconnected.
    stop_signal=signal.SIGINT,
    stop_timeout_s=60,
)
