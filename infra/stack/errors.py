"""What can go wrong with the stack; wrong settings are `sfgrpo.errors.ConfigError`."""

from __future__ import annotations

from sfgrpo.errors import SfgrpoError


class StackError(SfgrpoError):
    """The stack cannot be started, watched or stopped; the message says why, and what to do about it."""


class UnhealthyError(Exception):
    """A program does not do what it is for at the moment; the message says what was seen instead."""
