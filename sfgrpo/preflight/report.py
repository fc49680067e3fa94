"""What a set of checks found, one line each."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Literal

from sfgrpo.errors import SfgrpoError

Check = Callable[[], str]
"""Returns what was found in a few words; raises `Doubt`, or the error with its cure."""


class Doubt(SfgrpoError):
    """What was found works, but perhaps not as it is meant."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """The outcome of one check."""

    status: Literal["ok", "warning", "problem"]
    name: str
    text: str


def examine(checks: Mapping[str, Check]) -> Iterator[Finding]:
    """Run all checks, each whatever the others find, and yield their findings one by one."""
    for name, check in checks.items():
        try:
            yield Finding(status="ok", name=name, text=check())
        except Doubt as doubt:
            yield Finding(status="warning", name=name, text=str(doubt))
        except (SfgrpoError, OSError) as error:
            yield Finding(status="problem", name=name, text=str(error))
