"""Webhook that starts a promotion when MLflow's registry has a new challenger: `python -m flows.webhook --port P`.

Every message is signed with a secret that MLflow and this program share, WEBHOOK_SECRET. Messages with a wrong
signature, old ones and repeated ones are refused. A valid message starts a run of the deployment `promote/on-request`;
a message that MLflow sends again, because it got no answer, starts no second run.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import hashlib
import hmac
import json
import logging
import os
import re
import signal
import sys
import time
from collections.abc import Awaitable, Callable
from typing import Any

import uvicorn
from fastapi import FastAPI, HTTPException, Request
from uvicorn.protocols.http.auto import AutoHTTPProtocol

from sfgrpo.errors import ConfigError
from sfgrpo.runtime.environment import read_environment
from sfgrpo.runtime.redaction import without_credentials, without_secrets

DEPLOYMENT = "promote/on-request"
CHALLENGER = "challenger"
"""Alias that requests a promotion."""
NAME = "sfgrpo-promotion"
"""Name of the webhook in MLflow."""
SECRET_VARIABLE = "WEBHOOK_SECRET"
MAX_BYTES = 64 * 1024
"""Largest size of a message; MLflow's have some 200 bytes."""
MAX_AGE_S = 300
"""Largest age of a message, in either direction, since clocks differ."""
START_TIMEOUT_S = 20.0
"""How long Prefect may take to accept a run. MLflow waits 30 seconds for an answer."""
CONNECTION_TIMEOUT_S = 30.0
"""How long a connection may last, whatever it has sent by then: a message needs a second."""
MAX_CONNECTIONS = 500
"""More get status 503, upon which MLflow sends its message again."""

logger = logging.getLogger(__name__)

Start = Callable[[str, int, str], Awaitable[str]]
"""Starts the promotion of a version of a model, once for each idempotency key; returns the id of the run."""


class Deliveries:
    """The ids of accepted messages, kept until the messages would be refused as too old."""

    def __init__(self) -> None:
        self._accepted: dict[str, float] = {}

    def is_new(self, delivery_id: str, now_s: float) -> bool:
        """Return whether no message of this id was accepted."""
        self._accepted = {key: when_s for key, when_s in self._accepted.items() if now_s - when_s <= 2 * MAX_AGE_S}
        return delivery_id not in self._accepted

    def accept(self, delivery_id: str, now_s: float) -> None:
        """Record a message as accepted, so that it is refused from now on."""
        self._accepted[delivery_id] = now_s

    def forget(self, delivery_id: str) -> None:
        """Accept a message once more, since it started nothing."""
        self._accepted.pop(delivery_id, None)


def signature_of(secret: str, delivery_id: str, timestamp: str, body: bytes) -> str:
    """Return the signature that MLflow gives a message."""
    signed = f"{delivery_id}.{timestamp}.".encode() + body
    return "v1," + base64.b64encode(hmac.new(secret.encode(), signed, hashlib.sha256).digest()).decode()


def refusal(secret: str, headers: dict[str, str], body: bytes, deliveries: Deliveries, now_s: float) -> str | None:
    """Return why a message is refused, or None."""
    delivery_id = headers.get("x-mlflow-delivery-id", "")
    timestamp = headers.get("x-mlflow-timestamp", "")
    given = headers.get("x-mlflow-signature", "")
    expected = signature_of(secret, delivery_id, timestamp, body)
    # The signature comes first and takes constant time, so that a forger learns nothing.
    if not hmac.compare_digest(given.encode(), expected.encode()):
        return "wrong signature"
    if not re.fullmatch("[0-9]{1,12}", timestamp) or abs(now_s - int(timestamp)) > MAX_AGE_S:
        return "too old"
    return None if deliveries.is_new(delivery_id, now_s) else "seen before"


def challenger_of(body: bytes) -> tuple[str, int] | None:
    """Return the model and version that became challenger; None if the message is about something else.

    Raises:
        ValueError: this is no message of MLflow's registry.
    """
    try:
        message = json.loads(body)
        if (message["entity"], message["action"]) != ("model_version_alias", "created"):
            return None
        data = message["data"]
        if data["alias"] != CHALLENGER:
            return None
        name, version = data["name"], data["version"]
        if not isinstance(name, str) or not name or not name.isprintable():
            raise ValueError("its name is no text")
        # A number is taken too, but True, 1.5 and Infinity are no versions, though int() would make them some.
        if isinstance(version, bool) or not re.fullmatch("[1-9][0-9]{0,8}", str(version)):
            raise ValueError("its version is no number")
        return name, int(version)
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"no message of MLflow's registry: {type(error).__name__} {str(error)[:200]!r}") from error


