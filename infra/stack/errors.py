"""Errors of the stack; wrong settings raise `sfgrpo.errors.ConfigError`."""

from __future__ import annotations

from sfgrpo.errors import SfgrpoError


class StackError(SfgrpoError):
    """The stack cannot be started, inspected or stopped; the message has the cause and the cure."""


class UnhealthyError(Exception):
    """A program does not work at the moment; the message says what was seen instead."""
