"""Attacks on the local stack as it really runs, by other users of the machine and by pages in its browser.

The first is the worst: three posts to Prefect make the worker run a command.
"""

from __future__ import annotations

import json
import os
import pwd
import subprocess
import sys
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import connect

from infra.stack.settings import LOOPBACK
from tests.support.ordinary_user import USER
from tests.support.stack import Stack, wait_until

pytestmark = [pytest.mark.stack, pytest.mark.slow]

EVIL = "evil.example"
REFUSED = {401, 403}
NOBODY: tuple[str, str] = ("", "")


def ask(method: str, url: str, **options: Any) -> httpx.Response:
    # Without TLS, whose certificates take a tenth of a second to load.
    with httpx.Client(trust_env=False, timeout=20.0, verify=False) as client:
        return client.request(method, url, **options)


# --- Prefect: from three posts to a shell ---


class Prefect:
    """What an attacker sends to a stack's Prefect, and what its owner does."""

    def __init__(self, stack: Stack) -> None:
        """Read the owner's login."""
        environment = stack.environment
        self.api = environment["PREFECT_API_URL"]
        user, password = environment["PREFECT_API_AUTH_STRING"].split(":")
        self.login = (user, password)

    def tokens(self) -> dict[str, str]:
        """Return the headers by which the owner's clients show that no page has forged their request."""
        client = str(uuid.uuid4())
        answer = ask("GET", f"{self.api}/csrf-token?client={client}", auth=self.login)
        return {"Prefect-Csrf-Client": client, "Prefect-Csrf-Token": answer.json()["token"]}

    def post(self, path: str, content: object, **options: Any) -> httpx.Response:
        headers = {"Content-Type": "application/json", **options.pop("headers", {})}
        return ask("POST", f"{self.api}/{path}", content=json.dumps(content), headers=headers, **options)

    def owner(self, path: str, content: object) -> Any:
        answer = self.post(path, content, auth=self.login, headers=self.tokens())
        assert answer.is_success, answer.text
        return answer.json()

    def counts(self) -> list[int]:
        """Count flows, deployments and flow runs."""
        return [self.owner(f"{kind}/count", {}) for kind in ("flows", "deployments", "flow_runs")]


def deployment(flow_id: str, command: str) -> dict[str, Any]:
    """Return a deployment of the worker's pool whose preparation is a shell command."""
    step = {"prefect.deployments.steps.run_shell_script": {"script": command}}
    return {
        "name": "attack",
        "flow_id": flow_id,
        "work_pool_name": "sfgrpo",
        "entrypoint": "flows.py:tell",
        "pull_steps": [step],
        "enforce_parameter_schema": False,
    }


SCHEDULED = {"state": {"type": "SCHEDULED"}}


def run_command(prefect: Prefect, command: str) -> tuple[str, str]:
    """Run a shell command by the three posts, as the owner may; return the ids of flow and deployment."""
    flow_id = prefect.owner("flows/", {"name": "control"})["id"]
    deployment_id = prefect.owner("deployments/", deployment(flow_id, command) | {"name": "control"})["id"]
    prefect.owner(f"deployments/{deployment_id}/create_flow_run", SCHEDULED)
    return flow_id, deployment_id


