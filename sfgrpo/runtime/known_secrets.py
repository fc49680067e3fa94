"""The secrets that this process can know: those of its environment, and of the files where programs keep them."""

from __future__ import annotations

import base64
import functools
import json
import os
import re
import urllib.parse
from collections.abc import Iterator
from pathlib import Path

VARIABLES = (
    "AWS_SECRET_ACCESS_KEY",
    "AWS_SESSION_TOKEN",
    "HF_TOKEN",
    "HUGGING_FACE_HUB_TOKEN",
    "MLFLOW_TRACKING_PASSWORD",
    "MLFLOW_TRACKING_TOKEN",
    "PREFECT_API_AUTH_STRING",
    "PREFECT_API_KEY",
    "PREFECT_SERVER_API_AUTH_STRING",
    "WEBHOOK_SECRET",
)
"""Environment variables that hold a secret, however short it is."""
SECRET_NAME = re.compile(r"(^|[_.-])(token|secret|password|passwd|passphrase|auth_string)$", re.IGNORECASE)
"""Ends of the names of further variables, and of settings in files, that hold a secret."""
KEY_NAME = re.compile(r"(^|[_.-])(key|credentials?)$", re.IGNORECASE)
"""Ends of names that hold a secret if the value looks like one: there are keys of caches and names of key files."""
RANDOM = re.compile(r"(?=.*[0-9])(?=.*[A-Za-z]).{16,}")
SHORTEST = 8
"""Characters of a secret that is blotted out within words, and of those of further variables."""
SHORTEST_WORD = 4
"""Characters of a secret that is blotted out at all; a shorter one would take every second word with it."""
FILES = (
    ("AWS_SHARED_CREDENTIALS_FILE", "~/.aws/credentials"),
    ("HF_TOKEN_PATH", "~/.cache/huggingface/token"),
    ("MLFLOW_TRACKING_CREDENTIALS", "~/.mlflow/credentials"),
    ("PREFECT_PROFILES_PATH", "~/.prefect/profiles.toml"),
)
"""Files with secrets: the variable that may name another place, and where they are by default."""
SETTING = re.compile(r"""^\s*([\w.-]+)\s*=\s*["']?([^"'\s]+)["']?\s*$""", re.MULTILINE)
LONGEST_FILE = 2**16
PASSWORD = re.compile(r"://[^\s/:@]*:(?!\d{1,5}(?:[/?#]|$))(\S+)@")
"""The password of an address; a number and a slash after the colon would be a port."""


def forms_of_secrets() -> tuple[str, ...]:
    """Return all forms of all known secrets that could appear in a text, the longest first; none is short."""
    found = {form for secret in _secrets() for form in _forms(secret)}
    return tuple(sorted(found, key=len, reverse=True))


def _secrets() -> Iterator[str]:
    environment = {name: value.strip() for name, value in os.environ.items()}
    for name, value in environment.items():
        if name in VARIABLES or _is_secret(name, value):
            yield value
            if name.endswith("AUTH_STRING"):
                yield value.partition(":")[2]
        if (password := PASSWORD.search(value)) is not None:
            yield password[1]
            yield urllib.parse.unquote(password[1])
    for variable, default in FILES:
        yield from _in_file(Path(environment.get(variable) or default))


def _is_secret(name: str, value: str) -> bool:
    if KEY_NAME.search(name):
        return RANDOM.fullmatch(value) is not None and not os.path.exists(value)
    return SECRET_NAME.search(name) is not None and len(value) >= SHORTEST


def _in_file(path: Path) -> Iterator[str]:
    try:
        place = path.expanduser()
        state = place.stat()
        text = _read(place, state.st_mtime_ns) if state.st_size <= LONGEST_FILE else ""
    except (OSError, ValueError, RuntimeError):
        # Absent, unreadable, no text, or a user without a home.
        return
    settings = SETTING.findall(text)
    if not settings and len(text.split()) == 1:
        yield text.strip()
    yield from (value for name, value in settings if _is_secret(name, value))


@functools.lru_cache(maxsize=16)
def _read(path: Path, modified_ns: int) -> str:
    """Read a file again only when it has changed."""
    return path.read_text(encoding="utf-8")


@functools.lru_cache(maxsize=256)
def _forms(secret: str) -> tuple[str, ...]:
    """Return a secret as it is, as addresses, JSON and Python write it, and in base64 and hex."""
    if len(secret) < SHORTEST_WORD:
        return ()
    plain = secret.encode(errors="surrogateescape")
    forms = {
        secret,
        urllib.parse.quote(plain, safe=""),
        urllib.parse.quote(plain),
        urllib.parse.quote_plus(plain),
        json.dumps(secret)[1:-1],
        repr(secret)[1:-1],
    }
    if len(secret) >= SHORTEST:
        forms |= {plain.hex(), plain.hex().upper()}
        for offset in range(3):
            # What stands before and after a secret changes the characters at both of its ends.
            encoded = base64.b64encode(bytes(offset) + plain).decode()
            inside = encoded[(0, 2, 3)[offset] : len(encoded) - (4 if (len(plain) + offset) % 3 else 0)]
            if len(inside) >= SHORTEST:
                forms |= {inside, inside.replace("+", "-").replace("/", "_")}
    return tuple(form for form in forms if len(form) >= SHORTEST_WORD)
