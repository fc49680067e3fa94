"""Questions to the programs of the stack, by HTTP on this machine."""

from __future__ import annotations

import base64
import json
import urllib.error
import urllib.request
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
        with _opener.open(request, timeout=TIMEOUT_S) as answer:
            return json.load(answer)
    except urllib.error.HTTPError as error:
        raise UnhealthyError(f"it answers with status {error.code}") from error
    except urllib.error.URLError as error:
        raise UnhealthyError(f"it does not answer ({error.reason})") from error
    except (OSError, ValueError) as error:
        raise UnhealthyError(f"it does not answer as it should ({type(error).__name__})") from error
