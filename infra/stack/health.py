"""Health checks by HTTP of the programs of the stack."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import httpx

from infra.stack.errors import UnhealthyError

TIMEOUT_S = 5.0


def post_json(
    url: str, content: object, credentials: tuple[str, str] | None = None, headers: Mapping[str, str] | None = None
) -> Any:
    """Post a JSON document and return the JSON answer; raise `UnhealthyError` for every other outcome.

    `credentials` are user and password.
    """
    with _client(credentials) as client:
        return _json_of(client.post(url, json=content, headers=headers))


def get_json(url: str, credentials: tuple[str, str] | None = None) -> Any:
    """Return a JSON document; raise `UnhealthyError` for every other outcome."""
    with _client(credentials) as client:
        return _json_of(client.get(url))


def _json_of(answer: httpx.Response) -> Any:
    if not answer.is_success:
        raise UnhealthyError(f"it answers with status {answer.status_code}")
    try:
        return answer.json()
    except ValueError as error:
        raise UnhealthyError("it answers with something other than JSON") from error


def require_answer(url: str) -> None:
    """Raise `UnhealthyError` unless a server answers, with any status below 500."""
    with _client() as client:
        status = client.get(url).status_code
    if status >= 500:
        raise UnhealthyError(f"it answers with status {status}")


@contextlib.contextmanager
def _client(credentials: tuple[str, str] | None = None) -> Iterator[httpx.Client]:
    # Everything is on this machine: no proxy of the environment applies.
    try:
        with httpx.Client(auth=credentials, timeout=TIMEOUT_S, trust_env=False) as client:
            yield client
    except httpx.HTTPError as error:
        raise UnhealthyError(f"it does not answer ({error})") from error
