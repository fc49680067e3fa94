"""Questions to the programs of the stack, by HTTP on this machine."""

from __future__ import annotations

import base64
import contextlib
import json
import urllib.error
import urllib.request
from collections.abc import Iterator
from http.client import HTTPException, HTTPResponse
from typing import Any

from infra.stack.errors import UnhealthyError

TIMEOUT_S = 5.0

_opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))


def ask(url: str, question: object = None, credentials: str | None = None) -> Any:
    """Gets a JSON document, or posts one and gets the answer; raises `UnhealthyError` for every other outcome.

    `credentials` are a user and a password with a colon between them.
    """
    request = urllib.request.Request(url, headers={"Content-Type": "application/json"})
    if question is not None:
        request.data = json.dumps(question).encode()
    if credentials is not None:
        request.add_header("Authorization", f"Basic {base64.b64encode(credentials.encode()).decode()}")
    try:
        with _opening(request) as answer:
            return json.load(answer)
    except urllib.error.HTTPError as error:
        error.close()
        raise UnhealthyError(f"it answers with status {error.code}") from error
    except ValueError as error:
        raise UnhealthyError("it answers with something that is no JSON") from error


def require_answer(url: str) -> None:
    """Raises `UnhealthyError` unless a server answers, whatever it says short of a failure of its own."""
    try:
        with _opening(urllib.request.Request(url)):
            pass
    except urllib.error.HTTPError as error:
        error.close()
        if error.code >= 500:
            raise UnhealthyError(f"it answers with status {error.code}") from error


@contextlib.contextmanager
def _opening(request: urllib.request.Request) -> Iterator[HTTPResponse]:
    try:
        with _opener.open(request, timeout=TIMEOUT_S) as answer:
            yield answer
    except urllib.error.HTTPError:
        raise
    except urllib.error.URLError as error:
        raise UnhealthyError(f"it does not answer ({error.reason})") from error
    except (OSError, HTTPException) as error:
        raise UnhealthyError(f"it does not answer ({type(error).__name__})") from error
