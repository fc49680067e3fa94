"""The local stack as an ordinary user starts it, with no setting but its ports: what runs, and as whom."""

from __future__ import annotations

import os
import pwd
import signal
import subprocess
import sys
import textwrap
from collections.abc import Iterator

import pytest

from infra.stack.programs.table import PROGRAMS
from infra.stack.supervision import running_supervisor
from tests.support.ordinary_user import USER, as_ordinary_user
from tests.support.stack import Stack, wait_until

pytestmark = [pytest.mark.stack, pytest.mark.slow]

IS_ROOT = os.geteuid() == 0
FLOW = """
    import getpass
    import tempfile
    from pathlib import Path

    from prefect import flow

    @flow
    def tell(path: str) -> None:
        Path(path).write_text(f"{getpass.getuser()} {tempfile.gettempdir()}")
"""
DEPLOY_AND_RUN = """
    import sys
    from prefect import flow
    from prefect.deployments import run_deployment

    source = flow.from_source(sys.argv[1], "flows.py:tell")
    deployment = source.deploy("tell", work_pool_name="sfgrpo", print_next_steps=False, ignore_warnings=True)
    run = run_deployment(deployment, parameters={"path": sys.argv[2]}, timeout=120, poll_interval=1)
    print(run.state.name)
"""


@pytest.fixture(scope="module")
def ordinary() -> Iterator[Stack]:
    """A stack of a user who is not root, whoever runs the tests."""
    stack = Stack(prefix=as_ordinary_user(), HOME="/tmp")
    if IS_ROOT:
        os.chown(stack.parent, pwd.getpwnam(USER).pw_uid, -1)
    with stack:
        yield stack


def test_nothing_runs_as_root(ordinary: Stack) -> None:
    found = ordinary.processes()
    assert len(found) > len(PROGRAMS)
    assert {process.uids().real for process in found} == {pwd.getpwnam(USER).pw_uid if IS_ROOT else os.geteuid()}


def test_flows_run_as_the_user_with_temporary_files_of_their_own(ordinary: Stack) -> None:
    folder = ordinary.parent
    (folder / "flows.py").write_text(textwrap.dedent(FLOW), encoding="utf-8")
    command = [sys.executable, "-c", textwrap.dedent(DEPLOY_AND_RUN), str(folder), str(folder / "told")]
    done = subprocess.run(command, env=ordinary.environment, capture_output=True, text=True, timeout=180)
    assert done.stdout.splitlines()[-1:] == ["Completed"], done.stdout + done.stderr
    user = USER if IS_ROOT else pwd.getpwuid(os.geteuid()).pw_name
    assert (folder / "told").read_text(encoding="utf-8") == f"{user} {ordinary.folder.temporary}"


def test_without_settings_nothing_is_left_open(ordinary: Stack) -> None:
    done = ordinary.command("up")
    assert (done.returncode, "WARNING" in done.stderr, "Both ask for a login" in done.stdout) == (0, False, True)


def test_what_supervisord_started_ends_with_it(ordinary: Stack) -> None:
    supervisor = running_supervisor(ordinary.folder)
    assert supervisor is not None
    os.kill(supervisor.pid, signal.SIGKILL)
    wait_until(lambda: ordinary.processes() == [], "programs go on without supervisord", timeout_s=60)
