"""A process is recognised while it runs, is known to be gone afterwards, and can be ended."""

from __future__ import annotations

import dataclasses
import os
import signal
import subprocess
import sys

import psutil
import pytest

from sfgrpo.runtime import process
from sfgrpo.runtime.process import ProcessIdentity, end_processes, is_gone, is_running, this_process

STUBBORN = """
import signal, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
print("ready", flush=True)
time.sleep(120)
"""


@pytest.fixture
def me() -> ProcessIdentity:
    mine = this_process()
    assert mine is not None
    return mine


def test_a_process_that_runs_is_not_gone(me):
    assert me.pid == os.getpid()
    assert is_gone(me) is False


def test_a_process_that_ended_is_gone_even_while_it_is_a_zombie(me):
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    theirs = dataclasses.replace(me, pid=child.pid, start=process._start_of(child.pid))
    assert is_gone(theirs) is False
    child.kill()
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    assert is_gone(theirs) is True and not is_running(psutil.Process(child.pid))
    child.communicate()
    assert is_gone(theirs) is True


def test_another_process_with_the_same_id_is_not_the_owner(me):
    assert is_gone(dataclasses.replace(me, start=me.start - 1)) is True


def test_a_process_from_before_the_last_boot_is_gone(me):
    assert is_gone(dataclasses.replace(me, boot="00000000-0000-0000-0000-000000000000 1")) is True


@pytest.mark.parametrize("other", ["host", "container"])
def test_of_other_machines_and_containers_nothing_is_claimed(me, other):
    kernel = me.boot.split(" ")[0]
    changes = {"host": {"host": f"{me.host}-2"}, "container": {"boot": f"{kernel} 1"}}[other]
    assert is_gone(dataclasses.replace(me, pid=2**30, **changes)) is None


def test_identity_is_read_back_from_its_text(me):
    assert ProcessIdentity.from_text(me.host, me.process) == me
    assert str(me) == f"process {os.getpid()} of {me.host}"


@pytest.mark.parametrize("text", ["", "12", "12 soon boot"])
def test_text_that_is_no_identity_gives_none(text):
    assert ProcessIdentity.from_text("here", text) is None


def test_without_proc_no_process_is_identified(monkeypatch, tmp_path, me):
    monkeypatch.setattr(process, "PROC", tmp_path)
    assert this_process() is None
    assert is_gone(me) is None


def test_process_that_ignores_sigterm_is_killed(monkeypatch):
    monkeypatch.setattr(process, "GRACE_MARGIN_S", 0.3)
    child = subprocess.Popen([sys.executable, "-c", STUBBORN], stdout=subprocess.PIPE)
    child.stdout.readline()
    end_processes(lambda: [psutil.Process(child.pid)] if child.poll() is None else [], 0.2)
    assert child.wait(5) == -signal.SIGKILL
    child.stdout.close()
