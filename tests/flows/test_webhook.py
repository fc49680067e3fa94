"""The receiver of the registry's webhooks: who is believed, what is started, and a real delivery by a real server."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import hashlib
import json
import os
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from typing import Any

import pytest
from fastapi.testclient import TestClient

from flows import webhook
from flows.webhook import MAX_AGE_S, MAX_BYTES, main, make_app
from sfgrpo.registry.webhook import register_webhook
from sfgrpo.tracking.mlflow_client import connect
from tests.support.paths import ROOT
from tests.support.stores import free_port, make_versions, mlflow_server, wait_for_answer

# Not ours to mend: deprecations of MLflow, Starlette and what they import.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")

SECRET = "whsec-of-the-tests"
EVENT = {
    "entity": "model_version_alias",
    "action": "created",
    "timestamp": "2026-01-01T00:00:00+00:00",
    "data": {"name": "toy", "alias": "challenger", "version": "3"},
}


def hmac_by_hand(key: bytes, message: bytes) -> bytes:
    """RFC 2104, written out."""
    key = key.ljust(64, b"\0")
    inner = hashlib.sha256(bytes(byte ^ 0x36 for byte in key) + message).digest()
    return hashlib.sha256(bytes(byte ^ 0x5C for byte in key) + inner).digest()


def headers(body: bytes, *, secret: str = SECRET, delivery: str = "d-1", age_s: float = 0.0) -> dict[str, str]:
    """Return what MLflow sends with a message."""
    timestamp = str(int(time.time() - age_s))
    signature = hmac_by_hand(secret.encode(), f"{delivery}.{timestamp}.".encode() + body)
    return {
        "X-MLflow-Delivery-Id": delivery,
        "X-MLflow-Timestamp": timestamp,
        "X-MLflow-Signature": f"v1,{base64.b64encode(signature).decode()}",
        "Content-Type": "application/json",
    }


class Starts:
    """Record what would be started."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, int, str]] = []
        self.error: Exception | None = None
        self.pause_s = 0.0

    async def __call__(self, model: str, version: int, key: str) -> str:
        if self.error is not None:
            raise self.error
        await asyncio.sleep(self.pause_s)
        self.calls.append((model, version, key))
        return "flow-run"


@pytest.fixture
def starts() -> Starts:
    return Starts()


@pytest.fixture
def receiver(starts: Starts) -> Iterator[TestClient]:
    with TestClient(make_app(SECRET, starts)) as client:
        yield client


def send(receiver: TestClient, message: Any = EVENT, **options: Any) -> Any:
    body = message if isinstance(message, bytes) else json.dumps(message).encode()
    return receiver.post("/", content=body, headers=headers(body, **options))


def test_new_challenger_starts_its_promotion(receiver, starts):
    answer = send(receiver)
    assert (answer.status_code, answer.json()) == (202, {"started": "flow-run"})
    assert starts.calls == [("toy", 3, "d-1")]


def test_signature_is_mlflows(receiver):
    from mlflow.webhooks.delivery import _generate_hmac_signature

    assert webhook.signature_of(SECRET, "d", "7", b"{}") == _generate_hmac_signature(SECRET, "d", "7", "{}")


@pytest.mark.parametrize("age_s", [-MAX_AGE_S + 5, MAX_AGE_S - 5])
def test_clocks_may_differ(receiver, age_s):
    assert send(receiver, age_s=age_s).status_code == 202


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"secret": "guessed"}, "wrong signature"),
        ({"age_s": MAX_AGE_S + 5}, "too old"),
        ({"age_s": -MAX_AGE_S - 5}, "too old"),
    ],
)
def test_message_of_somebody_else_starts_nothing(receiver, starts, options, reason):
    answer = send(receiver, **options)
    assert (answer.status_code, answer.json()["detail"]) == (401, reason)
    assert starts.calls == []


@pytest.mark.parametrize("header", ["X-MLflow-Delivery-Id", "X-MLflow-Timestamp", "X-MLflow-Signature"])
def test_message_without_a_header_starts_nothing(receiver, starts, header):
    body = json.dumps(EVENT).encode()
    sent = headers(body)
    del sent[header]
    assert receiver.post("/", content=body, headers=sent).status_code == 401
    assert starts.calls == []


@pytest.mark.parametrize("part", ["body", "X-MLflow-Delivery-Id", "X-MLflow-Timestamp"])
def test_signature_covers_all_of_the_message(receiver, starts, part):
    body = json.dumps(EVENT).encode()
    sent = headers(body)
    if part == "body":
        body = body.replace(b'"3"', b'"4"')
    else:
        sent[part] = sent[part][:-1] + ("0" if sent[part][-1] != "0" else "1")
    assert receiver.post("/", content=body, headers=sent).status_code == 401
    assert starts.calls == []


