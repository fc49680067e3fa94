"""Prefect's server, closed to the pages of other sites: `serve.py --host 127.0.0.1 --port 4200`.

Prefect answers any Host and any Origin, so that a page in a browser on this machine could talk to it, by its address or
by a name of its own that comes to mean this machine. Here a request is answered only if its Host, and its Origin where
it has one, are among PREFECT_SERVER_CORS_ALLOWED_ORIGINS. That holds for WebSockets too, which Prefect's check of
tokens (CSRF) does not see. All else is Prefect's: its settings come from the environment, the login is
PREFECT_SERVER_API_AUTH_STRING.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable
from urllib.parse import urlsplit

import uvicorn
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Receive, Scope, Send


class OwnSiteOnly:
    """Application that answers only requests which name its own address."""

    def __init__(self, app: ASGIApp, origins: Iterable[str]) -> None:
        """Guard an application whose addresses are `origins`, each a scheme, a host and a port."""
        self._app = app
        self._origins = frozenset(origin.lower() for origin in origins)
        self._hosts = frozenset(urlsplit(origin).netloc for origin in self._origins)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer, or refuse: HTTP with status 403, a WebSocket before it opens."""
        if scope["type"] == "lifespan" or (problem := self._problem(scope)) is None:
            await self._app(scope, receive, send)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008, "reason": problem})
        else:
            await PlainTextResponse(problem, status_code=403)(scope, receive, send)

    def _problem(self, scope: Scope) -> str | None:
        hosts, origins = (
            [value.decode("latin-1").lower() for name, value in scope["headers"] if name == wanted]
            for wanted in (b"host", b"origin")
        )
        # More than one of a kind is read differently by different servers.
        if len(hosts) != 1 or hosts[0] not in self._hosts:
            return "this server has another Host"
        if origins and (len(origins) != 1 or origins[0] not in self._origins):
            return "pages of another Origin get no answer"
        return None


def own_origins(setting: str) -> list[str]:
    """Split PREFECT_SERVER_CORS_ALLOWED_ORIGINS into addresses.

    Raises:
        ValueError: one of them is no address of a server, such as `*`.
    """
    origins = [origin.strip() for origin in setting.split(",")]
    for origin in origins:
        parts = urlsplit(origin)
        if parts.scheme not in ("http", "https") or origin != f"{parts.scheme}://{parts.netloc}" or "*" in origin:
            raise ValueError(
                f"PREFECT_SERVER_CORS_ALLOWED_ORIGINS: {origin!r} is no address such as http://127.0.0.1:4200; "
                "name every address by which browsers and clients reach this server"
            )
    return origins


def main() -> None:
    """Serve until told to stop, as `prefect server start` does."""
    from prefect.settings import get_current_settings

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--host", required=True, help="address to listen on")
    parser.add_argument("--port", type=int, required=True, help="port to listen on")
    parser.add_argument("--no-services", action="store_true", help="leave scheduling and events to another process")
    arguments = parser.parse_args()
    server = get_current_settings().server
    try:
        origins = own_origins(server.api.cors_allowed_origins)
    except ValueError as error:
        sys.exit(f"error: {error}")
    if not server.api.csrf_protection_enabled:
        sys.exit("error: PREFECT_SERVER_CSRF_PROTECTION_ENABLED is off; set it to true")
    # After the checks, since it takes seconds.
    from prefect.server.api.server import create_app

    uvicorn.run(
        OwnSiteOnly(create_app(final=True, webserver_only=arguments.no_services), origins),
        host=arguments.host,
        port=arguments.port,
        timeout_keep_alive=server.api.keepalive_timeout,
        ws_ping_interval=server.api.websocket_ping_interval,
        ws_ping_timeout=server.api.websocket_ping_timeout,
        log_level=server.logging_level.lower(),
    )


if __name__ == "__main__":
    main()
