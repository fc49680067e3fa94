"""Owners: a process is recognised while it runs, and gone when it is, whatever its id is given to next."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys

import pytest

from sfgrpo.runtime import process
from sfgrpo.runtime.process import ProcessIdentity, is_gone, this_owner


@pytest.fixture
def me() -> ProcessIdentity:
    mine = this_owner()
    assert mine is not None
    return mine


def test_a_process_that_runs_is_not_gone(me):
    assert me.pid == os.getpid()
    assert is_gone(me) is False


def test_a_process_that_ended_is_gone_even_before_it_is_buried(me):
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    theirs = dataclasses.replace(me, pid=child.pid, start=process._start_of(child.pid))
    assert is_gone(theirs) is False
    child.kill()
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    assert is_gone(theirs) is True
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


def test_owner_is_read_back_from_its_text(me):
    assert ProcessIdentity.from_text(me.host, me.process) == me
    assert str(me) == f"process {os.getpid()} of {me.host}"


@pytest.mark.parametrize("text", ["", "12", "12 soon boot"])
def test_text_that_names_no_process_names_none(text):
    assert ProcessIdentity.from_text("here", text) is None


def test_without_proc_nobody_is_named(monkeypatch, tmp_path, me):
    monkeypatch.setattr(process, "PROC", tmp_path)
    assert this_owner() is None
    assert is_gone(me) is None