def test_message_that_came_before_is_refused(receiver, starts):
    body = json.dumps(EVENT).encode()
    sent = headers(body)
    statuses = [receiver.post("/", content=body, headers=sent).status_code for _ in range(2)]
    assert statuses == [202, 401]
    assert len(starts.calls) == 1


def test_message_of_which_nothing_came_may_come_again(receiver, starts):
    starts.error = OSError("no Prefect")
    assert send(receiver).status_code == 503
    starts.error = None
    assert send(receiver).status_code == 202
    assert len(starts.calls) == 1


@pytest.mark.parametrize(
    "message",
    [
        {**EVENT, "data": {"name": "toy", "alias": "champion", "version": "3"}},
        {**EVENT, "action": "deleted", "data": {"name": "toy", "alias": "challenger"}},
        {**EVENT, "entity": "registered_model"},
    ],
)
def test_other_events_start_nothing(receiver, starts, message):
    assert (send(receiver, message).status_code, starts.calls) == (202, [])


def challenger(**data: Any) -> dict[str, Any]:
    return {**EVENT, "data": {"name": "toy", "alias": "challenger", "version": "3", **data}}


@pytest.mark.parametrize("version", ["3", 3])
def test_version_is_a_number_or_its_digits(receiver, starts, version):
    assert (send(receiver, challenger(version=version)).status_code, starts.calls) == (202, [("toy", 3, "d-1")])


@pytest.mark.parametrize(
    "message",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b'"text"',
        b"\xff\xfe",
        b"\xef\xbb\xbf{}",
        b"[" * 60_000,
        b'{"a":' * 10_000,
        b"9" * 5_000,
        {"entity": "x"},
        {**EVENT, "data": {"alias": "challenger"}},
        {**EVENT, "data": None},
        {**EVENT, "data": []},
        {**EVENT, "data": "challenger"},
        *(
            challenger(version=version)
            for version in (
                *(float("inf"), float("-inf"), float("nan"), 3.0, 3.7, True, False, None, 0, -1, 10**30, [], ["3"], {}),
                *("", "0", "-1", "+3", "3.0", "03", " 3", "3\n", "3_0", "1e3", "٣", "Infinity", "9" * 5_000),
            )
        ),
        *(challenger(name=name) for name in ("", None, 3, True, [], ["toy"], {}, "a\nb", "a\x00b", "\ud800")),
    ],
    ids=lambda message: repr(message)[-60:],
)
def test_signed_nonsense_is_told(receiver, starts, message):
    answer = send(receiver, message)
    assert (answer.status_code, starts.calls) == (400, [])
    assert answer.json()["detail"].startswith("no message of MLflow's registry")


@pytest.mark.parametrize("timestamp", ["9" * 5_000, "0" * 20, "", "-1", "1e9", "1_0", "٣", "²", "inf", " 1"])
def test_signed_nonsense_as_timestamp_is_too_old(timestamp):
    given = {"x-mlflow-delivery-id": "d", "x-mlflow-timestamp": timestamp}
    given["x-mlflow-signature"] = webhook.signature_of(SECRET, "d", timestamp, b"{}")
    assert webhook.refusal(SECRET, given, b"{}", webhook.Deliveries(), 0.0) == "too old"


@pytest.mark.parametrize("delivery", ["x" * 101, "a b"])
def test_signed_nonsense_as_id_is_told(receiver, starts, delivery):
    assert (send(receiver, delivery=delivery).status_code, starts.calls) == (400, [])


def test_promotion_that_prefect_does_not_start_in_time_is_told(receiver, starts, monkeypatch):
    monkeypatch.setattr(webhook, "START_TIMEOUT_S", 0.05)
    starts.pause_s = 10.0
    assert send(receiver).status_code == 503
    starts.pause_s = 0.0
    assert send(receiver).status_code == 202


