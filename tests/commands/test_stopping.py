"""Commands that are told to stop, at every moment of their start and whatever they import just then."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import psutil
import pytest

from sfgrpo.cli import COMMANDS, main
from sfgrpo.errors import ExitStatus
from sfgrpo.runtime.shutdown import SIGNALS
from tests.support.paths import ROOT
from tests.support.rank_stubs import hear_signals
from tests.support.trainings import lay_out

EVERY_S, NUM_MOMENTS = 0.25, 16


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Start:
    """A command that is told to stop once it has used the processor for so long: what it has done by then is the same
    on an idle and on a loaded machine."""

    process: subprocess.Popen[str]
    after_s: float
    number: signal.Signals
    to_group: bool

    def tell_if_due(self) -> bool:
        """Sends the signal if it is time; returns whether there is nothing left to wait for."""
        with contextlib.suppress(psutil.Error):
            times = psutil.Process(self.process.pid).cpu_times()
            if times.user + times.system < self.after_s:
                return self.process.poll() is not None
            (os.killpg if self.to_group else os.kill)(self.process.pid, self.number)
        return True


def start(folder: Path, index: int, *arguments: str) -> Start:
    threads = {"OMP_NUM_THREADS": "1", "SFGRPO_NUM_THREADS": "1", "SFGRPO_DEVICE": "cpu", "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        [sys.executable, "-m", "sfgrpo", *arguments],
        cwd=folder,
        env={**os.environ, **threads},
        preexec_fn=hear_signals,
        start_new_session=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    number = SIGNALS[index % len(SIGNALS)]
    to_group = index // len(SIGNALS) % 2 == 0
    return Start(process=process, after_s=(index + 1) * EVERY_S, number=number, to_group=to_group)


def outputs(starts: Sequence[Start]) -> list[str]:
    """Tell each to stop when it is due; return what they printed."""
    waiting, deadline = list(starts), time.monotonic() + 240
    try:
        while waiting and time.monotonic() < deadline:
            waiting = [each for each in waiting if not each.tell_if_due()]
            time.sleep(0.01)
        return [each.process.communicate(timeout=30)[0] for each in starts]
    finally:
        for each in starts:
            each.process.kill()
            each.process.communicate()


@pytest.mark.slow
def test_training_that_is_told_to_stop_at_any_moment_of_its_start_says_so_in_one_line(tmp_path):
    lay_out(tmp_path / "first")
    starts = []
    for index in range(NUM_MOMENTS):
        shutil.copytree(tmp_path / "first", tmp_path / str(index))
        starts.append(start(tmp_path / str(index), index, "train"))
    for each, output in zip(starts, outputs(starts), strict=True):
        assert (each.process.returncode, output.splitlines()[-1][:8]) == (ExitStatus.RESUMABLE, "stopped:"), output
        assert "Traceback" not in output and "ignored in" not in output, output


@pytest.mark.parametrize("name", COMMANDS)
@pytest.mark.parametrize("number", SIGNALS)
def test_every_command_that_is_told_to_stop_says_so_in_one_line(name, number, monkeypatch, capsys):
    def run(args, environment):
        try:
            signal.raise_signal(number)
        except Exception as error:
            raise RuntimeError("Failed to import diffusers") from error

    monkeypatch.setitem(COMMANDS, name, dataclasses.replace(COMMANDS[name], run=run, add_arguments=lambda parser: None))
    handlers = [signal.getsignal(each) for each in SIGNALS]
    try:
        status = main([name])
    finally:
        for each, handler in zip(SIGNALS, handlers, strict=True):
            signal.signal(each, handler)
    assert status == ExitStatus.RESUMABLE
    assert capsys.readouterr().err.splitlines()[-1] == (
        "stopped: the command was told to stop before it was done; start it again"
    )
