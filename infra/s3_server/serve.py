"""A local S3 server: OpenStack Swift behind its S3 interface, with all data in one folder.

    .venv-s3/bin/python infra/s3_server/serve.py --folder .s3 --port 9000 --access-key sfgrpo:local

The secret key comes from the file of `--secret-key-file`, or from AWS_SECRET_ACCESS_KEY. The server listens on
127.0.0.1 only. When it answers it prints `ready: http://127.0.0.1:9000`. SIGTERM, Ctrl-C and SIGKILL end it with its
four servers. The next start with the same folder has the same data.

It checks signatures and supports multipart uploads, versions and presigned addresses, but no tags, lifecycles and
policies.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import fcntl
import os
import pwd
import re
import secrets
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import FrameType

# mypy runs in .venv; Swift is installed in .venv-s3 alone.
from swift.common.ring import RingBuilder  # type: ignore[import-not-found]

HOST = "127.0.0.1"
REGION = "us-east-1"
STORAGE_KINDS = ("account", "container", "object")
PARTITION_POWER = 8
START_TIMEOUT_S = 60.0
STOP_TIMEOUT_S = 10.0
LOCK_TIMEOUT_S = 5.0

Servers = dict[str, subprocess.Popen[bytes]]

COMMON = """\
[DEFAULT]
bind_ip = {host}
bind_port = {port}
user = {user}
workers = 0
swift_dir = {folder}
log_level = WARNING
# Swift always writes to syslog as well; nothing listens on this port.
log_udp_host = {host}
log_udp_port = 9
"""

STORAGE = """\
devices = {folder}/devices
mount_check = false
disable_fallocate = true

[pipeline:main]
pipeline = gate {kind}-server

[filter:gate]
paste.filter_factory = backend_gate:filter_factory

[app:{kind}-server]
use = egg:swift#{kind}
recon_cache_path = {folder}/recon
"""

# Without the filter `cache`, which would use a memcached of this machine that others may use too.
PROXY = """\

[pipeline:main]
pipeline = catch_errors gatekeeper healthcheck listing_formats s3api tempauth bulk slo dlo versioned_writes symlink \
copy proxy-server

[app:proxy-server]
use = egg:swift#proxy
account_autocreate = true

[filter:s3api]
use = egg:swift#s3api
location = {region}
s3_acl = false

[filter:tempauth]
use = egg:swift#tempauth
user_{account}_{name} = {secret} .admin

