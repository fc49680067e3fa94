"""Wall-clock seconds and peak memory of phases."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Mapping

import torch

from sfgrpo.errors import MemoryExhaustedError
from sfgrpo.runtime.memory import forget_peak, is_exhaustion, peak_megabytes

CPU = torch.device("cpu")


class PhaseClock:
    """Sums the wall-clock seconds of named phases, and keeps the peak memory of each.

    A GPU works asynchronously, so the clock waits for it at both ends of a phase.
    """

    def __init__(self, device: torch.device = CPU, settings: Mapping[str, tuple[str, int]] | None = None) -> None:
        """Take the device, and for each phase the parameter (name, value) that determines its memory."""
        self._device = device
        self._settings = settings or {}
        self.seconds: dict[str, float] = {}
        self.megabytes: dict[str, float] = {}

    @contextlib.contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        """Measure the block as part of `phase`; phases must not be nested.

        Raises:
            MemoryExhaustedError: An allocation in the block failed (chained).
        """
        self._synchronise()
        forget_peak(self._device)
        started = time.perf_counter()
        try:
            yield
        except Exception as error:
            if is_exhaustion(error):
                raise MemoryExhaustedError(self._message(phase)) from error
            raise
        finally:
            self._synchronise()
            self.seconds[phase] = self.seconds.get(phase, 0.0) + time.perf_counter() - started
            self.megabytes[phase] = max(self.megabytes.get(phase, 0.0), peak_megabytes(self._device))

    def metrics(self) -> dict[str, float]:
        """Return the seconds as metrics "time/<phase>_s" and the memory as "memory/<phase>_mb"."""
        seconds = {f"time/{phase}_s": value for phase, value in self.seconds.items()}
        return seconds | {f"memory/{phase}_mb": value for phase, value in self.megabytes.items()}

    def _synchronise(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)

    def _message(self, phase: str) -> str:
        used = f"the phase {phase} ran out of memory on {self._device} with {peak_megabytes(self._device):,.0f} MB used"
        if phase not in self._settings:
            return f"{used}; use a larger device or smaller batches"
        name, value = self._settings[phase]
        return f"{used}; lower {name}, which is {value}"