def attacks(prefect: Prefect) -> dict[str, dict[str, Any]]:
    """Return what attackers send along with their posts, by who they are."""
    port = prefect.api.split(":")[2].split("/")[0]
    foreign = {"Host": f"{EVIL}:{port}", "Origin": f"http://{EVIL}:{port}"}
    user, password = prefect.login
    forged = {"Prefect-Csrf-Client": str(uuid.uuid4()), "Prefect-Csrf-Token": "0" * 64}
    tokens = prefect.tokens()
    simple = ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x")
    return {
        "page of another site": {"headers": {"Origin": foreign["Origin"]}},
        "page of another site, by a name that means this machine": {"headers": foreign},
        "page from a file": {"headers": {"Origin": "null"}},
        "page of another port": {"headers": {"Origin": f"http://{LOOPBACK}:1"}, "auth": prefect.login},
        "user of this machine": {},
        "user of this machine who says to be the page": {"headers": {"Origin": f"http://{LOOPBACK}:{port}"}},
        "user with a forged token": {"headers": forged},
        "user with a token of the owner": {"headers": tokens},
        **{
            f"guess {guess}": {"auth": guess, "headers": tokens}
            for guess in (NOBODY, (user, ""), (user, "admin"), (password, user), (user, password[:-1]))
        },
        "another scheme": {"headers": {**tokens, "Authorization": f"Bearer {user}:{password}"}},
        "browser that is logged in": {"auth": prefect.login},
        "browser that is logged in, with a forged token": {"auth": prefect.login, "headers": forged},
        "login and token, from another origin": {
            "auth": prefect.login,
            "headers": {**tokens, "Origin": f"http://{EVIL}"},
        },
        "login and token, by another name": {"auth": prefect.login, "headers": {**tokens, "Host": f"{EVIL}:{port}"}},
        **{f"form of type {kind}": {"headers": {"Content-Type": kind}} for kind in simple},
        **{
            f"form of type {kind} in a browser that is logged in": {
                "headers": {"Content-Type": kind},
                "auth": prefect.login,
            }
            for kind in simple
        },
    }


def test_three_posts_give_nobody_a_shell(stack: Stack) -> None:
    prefect = Prefect(stack)
    folder = stack.parent
    # The posts do what an attacker wants, if the owner sends them.
    flow_id, deployment_id = run_command(prefect, f"touch {folder}/first")
    wait_until((folder / "first").exists, "the owner's command does not run")
    before = prefect.counts()
    answers = {}
    for number, (who, options) in enumerate(attacks(prefect).items()):
        posts = {
            "flows/": {"name": f"attack-{number}"},
            "deployments/": deployment(flow_id, f"touch {folder}/attack-{number}"),
            f"deployments/{deployment_id}/create_flow_run": SCHEDULED,
        }
        answers[who] = [prefect.post(path, content, **dict(options)).status_code for path, content in posts.items()]
    assert {who: found for who, found in answers.items() if not REFUSED.issuperset(found)} == {}
    assert prefect.counts() == before
    # The worker has looked for work since.
    run_command(prefect, f"touch {folder}/second")
    wait_until((folder / "second").exists, "the owner's second command does not run")
    assert list(folder.glob("attack-*")) == []


@pytest.mark.parametrize("path", ["flows/filter", "block_documents/filter", "admin/settings", "csrf-token?client=x"])
def test_prefect_tells_nobody_anything(stack: Stack, path: str) -> None:
    api = Prefect(stack).api
    method = "POST" if path.endswith("filter") else "GET"
    assert ask(method, f"{api}/{path}", content="{}").status_code in REFUSED
    assert ask("OPTIONS", f"{api}/{path}", headers={"Origin": f"http://{EVIL}"}).status_code in REFUSED


@pytest.mark.parametrize(
    "path",
    [
        "events/in",
        "events/out",
        "logs/out",
        "task_runs/subscriptions/scheduled",
        "work_pools/sfgrpo/workers/connect",
    ],
)
def test_websockets_of_prefect_are_as_closed(stack: Stack, path: str) -> None:
    prefect = Prefect(stack)
    url = f"{prefect.api.replace('http', 'ws', 1)}/{path}"
    token = ":".join(prefect.login)
    with pytest.raises(InvalidStatus, match="403"):
        connect(url, origin=f"http://{EVIL}", subprotocols=["prefect"], proxy=None)  # type: ignore[arg-type,list-item]
    # Without the protocol that begins by a login.
    with pytest.raises(InvalidStatus, match="403"):
        connect(url, proxy=None)
    for guess in ("", "sfgrpo:admin", token[:-1]):
        with connect(url, subprotocols=["prefect"], proxy=None) as socket:  # type: ignore[list-item]
            socket.send(json.dumps({"type": "auth", "token": guess}))
            with pytest.raises(ConnectionClosed, match="1008"):
                socket.recv(timeout=20)
    with connect(url, subprotocols=["prefect"], proxy=None) as socket:  # type: ignore[list-item]
        socket.send(json.dumps({"type": "auth", "token": token}))
        assert json.loads(socket.recv(timeout=20))["type"] == "auth_success"


# --- MLflow: models, their files, and its assistant, which runs commands ---

