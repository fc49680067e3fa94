"""Errors that a caller of sfgrpo may want to catch, and the exit status of commands."""

from __future__ import annotations

import enum
from pathlib import Path


class SfgrpoError(Exception):
    """Base class of sfgrpo's errors."""


class ConfigError(SfgrpoError, ValueError):
    """A parameter, or its value, is not allowed; the message starts with its dotted path."""


class IntegrityError(SfgrpoError):
    """A file is not the one that was recorded."""

    def __init__(self, path: Path, expected: str, found: str) -> None:
        # All arguments reach `Exception`, so that the error survives pickling.
        super().__init__(path, expected, found)
        self.path = path
        self.expected = expected
        self.found = found

    def __str__(self) -> str:
        return f"{self.path} is damaged: expected {self.expected}, found {self.found}"


class AdapterError(ConfigError):
    """The file of an adapter cannot be used, or is not of the policy; another attempt does not help."""


class MismatchError(ConfigError):
    """Files that a step combines do not belong together; another attempt does not help."""


class RewardError(SfgrpoError):
    """A reward could not score an image, or returned something that is not a number."""


class SanityCheckError(SfgrpoError):
    """A check of the training itself failed: the first ratio is not 1, or an update left the policy unchanged."""


class NumericsError(SfgrpoError):
    """A reward, loss or gradient was NaN or infinite in more updates than are allowed."""


class MemoryExhaustedError(SfgrpoError):
    """An allocation failed; the message gives the phase, the memory in use and the parameter to lower."""


class RegistryError(SfgrpoError):
    """A registered version does not exist, is not what was registered, or draws no image."""


class TrackingError(SfgrpoError):
    """The tracking store did not answer in time, or refused a record."""


class MirrorError(SfgrpoError):
    """The bucket that mirrors a run does not exist, refuses access, or cannot be reached."""


class ExitStatus(enum.IntEnum):
    """How a command ended."""

    DONE = 0
    FAILED = 1
    """Something broke; another attempt may help."""
    WRONG_CONFIGURATION = 2
    """Parameters or environment are wrong; another attempt does not help."""
    RESUMABLE = 75
    """Told to stop, or cut off from the other nodes; starting it again resumes it. EX_TEMPFAIL of sysexits.h."""


class Preempted(SystemExit):
    """The process was told to stop before it was done; starting it again resumes it.

    No `Exception`: it may be raised anywhere, also while a library is being imported that turns every error into its
    own. A program that lets it pass ends with `ExitStatus.RESUMABLE`.
    """

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.code = ExitStatus.RESUMABLE
