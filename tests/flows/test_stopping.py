"""Flows as programs that are told to stop: what is saved, what is said last, and how soon the terminal is free."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from sfgrpo.errors import ExitStatus
from tasks.git import git
from tests.support.rank_stubs import hear_signals
from tests.support.stub_pipeline import build_stub_pipeline, stub_environment

pytestmark = pytest.mark.slow

TRAINING = """
import itertools, time
from sfgrpo.errors import Preempted
from sfgrpo.runtime.entry_point import run_guarded, set_up_logging
from sfgrpo.runtime.shutdown import GracefulShutdown

def train():
    with GracefulShutdown(20) as shutdown, shutdown.deferred():
        for update in itertools.count(1):
            print(f"update {update} is done", flush=True)
            time.sleep(0.1)
            if shutdown.stop_requested:
                time.sleep(1)
                pathlib.Path("saved").write_text(str(update))
                words = f"its state after update {update} is saved, and starting it again goes on"
                raise Preempted(f"the run was told to stop; {words}")

set_up_logging()
sys.exit(run_guarded(train))
"""
BUSY = [sys.executable, "-c", "while True: pass"]
FREE_S = 10
"""From Ctrl-C to the prompt, at most."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Flow:
    """A flow as `make demo` runs it, in a process group of its own as a shell makes it."""

    process: subprocess.Popen[bytes]
    folder: Path

    def tell(self, number: signal.Signals) -> None:
        os.killpg(self.process.pid, number)

    def output(self) -> str:
        return (self.folder / "output").read_text()

    def processes(self) -> list[psutil.Process]:
        return psutil.Process(self.process.pid).children(recursive=True)

    def wait_for(self, condition: Callable[[], bool], seconds: float = 300) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, self.output()
            time.sleep(0.05)

    def wait_until_it_trains(self) -> None:
        self.wait_for(lambda: self.process.poll() is not None or "update 5 is done" in self.output())
        assert self.process.poll() is None, self.output()

    def assert_has_said_what_is_saved(self) -> None:
        output = self.output()
        saved = (self.folder / "saved").read_text()
        assert self.process.returncode == ExitStatus.RESUMABLE, output
        assert output.splitlines()[-1] == (
            f"stopped in stage train: the run was told to stop; its state after update {saved} is saved, "
            "and starting it again goes on: make demo"
        )
        assert "Traceback" not in output and "httpx" not in output, output


Start = Callable[..., Flow]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Start flows; end them and all that they have started."""
    flows: list[Flow] = []

    def start(folder: Path = tmp_path, prepare: Callable[[], None] = hear_signals) -> Flow:
        folder.mkdir(exist_ok=True)
        build_stub_pipeline(folder)
        (folder / "extra_train.py").write_text(TRAINING)
        git(folder, "add", "--all")
        git(folder, "-c", "user.name=A", "-c", "user.email=a@example.org", "commit", "--quiet", "-m", "First")
        environment = {name: value for name, value in stub_environment().items() if not name.startswith("PREFECT_")}
        with (folder / "output").open("wb") as output:
            process = subprocess.Popen(
                [sys.executable, "-m", "flows.train_policy"],
                cwd=folder,
                env=environment | {"STARTED_BY": "make demo"},
                preexec_fn=prepare,
                start_new_session=True,
                stdout=output,
                stderr=output,
            )
        flows.append(Flow(process=process, folder=folder))
        return flows[-1]

    yield start
    for flow in flows:
        left = flow.processes() if flow.process.poll() is None else []
        flow.process.kill()
        flow.process.wait()
        psutil.wait_procs(left, 30)


@contextlib.contextmanager
def busy_loops() -> Iterator[None]:
    loops = [subprocess.Popen(BUSY) for _ in range(2)]
    try:
        yield
    finally:
        for loop in loops:
            loop.kill()
            loop.wait()


def test_ctrl_c_frees_the_terminal_of_a_loaded_machine_and_the_last_line_says_what_is_saved(start):
    flow = start()
    flow.wait_until_it_trains()
    below = flow.processes()
    with busy_loops():
        began = time.monotonic()
        for _ in range(3):
            flow.tell(signal.SIGINT)
            time.sleep(0.3)
        flow.process.wait(60)
        seconds = time.monotonic() - began
    flow.assert_has_said_what_is_saved()
    assert seconds < FREE_S, flow.output()
    _, alive = psutil.wait_procs(below, 10)
    assert not alive, "the server, or a process of the stage, is left"


def ignore_interrupts() -> None:
    """Does what a shell does for a background job of a script, and nohup."""
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)


def test_what_a_background_job_ignores_stops_nothing_and_what_ends_it_gives_the_training_its_notice(start):
    flow = start(prepare=ignore_interrupts)
    flow.wait_until_it_trains()
    for number in (signal.SIGINT, signal.SIGHUP):
        flow.tell(number)
    num_updates = flow.output().count(" is done")
    flow.wait_for(lambda: flow.output().count(" is done") > num_updates + 10)
    flow.tell(signal.SIGTERM)
    time.sleep(0.2)
    flow.tell(signal.SIGTERM)
    flow.process.wait(60)
    flow.assert_has_said_what_is_saved()


def test_training_of_a_killed_flow_saves_its_state_and_nothing_is_left(start):
    flow = start()
    flow.wait_until_it_trains()
    below = flow.processes()
    assert len(below) >= 4, "server, supervisor, DVC, training"
    flow.process.kill()
    _, alive = psutil.wait_procs(below, 30)
    assert not alive
    assert (flow.folder / "saved").exists()


def test_ctrl_c_while_a_flow_starts_leaves_at_once_and_leaves_nothing(start, tmp_path):
    moments = {name: start(tmp_path / name) for name in ("0.3", "1.2", "2.5", "4.0")}
    waiting = dict(moments)
    deadline = time.monotonic() + 300
    while waiting and time.monotonic() < deadline:
        for after_s, flow in list(waiting.items()):
            times = psutil.Process(flow.process.pid).cpu_times()
            if times.user + times.system >= float(after_s):
                flow.tell(signal.SIGINT)
                del waiting[after_s]
        time.sleep(0.01)
    for flow in moments.values():
        flow.process.wait(60)
        assert flow.process.returncode == ExitStatus.RESUMABLE, flow.output()
        assert flow.output().splitlines()[-1].startswith("stopped"), flow.output()
        assert "Traceback" not in flow.output(), flow.output()