[filter:versioned_writes]
use = egg:swift#versioned_writes
allow_object_versioning = true
"""

PLAIN_FILTERS = (
    "catch_errors",
    "gatekeeper",
    "healthcheck",
    "listing_formats",
    "bulk",
    "slo",
    "dlo",
    "symlink",
    "copy",
)


def main() -> None:
    """Serve until told to stop, or until one of the servers ends."""
    arguments = _arguments()
    signal.signal(signal.SIGTERM, _leave)
    folder: Path = arguments.folder.resolve()
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    _require_extended_attributes(folder)
    # The children inherit it; see `backend_gate`.
    os.environ["BACKEND_GATE_KEY"] = secrets.token_hex(32)
    with _locked(folder) as lock, contextlib.ExitStack() as running:
        ports = _write_configuration(
            folder, arguments.port, arguments.access_key, _secret_key(arguments.secret_key_file)
        )
        # The proxy starts last and stops first, so that no request finds only some of the servers.
        servers = {kind: running.enter_context(_server(kind, folder, lock)) for kind in STORAGE_KINDS}
        for port in ports.values():
            _wait_until(partial(_accepts, port), servers, folder)
        servers["proxy"] = running.enter_context(_server("proxy", folder, lock))
        _wait_until(partial(_is_healthy, arguments.port), servers, folder)
        print(f"ready: http://{HOST}:{arguments.port}", flush=True)
        while True:
            _require_running(servers, folder)
            time.sleep(0.2)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="where all data lies; made at the first start")
    parser.add_argument("--port", type=int, required=True, help="port on 127.0.0.1")
    parser.add_argument(
        "--access-key", default=os.environ.get("AWS_ACCESS_KEY_ID"), help="account:name; default AWS_ACCESS_KEY_ID"
    )
    parser.add_argument("--secret-key-file", type=Path, help="file with the secret key; default AWS_SECRET_ACCESS_KEY")
    arguments = parser.parse_args()
    # Swift splits names at underscores.
    if not re.fullmatch(r"[A-Za-z0-9]+:[A-Za-z0-9]+", arguments.access_key or ""):
        parser.error(
            f"the access key {arguments.access_key!r} is not of the form account:name, in letters and digits; "
            "correct --access-key or AWS_ACCESS_KEY_ID"
        )
    return arguments


def _secret_key(file: Path | None) -> str:
    secret = os.environ.get("AWS_SECRET_ACCESS_KEY", "") if file is None else file.read_text(encoding="utf-8").strip()
    if not re.fullmatch(r"[A-Za-z0-9/+=_-]{8,}", secret):
        sys.exit(
            "the secret key must have at least 8 letters, digits and /+=_-; "
            "give another by --secret-key-file or AWS_SECRET_ACCESS_KEY"
        )
    return secret


def _leave(signal_number: int, frame: FrameType | None) -> None:
    raise SystemExit(0)


def _require_extended_attributes(folder: Path) -> None:
    try:
        os.setxattr(folder, "user.sfgrpo", b"")
    except OSError as error:
        if error.errno != errno.ENOTSUP:
            raise
        sys.exit(f"{folder} is on a file system without extended attributes; choose a folder on ext4 or xfs")


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[int]:
    """Lock the folder; the children inherit the lock, so it lasts until the last one is gone."""
    lock = os.open(folder / "lock", os.O_RDWR | os.O_CREAT, 0o600)
    deadline = time.monotonic() + LOCK_TIMEOUT_S
    while True:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except BlockingIOError:
            if time.monotonic() > deadline:
                sys.exit(f"{folder} is in use by another server; stop that one or choose another folder")
            time.sleep(0.05)
    try:
        yield lock
    finally:
        os.close(lock)


def _write_configuration(folder: Path, port: int, access_key: str, secret: str) -> dict[str, int]:
    """Write Swift's configuration, but keep the salt of the first start; return the ports of the storage servers."""
    (folder / "devices" / "disk").mkdir(parents=True, exist_ok=True)
    (folder / "recon").mkdir(exist_ok=True)
    if not (folder / "swift.conf").exists():
        # The salt determines where an object is stored: with another one all data would be lost.
        salt = f"swift_hash_path_prefix = {secrets.token_hex(16)}\nswift_hash_path_suffix = {secrets.token_hex(16)}\n"
        policy = "name = default\ndefault = yes\n"
        _write_private(folder / "swift.conf", f"[swift-hash]\n{salt}\n[storage-policy:0]\n{policy}")
    common = {"host": HOST, "user": pwd.getpwuid(os.geteuid()).pw_name, "folder": folder}
    ports = _free_ports(STORAGE_KINDS)
    for kind in STORAGE_KINDS:
        text = (COMMON + STORAGE).format(**common, port=ports[kind], kind=kind)
        _write_private(folder / f"{kind}.conf", text)
        _write_ring(folder / f"{kind}.ring.gz", ports[kind])
    account, _, name = access_key.partition(":")
    proxy = (COMMON + PROXY).format(**common, port=port, region=REGION, account=account, name=name, secret=secret)
    proxy += "".join(f"\n[filter:{name}]\nuse = egg:swift#{name}\n" for name in PLAIN_FILTERS)
    _write_private(folder / "proxy.conf", proxy)
    return ports


def _write_private(path: Path, text: str) -> None:
    partial = path.with_suffix(".partial")
    partial.unlink(missing_ok=True)
    partial.touch(mode=0o600)
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)


def _free_ports(kinds: tuple[str, ...]) -> dict[str, int]:
    with contextlib.ExitStack() as held:
        sockets = {kind: held.enter_context(socket.create_server((HOST, 0))) for kind in kinds}
        return {kind: server.getsockname()[1] for kind, server in sockets.items()}


def _write_ring(path: Path, port: int) -> None:
    """Write the map of all partitions to the one disk; a new port moves no data."""
    builder = RingBuilder(PARTITION_POWER, replicas=1, min_part_hours=1)
    builder.add_dev({"region": 1, "zone": 1, "weight": 1.0, "ip": HOST, "port": port, "device": "disk"})
    builder.rebalance(seed="0")
    builder.get_ring().save(str(path))


@contextlib.contextmanager
def _server(kind: str, folder: Path, lock: int) -> Iterator[subprocess.Popen[bytes]]:
    program = Path(__file__).with_name("swift_process.py")
    command = [sys.executable, str(program), kind, str(folder), str(os.getpid())]
    with (folder / f"{kind}.log").open("ab") as log:
        server = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, pass_fds=(lock,))
    try:
        yield server
    finally:
        server.terminate()
        try:
            server.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait()


def _wait_until(condition: Callable[[], bool], servers: Servers, folder: Path) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    while not condition():
        _require_running(servers, folder)
        if time.monotonic() > deadline:
            sys.exit(f"the server does not answer after {START_TIMEOUT_S:.0f} s; see the logs in {folder}")
        time.sleep(0.05)


def _require_running(servers: Servers, folder: Path) -> None:
    for kind, server in servers.items():
        if server.poll() is not None:
            sys.exit(f"the {kind} server ended with status {server.returncode}; see {folder}/{kind}.log")


def _accepts(port: int) -> bool:
    try:
        socket.create_connection((HOST, port), timeout=1.0).close()
    except OSError:
        return False
    return True


def _is_healthy(port: int) -> bool:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(f"http://{HOST}:{port}/healthcheck", timeout=5.0) as answer:
            return bool(answer.read() == b"OK")
    except OSError:
        return False


if __name__ == "__main__":
    main()
