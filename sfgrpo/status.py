"""The exit statuses of `python -m sfgrpo`, by which whoever started it knows whether to start it again."""

from __future__ import annotations

import enum


class ExitStatus(enum.IntEnum):
    """How a stage ended."""

    DONE = 0
    FAILED = 1
    """Something broke; another attempt may help."""
    WRONG_CONFIGURATION = 2
    """Parameters or environment are wrong; another attempt does not help."""
    RESUMABLE = 75
    """Told to stop, or cut off from the other nodes: starting it again goes on. It is EX_TEMPFAIL of sysexits.h."""
