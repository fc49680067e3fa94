"""The launcher of several ranks and nodes, with stand-ins for the ranks that need no model."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

from sfgrpo.config.schema import LaunchConfig
from sfgrpo.errors import ConfigError
from sfgrpo.runtime.launcher import _first_failure, _rendezvous_options
from tests.support.paths import ROOT
from tests.support.rank_stubs import LAUNCHER, RANK, hear_signals

pytestmark = [pytest.mark.distributed, pytest.mark.slow]


COLLECTIVE = """
import datetime, os, signal
import torch.distributed as dist
from sfgrpo.runtime.rank import die_with_launcher

die_with_launcher()
rank, attempt = int(os.environ["RANK"]), int(os.environ["TORCHELASTIC_RESTART_COUNT"])
dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=20))
dist.barrier()
if attempt == 0 and rank == 1:
    os.kill(os.getpid(), signal.SIGKILL)
dist.barrier()
"""
"""Ranks that work together, of which one dies."""


class Run:
    """A launcher in a folder, and the stand-ins that it started."""

    def __init__(self, folder: Path, environment: dict[str, str], script: str, **launch: Any) -> None:
        self.folder = folder
        (folder / "rank.py").write_text(script)
        settings = str({"num_processes": 2, "max_restarts": 1, **launch}).replace("'", '"')
        foreign = ("SFGRPO_", "PET_", "TORCHELASTIC_", "MASTER_")
        inherited = {name: value for name, value in os.environ.items() if not name.startswith(foreign)}
        self.process = subprocess.Popen(
            [sys.executable, "-c", LAUNCHER, settings],
            cwd=folder,
            env={**inherited, "PYTHONPATH": str(ROOT), **environment},
            preexec_fn=hear_signals,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def pid(self, rank: int, attempt: int = 0) -> int:
        """Wait until a rank is up; return its process id."""
        return int(self.wait_for(f"pid_{attempt}_{rank}").read_text())

    def wait_for(self, name: str) -> Path:
        deadline = time.monotonic() + 60
        while not (self.folder / name).exists():
            assert time.monotonic() < deadline, f"{name} did not appear"
            assert self.process.poll() is None, self.process.communicate()[0]
            time.sleep(0.02)
        return self.folder / name

    def end(self, timeout: float = 30) -> tuple[int, str]:
        """Wait for the launcher; return its exit status and all output."""
        output, _ = self.process.communicate(timeout=timeout)
        return self.process.returncode, output

    def saved(self) -> list[str]:
        return sorted(path.name for path in self.folder.glob("saved_*"))


Launch = Callable[..., Run]


@pytest.fixture
def launch(tmp_path: Path) -> Iterator[Launch]:
    """Launch stand-ins; end those that are left."""
    runs: list[Run] = []

    def launch(
        folder: Path = tmp_path, environment: dict[str, str] | None = None, script: str = RANK, **settings: Any
    ) -> Run:
        folder.mkdir(exist_ok=True)
        runs.append(Run(folder, environment or {}, script, **settings))
        return runs[-1]

    yield launch
    for run in runs:
        run.process.kill()
        run.process.communicate()
    for run in runs:
        for path in run.folder.glob("pid_*"):
            with contextlib.suppress(psutil.Error):
                rank = psutil.Process(int(path.read_text()))
                if "rank.py" in rank.cmdline():
                    rank.kill()


def is_gone(pid: int, within_s: float = 5.0) -> bool:
    deadline = time.monotonic() + within_s
    while time.monotonic() < deadline:
        with contextlib.suppress(psutil.NoSuchProcess):
            if psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
                time.sleep(0.05)
                continue
        return True
    return False


def test_all_ranks_finish_and_meet_on_this_machine(launch):
    run = launch()
    run.pid(0), run.pid(1)
    (run.folder / "finish").touch()
    status, output = run.end()
    assert (status, output) == (0, "")
    assert re.fullmatch(r"127\.0\.0\.1:\d+", (run.folder / "meeting_0_1").read_text())


def test_two_launchers_on_a_machine_meet_on_ports_of_their_own(launch, tmp_path):
    runs = [launch(tmp_path / name) for name in ("one", "other")]
    meetings = {run.wait_for("meeting_0_0").read_text() for run in runs}
    assert len(meetings) == 2
    for run in runs:
        run.pid(1)
        (run.folder / "finish").touch()
    assert [run.end()[0] for run in runs] == [0, 0]


@pytest.mark.parametrize(
    ("told", "number"),
    [
        ("launcher", signal.SIGTERM),
        ("launcher", signal.SIGUSR1),
        ("launcher", signal.SIGINT),
        ("rank 0", signal.SIGUSR1),
        ("rank 1", signal.SIGTERM),
    ],
)
def test_all_ranks_save_their_state_when_any_process_is_told_to_stop(launch, told, number):
    run = launch()
    pids = [run.pid(0), run.pid(1)]
    os.kill(run.process.pid if told == "launcher" else pids[int(told[-1])], number)
    status, output = run.end()
    assert (status, run.saved()) == (75, ["saved_0", "saved_1"]), output
    assert "stopped: its state after update 3 is saved" in output
    assert "Traceback" not in output and "restarting all ranks" not in output
    assert all(is_gone(pid) for pid in pids)


def test_launcher_that_is_told_to_stop_before_its_ranks_are_up_leaves(launch):
    run = launch()
    run.wait_for("launching")
    run.process.terminate()
    status, output = run.end()
    assert status == 75, output
    assert "Traceback" not in output


def test_repeated_signals_do_not_keep_the_ranks_from_saving(launch):
    run = launch()
    pids = [run.pid(0), run.pid(1)]
    for _ in range(4):
        for pid in (run.process.pid, *pids):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGTERM)
        time.sleep(0.05)
    assert run.end()[0] == 75
    assert run.saved() == ["saved_0", "saved_1"]


def test_rank_that_fails_because_another_one_left_is_no_failure(launch):
    run = launch(environment={"SFGRPO_GRACE_S": "1"})
    pids = [run.pid(0), run.pid(1)]
    (run.folder / "busy").touch()
    os.kill(pids[0], signal.SIGTERM)
    # It leaves at the end of its grace; then the other one is told to stop, but is killed.
    assert is_gone(pids[0])
    os.kill(pids[1], signal.SIGKILL)
    status, output = run.end()
    assert status == 75, output
    assert "restarting all ranks" not in output


@pytest.mark.parametrize(
    ("failures", "rank"),
    [
        ({0: (1, 100), 1: (-9, 100)}, 1),
        ({0: (-9, 130), 1: (1, 100)}, 1),
        ({0: (75, 100), 1: (1, 101)}, 1),
        ({0: (-15, 100), 1: (3, 102), 2: (1, 101)}, 2),
    ],
)
def test_first_failure_is_the_one_that_caused_the_others(failures, rank):
    made = {}
    for number, (status, timestamp) in failures.items():
        made[number] = ProcessFailure(local_rank=number, pid=1, exitcode=status, error_file="absent")
        made[number].timestamp = timestamp
    assert _first_failure(made)[0] == rank


def test_ranks_that_do_not_leave_in_time_are_ended(launch):
    run = launch(environment={"SFGRPO_GRACE_S": "1"})
    pids = [run.pid(0), run.pid(1)]
    (run.folder / "busy").touch()
    begin = time.monotonic()
    run.process.terminate()
    status, output = run.end()
    assert status == 75, output
    assert time.monotonic() - begin < 1 + 4
    assert all(is_gone(pid) for pid in pids)


def test_frozen_ranks_are_killed(launch):
    run = launch(environment={"SFGRPO_GRACE_S": "1"})
    pids = [run.pid(0), run.pid(1)]
    os.kill(pids[0], signal.SIGSTOP)
    begin = time.monotonic()
    run.process.terminate()
    assert run.end()[0] == 75
    assert time.monotonic() - begin < 1 + 5
    assert all(is_gone(pid) for pid in pids)


def test_killed_rank_makes_all_ranks_start_again(launch):
    run = launch()
    run.pid(1)
    os.kill(run.pid(0), signal.SIGKILL)
    run.pid(0, attempt=1), run.pid(1, attempt=1)
    # In a store of their own, not in that with the addresses of those before them.
    assert run.wait_for("meeting_0_0").read_text() != run.wait_for("meeting_1_0").read_text()
    (run.folder / "finish").touch()
    status, output = run.end()
    assert status == 0
    assert "rank 0 was killed by SIGKILL (as by Linux when memory runs out); restarting all ranks" in output


def test_ranks_that_start_again_find_one_another(launch):
    run = launch(script=COLLECTIVE)
    status, output = run.end(120)
    assert status == 0, output
    assert output.count("rank 1 was killed by SIGKILL") == 1


def test_rank_that_fails_too_often_is_reported(launch):
    run = launch(max_restarts=0)
    run.pid(0), run.pid(1)
    os.kill(run.pid(1), signal.SIGKILL)
    status, output = run.end()
    assert status == 1
    told = [line for line in output.splitlines() if line.startswith("error:")]
    assert told == [
        "error: rank 1 was killed by SIGKILL (as by Linux when memory runs out); all ranks were restarted 0 "
        "times (launch.max_restarts); see their output above"
    ]
    assert "Traceback" not in output


def test_error_of_a_failed_rank_is_reported(launch, tmp_path):
    (tmp_path / "fail_1").touch()
    run = launch()
    status, output = run.end()
    assert status == 1
    assert output.splitlines()[-1] == (
        "error: rank 1 failed with exit status 1: RewardError: the detector is missing; all ranks were restarted "
        "1 times (launch.max_restarts); see their output above"
    )


def test_rank_that_refuses_its_configuration_is_not_started_again(launch, tmp_path):
    (tmp_path / "refuse_0").touch()
    run = launch(max_restarts=3)
    status, output = run.end()
    assert status == 2
    assert output.splitlines()[-1] == (
        "error: rank 0 failed with exit status 2: ConfigError: reward.name: 'x' is unknown"
    )
    assert not (tmp_path / "pid_1_0").exists()


def test_killed_launcher_leaves_no_rank_behind(launch):
    run = launch()
    pids = [run.pid(0), run.pid(1)]
    run.process.kill()
    assert all(is_gone(pid) for pid in pids)


@pytest.fixture
def meeting() -> dict[str, str]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    return {"PET_RDZV_ENDPOINT": f"127.0.0.1:{port}", "PET_RDZV_ID": "test", "PET_LOCAL_ADDR": "127.0.0.1"}


@pytest.fixture
def nodes(launch: Launch, meeting: dict[str, str]) -> tuple[Run, Run]:
    """Two nodes with a rank each; the first has the rendezvous."""
    settings = {"num_nodes": 2, "num_processes": 1, "environment": {**meeting, "SFGRPO_GRACE_S": "3"}}
    host = launch(**settings)
    deadline = time.monotonic() + 60
    while host.process.poll() is None and not _listens(meeting["PET_RDZV_ENDPOINT"]):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    guest = launch(**settings)
    host.pid(0), host.pid(1)
    return host, guest


def _listens(endpoint: str) -> bool:
    host, port = endpoint.split(":")
    with socket.socket() as probe:
        return probe.connect_ex((host, int(port))) == 0


@pytest.mark.parametrize("missing", ["PET_RDZV_ENDPOINT", "PET_RDZV_ID"])
def test_several_nodes_need_an_endpoint_and_an_id_of_the_rendezvous(missing):
    environ = {"PET_RDZV_ENDPOINT": "node-a:29400", "PET_RDZV_ID": "run-1"}
    del environ[missing]
    with pytest.raises(ConfigError, match=r"launch\.num_nodes: 2 nodes need a rendezvous; set PET_RDZV_ENDPOINT"):
        _rendezvous_options(LaunchConfig(num_nodes=2), environ)


def test_nodes_meet_where_the_environment_says_and_stop_together(nodes):
    for node in nodes:
        assert node.process.poll() is None
    nodes[1].process.terminate()
    assert [node.end()[0] for node in nodes] == [75, 75]
    assert nodes[0].saved() == ["saved_0", "saved_1"]


def test_node_that_loses_the_meeting_point_is_resumable(nodes):
    host, guest = nodes
    (host.folder / "busy").touch()
    host.process.kill()
    status, output = guest.end(60)
    assert status == 75
    assert "stopped: the other nodes are out of reach (Rendezvous" in output
    assert "Traceback" not in output