@pytest.fixture
def listening(starts: Starts, monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """A receiver on a real port, whose connections last a second; yield the port."""
    monkeypatch.setattr(webhook, "CONNECTION_TIMEOUT_S", 1.0)
    port = free_port()
    server = webhook.make_server(make_app(SECRET, starts), "127.0.0.1", port)
    thread = threading.Thread(target=asyncio.run, args=[server.serve()])
    thread.start()
    try:
        while not server.started:
            time.sleep(0.01)
        yield port
    finally:
        server.should_exit = True
        thread.join()


HALVES = [
    b"",
    b"POST / HT",
    b"POST / HTTP/1.1\r\nHost: x\r\n",
    b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\n{",
    b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n4\r\n{",
    b"GET /health HTTP/1.1\r\nHost: x\r\n\r\nPOST / HTTP/1.1\r\n",
    b"POST / HTTP/1.1\r\nHost: x\r\nExpect: 100-continue\r\nContent-Length: 9\r\n\r\n",
]


def test_half_sent_requests_end_in_time_while_others_are_answered(listening, starts):
    with contextlib.ExitStack() as held:
        connections = []
        for half in HALVES * 20:
            connections.append(held.enter_context(socket.create_connection(("127.0.0.1", listening))))
            connections[-1].sendall(half)
        body = json.dumps(EVENT).encode()
        request = urllib.request.Request(f"http://127.0.0.1:{listening}/", data=body, headers=headers(body))
        with urllib.request.urlopen(request, timeout=10) as answer:
            assert answer.status == 202
        for connection in connections:
            connection.settimeout(10)
            with contextlib.suppress(ConnectionResetError):
                while connection.recv(4096):
                    pass
    assert len(starts.calls) == 1


def test_message_that_is_too_large_is_not_read(receiver):
    answer = send(receiver, b" " * (MAX_BYTES + 1))
    assert (answer.status_code, answer.json()["detail"]) == (400, f"more than {MAX_BYTES} bytes")


def test_health_is_told_without_a_signature(receiver):
    assert receiver.get("/health").json() == {"status": "ok"}


def test_receiver_without_a_secret_does_not_start(monkeypatch, capsys):
    monkeypatch.delenv("WEBHOOK_SECRET", raising=False)
    assert main(["--port", "1"]) == 2
    assert "WEBHOOK_SECRET is not set; give the secret" in capsys.readouterr().err


def test_webhook_needs_a_server_to_call_it(monkeypatch, capsys):
    monkeypatch.setenv("WEBHOOK_SECRET", SECRET)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:///mlflow.db")
    assert main(["--register", "http://127.0.0.1:1/"]) == 2
    assert "'sqlite:///mlflow.db' is not a server; only a server calls webhooks" in capsys.readouterr().err


LISTENER = """
import sys, uvicorn
from flows.webhook import make_app, read_secret

async def start(model, version, key):
    print("started", model, version, flush=True)
    return key

uvicorn.run(make_app(read_secret(), start), host="127.0.0.1", port=int(sys.argv[1]), log_level="warning")
"""


@pytest.mark.slow
def test_real_server_delivers_to_a_real_receiver_once_it_is_registered(tmp_path):
    from cryptography.fernet import Fernet

    port = free_port()
    settings = {
        "MLFLOW_WEBHOOK_ALLOWED_SCHEMES": "http,https",
        "MLFLOW_WEBHOOK_ALLOW_PRIVATE_IPS": "true",
        "MLFLOW_WEBHOOK_SECRET_ENCRYPTION_KEY": Fernet.generate_key().decode(),
    }
    root = ROOT
    environment = {**os.environ, "WEBHOOK_SECRET": SECRET, "PYTHONPATH": str(root)}
    command = [sys.executable, "-W", "ignore", "-c", LISTENER, str(port)]
    receiver = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
    try:
        with mlflow_server(tmp_path, settings) as uri:
            url = f"http://127.0.0.1:{port}/"
            wait_for_answer(f"{url}health", receiver)
            client = connect(uri)
            make_versions(client, "toy", 2)
            first = register_webhook(uri, webhook.NAME, "http://127.0.0.1:1/", "old")
            assert register_webhook(uri, webhook.NAME, url, SECRET) == first
            assert [(hook.name, hook.url) for hook in client.list_webhooks()] == [(webhook.NAME, url)]
            client.set_registered_model_alias("toy", "champion", "1")
            client.set_registered_model_alias("toy", "challenger", "2")
            assert receiver.stdout is not None
            assert receiver.stdout.readline() == "started toy 2\n"
    finally:
        receiver.kill()
        receiver.communicate()


@pytest.mark.slow
def test_program_serves_and_answers_on_the_loopback_interface(tmp_path):
    port = free_port()
    environment = {**os.environ, "WEBHOOK_SECRET": SECRET}
    process = subprocess.Popen(
        [sys.executable, "-m", "flows.webhook", "--port", str(port)],
        env=environment,
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        wait_for_answer(f"http://127.0.0.1:{port}/health", process)
        request = urllib.request.Request(f"http://127.0.0.1:{port}/", data=b"{}", method="POST")
        with pytest.raises(urllib.error.HTTPError, match="401"):
            urllib.request.urlopen(request, timeout=10)
    finally:
        process.terminate()
        assert process.wait(20) in (0, -15)
