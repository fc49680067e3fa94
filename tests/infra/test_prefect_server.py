"""The guard before Prefect's server: whom it answers, and that it does not start without its protections."""

from __future__ import annotations

import sys

import pytest
from prefect.settings import PREFECT_SERVER_CORS_ALLOWED_ORIGINS, temporary_settings
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.routing import Route, WebSocketRoute
from starlette.testclient import TestClient
from starlette.websockets import WebSocket, WebSocketDisconnect

from infra.prefect_server.serve import OwnSiteOnly, main, own_origins

# Not ours to mend: Starlette's deprecation of the client under its test client.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

OWN = ["http://127.0.0.1:4200", "http://localhost:4200", "https://Prefect.example"]
FOREIGN_HOSTS = [
    "evil.example",
    "evil.example:4200",
    "127.0.0.1",
    "127.0.0.1:4201",
    "127.0.0.1:4200.evil.example",
    "localhost:4200@evil.example",
    "127.1:4200",
    "[::1]:4200",
    "0.0.0.0:4200",
    "localhost.:4200",
    "",
]
FOREIGN_ORIGINS = [
    "http://evil.example",
    "https://127.0.0.1:4200",
    "http://127.0.0.1:3000",
    "http://127.0.0.1",
    "http://localhost",
    "http://127.0.0.1:4200.evil.example",
    "null",
    "file://",
    "",
]


async def _answer(request: Request) -> PlainTextResponse:
    return PlainTextResponse("done")


async def _talk(websocket: WebSocket) -> None:
    await websocket.accept()
    await websocket.send_text("done")
    await websocket.close()


@pytest.fixture(scope="module")
def client() -> TestClient:
    methods = ["GET", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"]
    app = Starlette(routes=[Route("/", _answer, methods=methods), WebSocketRoute("/socket", _talk)])
    return TestClient(OwnSiteOnly(app, own_origins(",".join(OWN))))


def open_socket(client: TestClient, headers: dict[str, str]) -> str:
    with client.websocket_connect("/socket", headers=headers) as socket:
        return socket.receive_text()


@pytest.mark.parametrize("host", ["127.0.0.1:4200", "LOCALHOST:4200", "prefect.example"])
@pytest.mark.parametrize("origin", [None, "http://localhost:4200", "https://prefect.example"])
def test_own_addresses_are_answered(client: TestClient, host: str, origin: str | None) -> None:
    headers = {"Host": host} | ({} if origin is None else {"Origin": origin})
    assert client.post("/", headers=headers).text == "done"
    assert open_socket(client, headers) == "done"


@pytest.mark.parametrize("method", ["GET", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"])
@pytest.mark.parametrize("headers", [{"Host": "evil.example"}, {"Host": "localhost:4200", "Origin": "null"}])
def test_no_method_is_let_through(client: TestClient, method: str, headers: dict[str, str]) -> None:
    assert client.request(method, "/", headers=headers).status_code == 403


@pytest.mark.parametrize("host", FOREIGN_HOSTS)
def test_another_host_is_refused(client: TestClient, host: str) -> None:
    answer = client.post("/", headers={"Host": host})
    assert (answer.status_code, answer.text) == (403, "this server has another Host")
    with pytest.raises(WebSocketDisconnect) as refused:
        open_socket(client, {"Host": host})
    assert refused.value.reason == "this server has another Host"


@pytest.mark.parametrize("origin", FOREIGN_ORIGINS)
def test_another_origin_is_refused(client: TestClient, origin: str) -> None:
    headers = {"Host": "127.0.0.1:4200", "Origin": origin}
    answer = client.post("/", headers=headers)
    assert (answer.status_code, answer.text) == (403, "pages of another Origin get no answer")
    with pytest.raises(WebSocketDisconnect) as refused:
        open_socket(client, headers)
    assert refused.value.reason == "pages of another Origin get no answer"


@pytest.mark.parametrize("name", ["Host", "Origin"])
def test_a_header_that_comes_twice_is_refused(client: TestClient, name: str) -> None:
    value = {"Host": "127.0.0.1:4200", "Origin": "http://127.0.0.1:4200"}
    headers = [*value.items(), (name, value[name])]
    assert client.post("/", headers=headers).status_code == 403


@pytest.mark.parametrize(
    "setting",
    ["*", "", "http://127.0.0.1:4200,*", "https://*.example", "127.0.0.1:4200", "http://a/b", "ftp://a", "http://a,"],
)
def test_only_whole_addresses_are_taken(setting: str) -> None:
    with pytest.raises(ValueError, match=r"PREFECT_SERVER_CORS_ALLOWED_ORIGINS: '.*' is no address such as http://127"):
        own_origins(setting)


def test_the_server_does_not_start_open_to_every_page(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["serve.py", "--host", "127.0.0.1", "--port", "1"])
    with pytest.raises(SystemExit, match=r"error: PREFECT_SERVER_CORS_ALLOWED_ORIGINS: '\*' is no address"):
        main()


def test_the_server_does_not_start_without_tokens_against_forged_requests(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["serve.py", "--host", "127.0.0.1", "--port", "1"])
    with (
        temporary_settings({PREFECT_SERVER_CORS_ALLOWED_ORIGINS: OWN[0]}),
        pytest.raises(SystemExit, match="error: PREFECT_SERVER_CSRF_PROTECTION_ENABLED is off; set it to true"),
    ):
        main()
