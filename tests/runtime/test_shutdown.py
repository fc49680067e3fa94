"""Processes that are told to stop: what they save, how they leave, and when they are killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import psutil
import pytest

from sfgrpo.errors import RewardError
from sfgrpo.runtime.entry_point import run_guarded
from sfgrpo.runtime.shutdown import SIGNALS, GracefulShutdown
from tests.support.paths import ROOT
from tests.support.rank_stubs import hear_signals

SCRIPT = """
import sys, time
from sfgrpo.runtime.entry_point import run_guarded, set_up_logging
from sfgrpo.errors import Preempted
from sfgrpo.runtime.shutdown import GracefulShutdown

def train():
    with GracefulShutdown(grace_s={grace_s}) as shutdown:
{body}

set_up_logging()
status = run_guarded(train)
{after}
sys.exit(status)
"""
LOADING = """
        print("ready", flush=True)
        time.sleep(60)
"""
TRAINING = """
        with shutdown.deferred():
            print("ready", flush=True)
            while not shutdown.stop_requested:
                time.sleep(0.01)
            print(f"{0 < shutdown.remaining_s <= 10}", flush=True)
            time.sleep(0.3)
            print("saved", flush=True)
            raise Preempted("its state after update 3 is saved, and starting it again goes on")
"""
BUSY = """
        with shutdown.deferred():
            print("ready", flush=True)
            time.sleep(60)
"""
SWALLOWING = """
        while True:
            try:
                print("ready", flush=True)
                time.sleep(60)
            except BaseException:
                pass
"""
WRAPPING = """
        try:
            print("ready", flush=True)
            time.sleep(60)
        except {caught} as error:
            raise RuntimeError("Failed to import diffusers.pipelines because of the following error") from error
"""
"""Turns every error into its own, as a library does whose parts are imported when they are used."""
FAILING = """
        from sfgrpo.errors import ConfigError
        with shutdown.deferred():
            print("ready", flush=True)
            while not shutdown.stop_requested:
                time.sleep(0.01)
            raise {error}
"""
DROPPING = """
        class Resource:
            def __del__(self):
                print("ready", flush=True)
                time.sleep(60)
        resource = Resource()
        del resource
        time.sleep(60)
"""
"""Is told to stop where Python can only ignore an exception."""
FORGETTING = """
        try:
            print("ready", flush=True)
            time.sleep(60)
        except BaseException:
            pass
        time.sleep(60)
"""
CLOSING = """
        try:
            print("ready", flush=True)
            time.sleep(60)
        finally:
            try:
                raise OSError("the store is away")
            except OSError:
                time.sleep(2.5)
            print("closed", flush=True)
"""
"""Takes longer to close what it has opened than it takes until a notice is repeated."""
STUCK = """
        import ctypes
        with shutdown.deferred():
            lock, libc = ctypes.create_string_buffer(64), ctypes.CDLL(None)
            libc.pthread_mutex_lock(lock)
            print("ready", flush=True)
            libc.pthread_mutex_lock(lock)