MLFLOW_POSTS: list[tuple[str, str, Mapping[str, object]]] = [
    ("POST", "api/2.0/mlflow/experiments/create", {"name": "attack"}),
    ("POST", "api/2.0/mlflow/experiments/search", {"max_results": 1}),
    ("POST", "api/2.0/mlflow/runs/create", {"experiment_id": "0"}),
    ("PUT", "api/2.0/mlflow-artifacts/artifacts/0/attack.txt", {}),
    ("GET", "api/2.0/mlflow-artifacts/artifacts", {}),
    ("DELETE", "api/2.0/mlflow-artifacts/artifacts/0", {}),
    ("POST", "api/2.0/mlflow-artifacts/mpu/create/0", {"path": "attack.txt", "num_parts": 1}),
    ("POST", "api/2.0/mlflow/registered-models/create", {"name": "attack"}),
    ("POST", "api/2.0/mlflow/registered-models/alias", {"name": "attack", "alias": "champion", "version": "1"}),
    ("DELETE", "api/2.0/mlflow/registered-models/alias?name=attack&alias=champion", {}),
    ("POST", "api/2.0/mlflow/webhooks", {"name": "attack", "url": f"http://{EVIL}", "events": []}),
    ("POST", "api/2.0/mlflow/users/create", {"username": "attack", "password": "password1234"}),
    ("POST", "ajax-api/2.0/mlflow/experiments/create", {"name": "attack"}),
    ("POST", "ajax-api/3.0/mlflow/assistant/message", {"message": "run id"}),
    ("PUT", "ajax-api/3.0/mlflow/assistant/config", {"providers": {}}),
    ("POST", "ajax-api/3.0/jobs/", {"job_name": "attack", "params": {}}),
    ("POST", "graphql", {"query": "{ test { output } }"}),
    ("POST", "v1/traces", {}),
    ("POST", "gateway/attack/mlflow/invocations", {}),
]


@pytest.mark.parametrize(("method", "path", "content"), MLFLOW_POSTS, ids=[path for _, path, _ in MLFLOW_POSTS])
def test_mlflow_does_nothing_for_strangers(stack: Stack, method: str, path: str, content: Mapping[str, object]) -> None:
    environment = stack.environment
    url = f"{environment['MLFLOW_TRACKING_URI']}/{path}"
    user, password = environment["MLFLOW_TRACKING_USERNAME"], environment["MLFLOW_TRACKING_PASSWORD"]
    port = environment["MLFLOW_TRACKING_URI"].split(":")[2]
    strangers: list[dict[str, Any]] = [
        {},
        {"auth": (user, "password1234")},
        {"auth": ("admin", password)},
        {"headers": {"Origin": f"http://{EVIL}"}},
        {"auth": (user, password), "headers": {"Host": f"{EVIL}:{port}"}},
        {"auth": (user, password), "headers": {"Host": f"10.{EVIL}"}},
    ]
    origins = (f"http://{EVIL}", "null", "http://localhost:1", f"http://{LOOPBACK}:1", f"https://{LOOPBACK}:{port}")
    strangers += [{"auth": (user, password), "headers": {"Origin": origin}} for origin in origins]
    answers = [ask(method, url, json=content, **options).status_code for options in strangers]
    assert REFUSED.issuperset(answers), answers


def test_mlflow_answers_its_own_page(stack: Stack) -> None:
    environment = stack.environment
    uri, user = environment["MLFLOW_TRACKING_URI"], environment["MLFLOW_TRACKING_USERNAME"]
    url = f"{uri}/ajax-api/2.0/mlflow/experiments/search"
    login = (user, environment["MLFLOW_TRACKING_PASSWORD"])
    for origin in (uri, uri.replace(LOOPBACK, "localhost")):
        assert ask("POST", url, json={"max_results": 1}, auth=login, headers={"Origin": origin}).is_success


# --- S3, PostgreSQL, the webhook, supervisord ---


