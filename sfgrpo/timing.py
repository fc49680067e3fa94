"""Seconds by phase, on the clock that the user waits by."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator

Synchronise = Callable[[], None]


class PhaseClock:
    """Adds up the wall-clock seconds of named phases.

    A GPU works behind the back of the process: `synchronise` waits for it at both ends of a phase.
    """

    def __init__(self, synchronise: Synchronise = lambda: None) -> None:
        self._synchronise = synchronise
        self.seconds: dict[str, float] = {}

    @contextlib.contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        """Counts the block towards `phase`; phases must not be nested."""
        self._synchronise()
        started = time.perf_counter()
        try:
            yield
        finally:
            self._synchronise()
            self.seconds[phase] = self.seconds.get(phase, 0.0) + time.perf_counter() - started

    def metrics(self) -> dict[str, float]:
        """Gives the seconds as metrics named "time/<phase>_s"."""
        return {f"time/{phase}_s": seconds for phase, seconds in self.seconds.items()}