def make_app(secret: str, start: Start) -> FastAPI:
    """Make the application: `POST /` for MLflow, `GET /health` for health checks."""
    app = FastAPI(title="Promotions on request", docs_url=None, redoc_url=None, openapi_url=None)
    deliveries = Deliveries()

    @app.get("/health")
    async def health() -> dict[str, str]:
        return {"status": "ok"}

    @app.post("/", status_code=202)
    async def receive(request: Request) -> dict[str, Any]:
        body = await _body(request)
        now_s = time.time()
        if reason := refusal(secret, dict(request.headers), body, deliveries, now_s):
            logger.warning("refused a message: %s", reason)
            raise HTTPException(401, reason)
        try:
            challenger = challenger_of(body)
        except ValueError as error:
            raise HTTPException(400, str(error)) from error
        delivery_id = request.headers["x-mlflow-delivery-id"]
        if not re.fullmatch("[!-~]{1,100}", delivery_id):
            raise HTTPException(400, "the id of the delivery is not 1 to 100 printable characters")
        deliveries.accept(delivery_id, now_s)
        if challenger is None:
            return {"started": None}
        try:
            async with asyncio.timeout(START_TIMEOUT_S):
                run_id = await start(*challenger, delivery_id)
        except Exception as error:
            # MLflow will send it again.
            deliveries.forget(delivery_id)
            logger.exception("the promotion of version %d of %s was not started", challenger[1], challenger[0])
            raise HTTPException(503, "Prefect did not start the promotion") from error
        logger.info("version %d of %s is challenger: flow run %s", challenger[1], challenger[0], run_id)
        return {"started": run_id}

    return app


async def start_promotion(model: str, version: int, key: str) -> str:
    """Start the deployment; return the id of the flow run without waiting for it."""
    from prefect.deployments import arun_deployment

    run = await arun_deployment(
        DEPLOYMENT,
        parameters={"model": model, "version": version},
        timeout=0,
        idempotency_key=key,
        as_subflow=False,
    )
    return str(run.id)


async def _body(request: Request) -> bytes:
    """Read a message; refuse it once it has more than `MAX_BYTES`."""
    body = b""
    async for chunk in request.stream():
        body += chunk
        if len(body) > MAX_BYTES:
            raise HTTPException(400, f"more than {MAX_BYTES} bytes")
    return body


class ShortConnection(AutoHTTPProtocol):  # type: ignore[misc,valid-type]
    """HTTP over connections that end in time: uvicorn waits for ever for the second half of a request."""

    def connection_made(self, transport: asyncio.Transport) -> None:
        """Begin the time that the connection has."""
        super().connection_made(transport)
        self._timeout = asyncio.get_running_loop().call_later(CONNECTION_TIMEOUT_S, transport.abort)

    def connection_lost(self, error: Exception | None) -> None:
        """Forget it."""
        self._timeout.cancel()
        super().connection_lost(error)


def make_server(app: FastAPI, host: str, port: int) -> uvicorn.Server:
    """Make the server of the application."""
    return uvicorn.Server(
        uvicorn.Config(
            app, host=host, port=port, log_level="warning", http=ShortConnection, limit_concurrency=MAX_CONNECTIONS
        )
    )


def read_secret() -> str:
    """Read the secret that MLflow signs with.

    Raises:
        ConfigError: the variable is not set.
    """
    secret = os.environ.get(SECRET_VARIABLE, "")
    if not secret:
        raise ConfigError(f"environment: {SECRET_VARIABLE} is not set; give the secret that the webhook has in MLflow")
    return secret


def main(arguments: list[str] | None = None) -> int:
    """Serve until stopped, or register the webhook; return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m flows.webhook", description="Starts promotions for MLflow.")
    form = parser.add_mutually_exclusive_group(required=True)
    form.add_argument("--port", type=int, help="listen on this port")
    form.add_argument("--register", metavar="URL", help="register URL as webhook of the MLflow server, and exit")
    parser.add_argument("--host", default="127.0.0.1", help="listen on this address; only this machine's unless given")
    chosen = parser.parse_args(arguments)
    try:
        secret = read_secret()
        if chosen.register is not None:
            _register(chosen.register, secret)
            return 0
    except ConfigError as error:
        print(without_secrets(f"error: {error}"), file=sys.stderr)
        return 2
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    # To be stopped is how a server ends: uvicorn closes what is open, then raises the signal again.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)
    make_server(make_app(secret, start_promotion), chosen.host, chosen.port).run()
    return 0


def _register(url: str, secret: str) -> None:
    from sfgrpo.registry.webhook import register_webhook

    uri = read_environment().tracking_uri
    address = without_credentials(uri)
    if not uri.startswith(("http://", "https://")):
        raise ConfigError(
            f"environment: MLFLOW_TRACKING_URI: {address!r} is not a server; only a server calls webhooks"
        )
    print(f"webhook {register_webhook(uri, NAME, url, secret)} of {address} calls {without_secrets(url)}")


if __name__ == "__main__":
    sys.exit(main())
