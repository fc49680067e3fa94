"""Every error that a caller of sfgrpo may want to catch.

SfgrpoError
    ConfigError     also a ValueError: a wrong value, or a wrong key, in the parameters
    IntegrityError  a file is not the one that was recorded
    RewardError     a reward could not be computed
    SanityCheckError     training runs, but does not do what it claims
    NumericsError   too many updates had a number that is not finite
    MemoryExhaustedError
                    a phase needed more memory than there is
    TrackingError   the tracking store is away, or refuses a record
    MirrorError     the bucket that mirrors a run cannot be used
    Preempted       the run was told to stop before it was done; starting it again goes on
"""

from __future__ import annotations

import enum
from pathlib import Path


class SfgrpoError(Exception):
    """Root of the errors that sfgrpo raises on its own account."""


class ConfigError(SfgrpoError, ValueError):
    """A parameter has a value, or a name, that is not allowed; the message gives its dotted path."""


class IntegrityError(SfgrpoError):
    """A file's digest is not the expected one; the message gives the file, the expected digest and the found one."""

    def __init__(self, path: Path, expected: str, found: str) -> None:
        """Takes the file and both contents; all reach `Exception`, so that the error survives pickling."""
        super().__init__(path, expected, found)
        self.path = path
        self.expected = expected
        self.found = found

    def __str__(self) -> str:
        return f"{self.path} is damaged: expected {self.expected}, found {self.found}"


class RewardError(SfgrpoError):
    """A reward could not score an image, or gave something that is not a number."""


class SanityCheckError(SfgrpoError):
    """A check of the training itself failed: the first ratio is not 1, or an update left the policy unchanged."""


class NumericsError(SfgrpoError):
    """A reward, loss or gradient was NaN or infinite in more updates than are allowed."""


class MemoryExhaustedError(SfgrpoError):
    """An allocation failed; the message gives the phase, the memory in use and the parameter to lower."""


class Preempted(SfgrpoError):
    """The run was told to stop and is not done; the message says what is saved, and starting it again goes on."""


class TrackingError(SfgrpoError):
    """A run could not be recorded: the store did not answer in time, or refuses what the run records."""


class MirrorError(SfgrpoError):
    """The bucket that mirrors a run does not exist, refuses, or cannot be reached; the message gives its address."""


class ExitStatus(enum.IntEnum):
    """How a stage ended."""

    DONE = 0
    FAILED = 1
    """Something broke; another attempt may help."""
    WRONG_CONFIGURATION = 2
    """Parameters or environment are wrong; another attempt does not help."""
    RESUMABLE = 75
    """Told to stop, or cut off from the other nodes: starting it again goes on. It is EX_TEMPFAIL of sysexits.h."""
