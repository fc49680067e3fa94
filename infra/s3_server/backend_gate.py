"""Gate before Swift's storage servers, which answer everybody: they expect a network of their own.

Whoever reaches their ports could read, write and delete every object without a login. Here they are ports of a machine
that others may use too, so each server wants a key that only the servers of one start know, by BACKEND_GATE_KEY.
"""

from __future__ import annotations

import hmac
import os
from collections.abc import Callable, Iterable
from typing import Any

# mypy runs in .venv; Swift is installed in .venv-s3 alone.
from swift.common import bufferedhttp  # type: ignore[import-not-found]

HEADER = "X-Backend-Gate-Key"
VARIABLE = "BACKEND_GATE_KEY"

Application = Callable[[dict[str, Any], Callable[..., Any]], Iterable[bytes]]


def filter_factory(configuration: dict[str, str], **own: str) -> Callable[[Application], Application]:
    """Return the filter, as Paste wants it."""
    key = os.environ[VARIABLE]

    def gated(app: Application) -> Application:
        def answer(environment: dict[str, Any], start: Callable[..., Any]) -> Iterable[bytes]:
            given = environment.get("HTTP_" + HEADER.upper().replace("-", "_"), "")
            if hmac.compare_digest(given.encode("latin-1"), key.encode()):
                return app(environment, start)
            start("403 Forbidden", [("Content-Type", "text/plain"), ("Connection", "close")])
            return [b"only the servers of this storage get an answer\n"]

        return answer

    return gated


def send_key() -> None:
    """Have this process send the key with each of its requests to storage servers."""
    key = os.environ[VARIABLE]
    connection = bufferedhttp.BufferedHTTPConnection
    plain = connection.putrequest

    def putrequest(self: Any, *arguments: Any, **options: Any) -> Any:
        result = plain(self, *arguments, **options)
        self.putheader(HEADER, key)
        return result

    connection.putrequest = putrequest
