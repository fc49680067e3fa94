"""Progress of a training, one line an update: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from rich.progress import Progress as Bar

COLUMNS: Mapping[str, tuple[str, str]] = {
    "reward/mean": ("reward", ".3f"),
    "gain/mean": ("gain", ".3f"),
    "policy/clip_fraction": ("clip", ".2f"),
    "optim/grad_norm": ("grad", ".2f"),
}
"""Metrics that are shown if present, with label and format."""


def progress_line(update: int, num_updates: int, metrics: Mapping[str, float]) -> str:
    """Return the line of an update, counted from 1: `update 12/60  reward 0.412  clip 0.12`."""
    shown = [f"{label} {metrics[key]:{form}}" for key, (label, form) in COLUMNS.items() if key in metrics]
    return "  ".join((f"update {update}/{num_updates}", *shown))


class Progress:
    """Shows the updates of a run; a context manager, because a bar must be closed.

    Args:
        first_update: updates done before a resume, which took this process no time.
        shown: False in all processes of a distributed run but the first.
    """

    def __init__(
        self,
        num_updates: int,
        images_per_update: int,
        *,
        first_update: int = 0,
        shown: bool = True,
        file: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._num_updates = num_updates
        self._images_per_update = images_per_update
        self._first_update = first_update
        self._file = sys.stdout if file is None else file
        self._clock = clock
        self._started = clock()
        self._shown = shown
        self._bar = _open_bar(self._file) if shown and self._file.isatty() else None
        if self._bar is not None:
            self._bar.add_task("", total=num_updates, completed=first_update)

    def __enter__(self) -> Progress:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def show(self, update_index: int, metrics: Mapping[str, float]) -> None:
        """Show that the update of this index is done."""
        done = update_index + 1
        seconds_per_update = (self._clock() - self._started) / (done - self._first_update)
        images_per_s = self._images_per_update / max(seconds_per_update, 1e-9)
        left = _clock_time((self._num_updates - done) * seconds_per_update)
        line = f"{progress_line(done, self._num_updates, metrics)}  {images_per_s:.1f} img/s  eta {left}"
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=done, description=line)
        elif self._shown:
            print(line, file=self._file, flush=True)


def _open_bar(file: TextIO) -> Bar:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn

    return Progress(BarColumn(bar_width=20), TextColumn("{task.description}"), console=Console(file=file))


def _clock_time(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes:02d}:{rest:02d}"
