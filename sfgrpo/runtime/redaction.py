"""Redaction of credentials in messages, logs, tracebacks and records.

By two ways: what this process knows to be a secret is blotted out wherever it appears, in whatever form; and what looks
like one by its place or by its beginning is blotted out though nobody told. Scanners of repositories, such as
detect-secrets, also go by the entropy of words, which would take every digest of this project for a secret.
"""

from __future__ import annotations

import logging
import re
import sys
import traceback
from types import TracebackType

from sfgrpo.runtime.known_secrets import SHORTEST, forms_of_secrets

BLOT = "***"
WORDS = (
    r"(?:password|passwd|passphrase|secret|token|api[_-]?key|access[_-]?key(?:[_-]?id)?|private[_-]?key|"
    r"auth[_-]?string)"
)
"""Ends of the names of settings that hold a secret."""
QUERIES = (
    r"x-(?:amz|goog)-(?:signature|credential|security-token)|signature|sig|policy|pwd|awsaccesskeyid|googleaccessid|"
    rf"key-pair-id|[\w.-]{{0,40}}{WORDS}"
)
"""Names of parameters of addresses that hold a secret."""
HEADERS = r"(?:proxy-)?authorization|(?:set-)?cookie|x-api-key|x-amz-security-token"
UNUSUAL = re.compile(r"[\s\"'<>]")
"""Characters that end an address in a text."""
QUOTED = r""""(?:[^"\\]|\\.)*"|'(?:[^'\\]|\\.)*'"""
PREFIXES = r"hf_|api_org_|gh[oprsu]_|github_pat_|glpat-|pn[bu]_|npm_|pypi-|sk-|xox[abeoprs]-|ya29\."
"""Beginnings of tokens: of Hugging Face, GitHub, GitLab, Prefect, npm, PyPI, OpenAI, Slack and Google."""

RULES = tuple(
    (re.compile(pattern, re.IGNORECASE | re.MULTILINE), replacement)
    for pattern, replacement in (
        # User and password of an address: the last @ ends them where the password holds one, or a slash. A colon before
        # a number and a slash begins a port.
        (r"://(?:[^\s/?#\"'<>]*|[^\s/:@\"'<>]+:(?!\d{1,5}(?:[/?#]|$))[^\s\"'<>]*)@", f"://{BLOT}@"),
        (rf"([?&;](?:amp;)?(?:{QUERIES})=)[^&\s\"'<>#;]+", rf"\1{BLOT}"),
        # Headers, as they are sent and as Python and JSON show them.
        (rf"\b((?:{HEADERS})[\"']?\s*[:=](?!\s*\*)\s*)(?:(?-i:b)?(?:{QUOTED})|[^\r\n\"'}}]+)", rf"\1{BLOT}"),
        (r"\b(bearer|basic)\s+(?-i:(?=\S*(?:[0-9=+/]|[a-z][A-Z])))[\w+/.~=-]{8,}", rf"\1 {BLOT}"),
        # Settings in JSON and Python, in INI files, in YAML, and as options of a command.
        (rf"({WORDS}[\"']\s*:\s*)(?:{QUOTED})", rf"\1{BLOT}"),
        (rf"({WORDS}\s?=\s?)(?!None|True|False)(?:{QUOTED}|[^\s\"',;&)}}\]]{{4,}})", rf"\1{BLOT}"),
        (rf"^([ \t]*[\w.-]{{0,40}}{WORDS}:[ \t]+)\S{{6,}}[ \t]*$", rf"\1{BLOT}"),
        (rf"(--[\w-]{{0,40}}{WORDS}[ =])\S+", rf"\1{BLOT}"),
        # Secrets that are known by their beginning.
        (r"(?-i:(?<![A-Za-z0-9])(?:AKIA|ASIA)[A-Z0-9]{16}(?![A-Za-z0-9]))", BLOT),
        (rf"(?-i:(?<![A-Za-z0-9])(?:{PREFIXES})[\w-]{{16,}}|(?<![A-Za-z0-9])AIza[\w-]{{35}})", BLOT),
        (r"(?-i:(?<![A-Za-z0-9])eyJ[\w-]{10,}\.[\w-]{10,}\.[\w-]*)", BLOT),
        (r"(hooks\.slack\.com/\w+/)[\w/-]+", rf"\1{BLOT}"),
        (r"-----BEGIN [A-Z ]*PRIVATE KEY-----(?s:.*?)(?:-----END [A-Z ]*PRIVATE KEY-----|\Z)", BLOT),
    )
)
"""What looks like a secret, with what takes its place."""


def without_secrets(text: str) -> str:
    """Replace the secrets of the environment, and what looks like a secret, by asterisks."""
    for form in forms_of_secrets():
        if len(form) >= SHORTEST:
            text = text.replace(form, BLOT)
        elif form in text:
            text = re.sub(rf"(?<!\w){re.escape(form)}(?!\w)", BLOT, text)
    for pattern, replacement in RULES:
        text = pattern.sub(replacement, text)
    return text


def without_credentials(address: str) -> str:
    """Return an address as it may be kept: without user and password, and without its query and fragment."""
    scheme, separator, rest = address.partition("://")
    if separator and not rest.startswith("/") and UNUSUAL.search(rest):
        # No rule sees where such a password ends.
        address = scheme + separator + rest.rpartition("@")[2]
    return re.split("[?#]", without_secrets(address).replace(f"://{BLOT}@", "://"), maxsplit=1)[0]


class SecretFreeFormatter(logging.Formatter):
    """Formatter that redacts all that is logged, tracebacks included."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the redacted text of a record."""
        return without_secrets(super().format(record))


def print_error(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Print an uncaught error as Python does, but redacted; a `sys.excepthook`."""
    print(without_secrets("".join(traceback.format_exception(kind, error, trace))), end="", file=sys.stderr)
