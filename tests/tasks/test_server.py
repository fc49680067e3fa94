"""The temporary server of a flow: it has one client, and does not outlive it."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from tests.support.paths import ROOT
from tests.support.stub_pipeline import stub_environment

pytestmark = pytest.mark.slow

PROGRAM = """
import json, os, signal, sys
import httpx, psutil
from prefect.client.orchestration import get_client
from tasks.server import temporary_server

with temporary_server(lambda: True):
    with get_client(sync_client=True) as client:
        address = str(client.api_url).rstrip("/")
        ours = client.read_flows()
        foreign = {"Origin": "http://evil.example"}
        login = client._client.headers.get("authorization", "")
        answers = {
            "nobody": httpx.get(f"{address}/admin/settings").status_code,
            "a guess": httpx.get(f"{address}/admin/settings", auth=("flow", "guess")).status_code,
            "a login": httpx.get(f"{address}/admin/settings", headers={"Authorization": login}).status_code,
            "a page": httpx.post(f"{address}/flows/", json={"name": "evil"}, headers=foreign).status_code,
            "no token": httpx.post(f"{address}/flows/", json={"name": "a"}, headers=foreign | {"Authorization": login})
            .status_code,
        }
        allowed = httpx.options(
            f"{address}/flows/", headers=foreign | {"Access-Control-Request-Method": "POST"}
        ).headers.get("access-control-allow-origin")
    (server,) = psutil.Process().children()
    print(json.dumps({
        "ours": ours, "answers": answers, "allowed": allowed, "server": server.pid, "command": server.cmdline(),
        "session": os.getsid(server.pid) != os.getsid(0),
    }), flush=True)
    sys.stdin.readline()
"""


def start(folder: Path) -> tuple[subprocess.Popen[str], dict[str, object]]:
    environment = {name: value for name, value in stub_environment().items() if not name.startswith("PREFECT_")}
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM],
        cwd=ROOT,
        env=environment | {"PREFECT_HOME": str(folder), "PYTHONPATH": str(ROOT)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    return process, json.loads(process.stdout.readline())


def wait_until_gone(pid: object, seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while psutil.pid_exists(int(str(pid))):
        assert time.monotonic() < deadline, "the server is still there"
        time.sleep(0.1)


def test_server_answers_its_flow_alone_and_ends_with_it(tmp_path):
    process, seen = start(tmp_path)
    assert seen["ours"] == []
    assert seen["answers"] == {"nobody": 401, "a guess": 401, "a login": 200, "a page": 403, "no token": 403}
    assert seen["allowed"] is None
    assert seen["session"], "Ctrl-C in the flow's terminal would reach the server first"
    assert not any("flow:" in word for word in seen["command"]), "processes of others can read a command line"
    process.communicate("\n", timeout=60)
    assert process.returncode == 0
    wait_until_gone(seen["server"])


def test_server_dies_with_its_flow(tmp_path):
    process, seen = start(tmp_path)
    process.kill()
    process.communicate(timeout=60)
    wait_until_gone(seen["server"])