@pytest.mark.parametrize("method", ["GET", "PUT", "DELETE", "POST"])
@pytest.mark.parametrize("path", ["", "mlflow", "runs/attack", "v1/AUTH_sfgrpo/runs", "v1/AUTH_sfgrpo/runs/attack"])
def test_s3_lets_nobody_read_or_write(stack: Stack, method: str, path: str) -> None:
    url = f"{stack.environment['AWS_ENDPOINT_URL']}/{path}"
    signed = {
        "Authorization": "AWS4-HMAC-SHA256 Credential=sfgrpo:stack/20260101/us-east-1/s3/aws4_request, "
        f"SignedHeaders=host;x-amz-date, Signature={'0' * 64}",
        "X-Amz-Date": "20260101T000000Z",
        "X-Amz-Content-SHA256": "UNSIGNED-PAYLOAD",
    }
    for headers in ({}, signed, {"Host": EVIL}, {"X-Auth-Token": "AUTH_tk0"}):
        assert not ask(method, url, headers=headers).is_success


def test_s3_is_as_closed_behind_its_gate(stack: Stack) -> None:
    servers = [process for process in stack.processes() if "swift_process.py" in " ".join(process.cmdline())]
    ports = {
        connection.laddr.port
        for process in servers
        for connection in process.net_connections()
        if connection.status == psutil.CONN_LISTEN
    } - {int(stack.variables["STACK_S3_PORT"])}
    assert len(ports) == 3
    for port in ports:
        for method in ("GET", "PUT", "DELETE", "POST", "HEAD", "REPLICATE", "SSYNC", "UPDATE"):
            for path in ("disk/0/AUTH_sfgrpo/runs/attack", "recon/version", "info", "healthcheck"):
                assert ask(method, f"http://{LOOPBACK}:{port}/{path}").status_code == 403, (port, method, path)


@pytest.mark.parametrize("user", ["postgres", "prefect", "mlflow", "root"])
def test_postgres_lets_nobody_in_without_a_password(stack: Stack, user: str) -> None:
    import psycopg2

    for password in ("", "postgres", user):
        with pytest.raises(psycopg2.OperationalError, match=r"no password supplied|password authentication failed"):
            psycopg2.connect(
                host=LOOPBACK,
                port=int(stack.variables["STACK_POSTGRES_PORT"]),
                dbname="prefect",
                user=user,
                password=password,
                passfile="/dev/null",
            )


def test_the_webhook_starts_nothing_for_strangers(stack: Stack) -> None:
    message = {
        "entity": "model_version_alias",
        "action": "created",
        "data": {"name": "attack", "alias": "challenger", "version": "1"},
    }
    url = f"http://{LOOPBACK}:{stack.variables['STACK_WEBHOOK_PORT']}/"
    for headers in ({}, {"X-MLflow-Signature": "v1,"}, {"Origin": f"http://{EVIL}"}, {"Host": EVIL}):
        assert ask("POST", url, json=message, headers=headers).status_code in REFUSED


def as_another_user() -> dict[str, Any]:
    """Return the options of a subprocess that runs as a user who has nothing to do with the stack."""
    other = pwd.getpwnam(USER)
    return {"user": other.pw_uid, "group": other.pw_gid, "extra_groups": [], "cwd": "/", "env": {"PATH": os.defpath}}


@pytest.mark.skipif(os.geteuid() != 0, reason="only root becomes another user")
def test_another_user_reads_no_file_socket_or_environment_of_the_stack(stack: Stack) -> None:
    folder = stack.folder
    files = [folder.env, folder.secrets, folder.settings, folder.configuration, folder.socket, folder.log("worker")]
    files += [folder.data("mlflow"), folder.data("s3") / "proxy.conf", folder.data("postgres"), folder.temporary]
    files += [Path(f"/proc/{process.pid}/environ") for process in stack.processes()]
    assert [path for path in files if not path.exists()] == []
    # `head` says why it fails for folders and sockets too; only permission counts.
    told = subprocess.run(["head", "-c1", *files], capture_output=True, text=True, **as_another_user()).stderr
    assert [path for path in files if f"'{path}' for reading: Permission denied" not in told] == []


def test_the_owners_clients_get_in(stack: Stack) -> None:
    script = "import mlflow; print(mlflow.search_experiments()[0].name)\n"
    script += "from prefect.client.orchestration import get_client\n"
    script += "with get_client(sync_client=True) as client: print(client.read_work_pool('sfgrpo').type)"
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", script],
        env=stack.environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.splitlines() == ["Default", "process"]
