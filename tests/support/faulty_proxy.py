"""An HTTP proxy in front of a real server that does what networks and overloaded servers do; for tests."""

from __future__ import annotations

import http.client
import http.server
import socketserver
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any, Literal

HOST = "127.0.0.1"
UPSTREAM_TIMEOUT_S = 60.0
NUM_SLOW_PIECES = 20

Mode = Literal["pass", "refuse", "hang", "slow", "status", "cut_request", "cut_answer", "lose_answer", "short", "flip"]


class FaultyProxy:
    """Passes requests on, or does to them what `mode` says; notes every request that it read.

    `refuse` closes the port, `hang` keeps a request until the mode changes, `slow` sends the answer bit by bit over
    `slow_s` seconds, `status` answers by itself with `status`, `cut_request` hangs up without passing on, `cut_answer`
    in the middle of the answer, `lose_answer` instead of an answer to a request that was carried out; `short` sends
    half of the body as if it were all, and `flip` a body with one bit changed.
    """

    def __init__(self, target: int) -> None:
        """Listens on a port of its own, before `target` on this machine."""
        self.requests: list[tuple[str, str]] = []
        self.every = 1
        """Only every so-manieth of the requests that are hit at all is hit."""
        self.at_most: int | None = None
        """Requests that are hit before all others pass."""
        self.hits: Callable[[str, str], bool] = lambda method, path: True
        """Which requests, by method and path, the fault is for."""
        self.status: tuple[int, str] = (500, "InternalError")
        """Status, and code in the body, of the mode `status`."""
        self.slow_s = 1.0
        self.num_faults = 0
        """Requests that were hit so far."""
        self._target = target
        self._mode: Mode = "pass"
        self._changed = threading.Condition()
        self._num_eligible = 0
        self._listen(0)

    @property
    def url(self) -> str:
        return f"http://{HOST}:{self.port}"

    @property
    def mode(self) -> Mode:
        return self._mode

    @mode.setter
    def mode(self, mode: Mode) -> None:
        before, self._mode = self._mode, mode
        with self._changed:
            self._changed.notify_all()
        if mode == "refuse" != before:
            self._deafen()
        elif before == "refuse" != mode:
            self._listen(self.port)

    def close(self) -> None:
        """Stop listening, and release hanging requests."""
        if self.mode != "refuse":
            self.mode = "refuse"

    def _listen(self, port: int) -> None:
        proxy = self

        class Handler(_Handler):
            owner = proxy

        self._server = _Server((HOST, port), Handler)
        self.port: int = self._server.server_address[1]
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02})
        self._thread.start()

    def _deafen(self) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def fault_for(self, method: str, path: str) -> Mode:
        """Notes a request and tells what is to become of it."""
        self.requests.append((method, path))
        if self._mode == "pass" or not self.hits(method, path):
            return "pass"
        with self._changed:
            self._num_eligible += 1
            if self._num_eligible % self.every or self.num_faults == self.at_most:
                return "pass"
            self.num_faults += 1
        return self._mode

    def hang(self) -> None:
        """Return when the mode has changed."""
        with self._changed:
            self._changed.wait_for(lambda: self._mode != "hang")

    def forward(
        self, method: str, path: str, body: bytes, headers: Mapping[str, str]
    ) -> tuple[int, dict[str, str], bytes]:
        """Return the status, the headers and the body of the real server's answer."""
        connection = http.client.HTTPConnection(HOST, self._target, timeout=UPSTREAM_TIMEOUT_S)
        try:
            # The signature covers the host, which is passed on as it is.
            connection.request(method, path, body, dict(headers))
            answer = connection.getresponse()
            content = answer.read()
            kept = {
                name: value
                for name, value in answer.getheaders()
                if name.lower() not in ("transfer-encoding", "connection")
            }
            if method != "HEAD" and answer.status != 204:
                kept = {name: value for name, value in kept.items() if name.lower() != "content-length"}
                kept["Content-Length"] = str(len(content))
            return answer.status, kept, content
        finally:
            connection.close()


class _Server(socketserver.ThreadingMixIn, http.server.HTTPServer):
    daemon_threads = True
    block_on_close = False


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    owner: FaultyProxy

    def answer(self) -> None:
        length = int(self.headers.get("Content-Length", 0))
        body = self.rfile.read(length)
        fault = self.owner.fault_for(self.command, self.path)
        if fault == "hang":
            self.owner.hang()
        if fault in ("hang", "refuse", "cut_request"):
            self.close_connection = True
            return
        if fault == "status":
            number, code = self.owner.status
            xml = f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>by the test</Message></Error>".encode()
            self._send(number, {"Content-Length": str(len(xml)), "Content-Type": "application/xml"}, xml, fault)
            return
        try:
            status, headers, content = self.owner.forward(self.command, self.path, body, self.headers)
        except OSError:
            self.close_connection = True
            return
        if fault == "lose_answer":
            self.close_connection = True
            return
        if fault == "short" and content:
            content = content[: len(content) // 2]
            headers["Content-Length"] = str(len(content))
        if fault == "flip" and content:
            content = content[:-1] + bytes([content[-1] ^ 1])
        self._send(status, headers, content, fault)

    def _send(self, status: int, headers: Mapping[str, str], content: bytes, fault: Mode) -> None:
        try:
            self.send_response_only(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command == "HEAD":
                return
            if fault == "cut_answer":
                self.wfile.write(content[: len(content) // 2])
                self.close_connection = True
            elif fault == "slow":
                step = max(1, len(content) // NUM_SLOW_PIECES)
                for start in range(0, len(content), step):
                    time.sleep(self.owner.slow_s / NUM_SLOW_PIECES)
                    self.wfile.write(content[start : start + step])
            else:
                self.wfile.write(content)
        except OSError:  # the client has gone
            self.close_connection = True

    def log_message(self, format: str, *arguments: Any) -> None:
        pass

    do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = answer
