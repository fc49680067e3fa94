"""Look every locked package up in PyPI's list of known vulnerabilities.

python -m infra.supply.audit            0: none is known; 1: some are, or a package could not be looked up;
                                        3: the list cannot be reached, and nothing was audited
python -m infra.supply.audit --probe    says whether the list can be reached: 0 or 3
"""

from __future__ import annotations

import json
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path

from infra.supply.lock import LOCKS, ROOT, TORCH

SERVICE = "https://pypi.org/pypi"
KNOWN = "jinja2/2.11.2"
"""A release with known vulnerabilities: a service that names none of them knows nothing."""

UNREACHABLE = 3


def main(arguments: list[str]) -> int:
    """Audit every lock, or only find out whether that is possible."""
    if reason := why_unreachable(SERVICE):
        print(f"NOT AUDITED for known vulnerabilities: {reason}. Run `make audit` where {SERVICE} can be reached.")
        return UNREACHABLE
    if arguments == ["--probe"]:
        return 0
    statuses = [audit(str(lock)) for lock in [*LOCKS, TORCH]]
    return 1 if any(statuses) else 0


def why_unreachable(service: str) -> str:
    """Return why the service cannot be relied on, empty if it can."""
    address = f"{service}/{KNOWN}/json"
    try:
        with urllib.request.urlopen(address, timeout=15) as answer:
            known = json.load(answer).get("vulnerabilities")
    except (urllib.error.URLError, TimeoutError, ValueError, AttributeError) as error:
        return f"{address} does not answer ({error})"
    return "" if known else f"{address} names no vulnerability, though there are some"


def audit(lock: str) -> int:
    """Return the status of pip-audit for one lock; a package that it cannot look up is an error."""
    print(f"{lock}:", flush=True)
    options = ["--strict", "--disable-pip", "--require-hashes", "--progress-spinner=off", "--requirement", lock]
    return subprocess.run([Path(sys.executable).with_name("pip-audit"), *options], cwd=ROOT, check=False).returncode


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