"""
"""Waits in C without end, as in a collective whose partner is gone."""
LINGERING = "print('leaving', flush=True); time.sleep(0.5)"


Start = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def start() -> Iterator[Start]:
    """Start processes that wait for a signal; end those that are left."""
    started: list[subprocess.Popen[str]] = []

    def start(body: str, grace_s: float = 10.0, after: str = "", command: tuple[str, ...] = ()) -> Any:
        code = SCRIPT.format(body=body, grace_s=grace_s, after=after)
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        process = subprocess.Popen(
            [*command, sys.executable, "-c", code],
            env=environment,
            preexec_fn=hear_signals,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        started.append(process)
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


@pytest.mark.parametrize("number", SIGNALS)
def test_training_saves_its_state_before_it_leaves(start, number):
    process = start(TRAINING)
    process.send_signal(number)
    output, errors = process.communicate(timeout=20)
    assert (process.returncode, output) == (75, "True\nsaved\n")
    assert f"told to stop by {number.name}; 10 s are left" in errors
    assert "stopped: its state after update 3 is saved" in errors
    assert "Traceback" not in errors


@pytest.mark.parametrize("number", SIGNALS)
def test_process_that_has_nothing_to_save_leaves_at_once(start, number):
    process = start(LOADING)
    process.send_signal(number)
    _, errors = process.communicate(timeout=5)
    assert process.returncode == 75
    assert "stopped: the run was told to stop outside its updates; nothing is lost, and starting it again" in errors


LOST = "stopped: the run was told to stop outside its updates; nothing is lost, and starting it again goes on"


@pytest.mark.parametrize("number", SIGNALS)
@pytest.mark.parametrize("caught", ["Exception", "BaseException"])
def test_notice_that_a_library_turns_into_its_own_error_is_a_notice_still(start, caught, number):
    process = start(WRAPPING.format(caught=caught))
    process.send_signal(number)
    _, errors = process.communicate(timeout=5)
    assert (process.returncode, errors.splitlines()[-1]) == (75, LOST)
    assert "Traceback" not in errors


@pytest.mark.parametrize("error", ["OSError('disk full')", "ValueError('half a module')", "ConfigError('seed: -1')"])
def test_error_while_a_stopped_process_leaves_is_told_in_the_same_line(start, error):
    process = start(FAILING.format(error=error))
    process.terminate()
    _, errors = process.communicate(timeout=5)
    cause = error.replace("('", ": ").removesuffix("')")
    assert (process.returncode, errors.splitlines()[-1]) == (75, f"{LOST} (it ended with {cause})")
    assert "Traceback" not in errors


@pytest.mark.parametrize("body", [DROPPING, FORGETTING])
def test_notice_that_was_swallowed_is_repeated(start, body):
    process = start(body)
    process.terminate()
    _, errors = process.communicate(timeout=5)
    assert (process.returncode, errors.splitlines()[-1]) == (75, LOST)
    assert "Traceback" not in errors and "ignored" not in errors


def test_repeated_notice_does_not_disturb_what_closes(start):
    process = start(CLOSING)
    process.terminate()
    output, _ = process.communicate(timeout=10)
    assert (process.returncode, output) == (75, "closed\n")


def test_repeated_signals_are_ignored_also_while_the_process_leaves(start):
    process = start(TRAINING, after=LINGERING)
    process.terminate()
    assert process.stdout.readline() == "True\n"
    process.terminate()
    process.send_signal(signal.SIGUSR1)
    assert process.stdout.readline() == "saved\n"
    assert process.stdout.readline() == "leaving\n"
    process.terminate()
    process.send_signal(signal.SIGINT)
    assert process.wait(20) == 75


@pytest.mark.parametrize("body", [BUSY, SWALLOWING, STUCK])
def test_process_that_does_not_leave_in_time_is_ended(start, body):
    process = start(body, grace_s=1.0)
    begin = time.monotonic()
    process.terminate()
    _, errors = process.communicate(timeout=20)
    assert process.returncode == 75
    assert 0.9 < time.monotonic() - begin < 3
    assert "the process is ended: it ran for 1 s after it was told to stop" in errors


@pytest.mark.parametrize("body", [BUSY, STUCK])
def test_second_interrupt_ends_the_process_at_once(start, body):
    process = start(body, grace_s=60)
    process.send_signal(signal.SIGINT)
    time.sleep(0.3)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    assert process.wait(3) == 75


def test_ignored_signal_stays_ignored(start):
    process = start(TRAINING, command=("nohup",))
    process.send_signal(signal.SIGHUP)
    time.sleep(0.3)
    assert process.poll() is None


def test_block_without_a_signal_leaves_everything_as_it_was():
    before = [signal.getsignal(number) for number in SIGNALS]
    with GracefulShutdown(grace_s=0.1) as shutdown:
        assert not shutdown.stop_requested
        assert shutdown.remaining_s == float("inf")
        time.sleep(0.2)
    assert [signal.getsignal(number) for number in SIGNALS] == before
    assert "graceful-shutdown" not in [thread.name for thread in threading.enumerate() if thread.is_alive()]


def test_other_threads_are_never_told_to_stop():
    given: list[bool] = []

    def work() -> None:
        with GracefulShutdown(grace_s=0.1) as shutdown:
            given.append(shutdown.stop_requested)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert given == [False]


def test_rank_dies_with_its_launcher(tmp_path):
    code = "from sfgrpo.runtime.rank import die_with_launcher as die; import time; die(); print('up', flush=True); "
    code += "time.sleep(60)"
    launcher = f"""
import os, subprocess, sys
os.environ["STAGE_LAUNCHER"] = str(os.getpid())
rank = subprocess.Popen([sys.executable, "-c", {code!r}], start_new_session=True, stdout=subprocess.PIPE)
rank.stdout.readline()
print(rank.pid, flush=True)
rank.wait()
"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen([sys.executable, "-c", launcher], env=environment, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        rank = psutil.Process(int(process.stdout.readline()))
        process.kill()
    deadline = time.monotonic() + 5
    while rank.is_running() and rank.status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_rank_whose_launcher_is_gone_already_leaves():
    code = "from sfgrpo.runtime.rank import die_with_launcher as die; die(); print('lives')"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "STAGE_LAUNCHER": "1"}
    rank = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert (rank.returncode, rank.stdout) == (75, "")


def test_error_of_a_rank_is_noted_for_its_launcher(tmp_path, monkeypatch):
    note = tmp_path / "error.json"
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(note))

    def fail() -> None:
        raise RewardError("the detector is missing")

    assert run_guarded(fail) == 1
    message = json.loads(note.read_text())["message"]
    assert message["message"] == "RewardError: the detector is missing"
    assert "Traceback" in message["extraInfo"]["py_callstack"]
