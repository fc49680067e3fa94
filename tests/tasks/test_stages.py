"""Supervised stages: what they print is seen, what they start is ended, what they fail of is told."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from prefect.logging import disable_run_logger
from prefect.states import Failed

from sfgrpo.errors import Preempted
from tasks import stages
from tasks.stages import StageError, dvc_repro, run_command, worth_retrying
from tasks.supervisor import MARK, end_orphans, run_supervised
from tests.support.rank_stubs import LAUNCHER, RANK
from tests.support.stub_pipeline import ROOT, build_stub_pipeline, calls, stub_environment

# Not ours to mend: Prefect's own deprecations.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

SLEEPER = [sys.executable, "-c", "import time; print('ready', flush=True); time.sleep(120)"]
FAMILY = """
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(120)"], start_new_session=True)
print(child.pid, flush=True)
time.sleep(120)
"""


def is_gone(pid: int, within_s: float = 20.0) -> bool:
    deadline = time.monotonic() + within_s
    while time.monotonic() < deadline:
        if not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
            return True
        time.sleep(0.1)
    return False


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.05)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_output_reaches_the_log_and_the_caller_line_by_line(here):
    lines: list[str] = []
    code = "import sys; print('one'); print(); print('two', file=sys.stderr); sys.stdout.write('rest')"
    status = run_supervised([sys.executable, "-uc", code], here / "logs/stage.log", lines.append, grace_s=10)
    assert (status, lines) == (0, ["one", "two", "rest"])
    assert (here / "logs/stage.log").read_text() == "one\n\ntwo\nrest"


def test_lines_arrive_while_the_command_runs(here):
    seen: list[float] = []
    code = "import time; print('early', flush=True); time.sleep(2); print('late')"
    run_supervised([sys.executable, "-c", code], here / "log", lambda line: seen.append(time.monotonic()), grace_s=10)
    assert seen[1] - seen[0] > 1


@pytest.mark.parametrize(
    ("code", "status"), [("raise SystemExit(3)", 3), ("import os; os.kill(os.getpid(), 9)", 128 + 9)]
)
def test_exit_status_is_that_of_the_command(here, code, status):
    assert run_supervised([sys.executable, "-c", code], here / "log", print, grace_s=10) == status


def test_interrupted_caller_ends_the_command_and_its_children_in_other_sessions(here):
    pids: list[int] = []

    def interrupt(line: str) -> None:
        pids.append(int(line))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_supervised([sys.executable, "-c", FAMILY], here / "log", interrupt, grace_s=10)
    assert is_gone(pids[0])


def test_command_is_out_of_reach_of_the_terminal_of_its_caller(here):
    seen: list[str] = []
    code = "import os; print(os.getsid(0), os.getpgid(0))"
    run_supervised([sys.executable, "-c", code], here / "log", seen.append, grace_s=10)
    assert not {str(os.getsid(0)), str(os.getpgid(0))} & set(seen[0].split())


SAVING = """
import signal, sys, time
def save(number, frame):
    time.sleep(1)
    print("stopped: its state after update 3 is saved, and starting it again goes on", flush=True)
    sys.exit("stopped: the ranks have left")
signal.signal(signal.SIGTERM, save)
print("ready", flush=True)
time.sleep(120)
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_what_a_command_says_while_it_is_ended_is_heard_however_often_its_caller_is_told(here, number, monkeypatch):
    monkeypatch.setattr(stages, "_unfinished", {})
    seen: list[str] = []
    timers = [threading.Timer(delay, os.kill, (os.getpid(), number)) for delay in (0.3, 0.6, 0.9)]

    def interrupt(line: str) -> None:
        seen.append(line)
        if line == "ready":
            for timer in timers:
                timer.start()
            raise KeyboardInterrupt

    with disable_run_logger(), pytest.raises(KeyboardInterrupt):
        run_command("train", [sys.executable, "-c", SAVING], on_line=interrupt)
    for timer in timers:
        timer.join()
    assert seen[-1] == "stopped: the ranks have left"
    words = stages.unfinished_stages()
    assert words == {"train": "its state after update 3 is saved, and starting it again goes on"}
    with disable_run_logger():
        run_command("train", [sys.executable, "-c", ""])
    assert not stages.unfinished_stages()


def test_killed_caller_leaves_nothing_behind(here):
    code = f"import pathlib; from tasks.supervisor import run_supervised as run; run({[sys.executable, '-c', FAMILY]}, "
    code += "pathlib.Path('log'), print, grace_s=10)"
    caller = subprocess.Popen([sys.executable, "-c", code], env=stub_environment(), stdout=subprocess.DEVNULL)
    log = here / "log"
    wait_for(lambda: log.exists() and log.read_text().endswith("\n"))
    caller.kill()
    caller.wait()
    assert is_gone(int(log.read_text()))


def test_what_a_killed_supervisor_leaves_is_ended_by_the_next_run(here):
    orphan = subprocess.Popen(SLEEPER, env={**os.environ, MARK: f"1 0.0 {here}"}, stdout=subprocess.PIPE)
    orphan.stdout.readline()
    run_supervised([sys.executable, "-c", ""], here / "log", print, grace_s=10)
    assert orphan.wait(10) == -signal.SIGTERM
    orphan.stdout.close()


def test_work_of_living_supervisors_and_of_other_folders_is_left_alone(here):
    me = psutil.Process()
    marks = (f"{me.pid} {me.create_time()} {here}", f"1 0.0 {here / 'elsewhere'}", "nonsense")
    others = [subprocess.Popen(SLEEPER, env={**os.environ, MARK: mark}, stdout=subprocess.PIPE) for mark in marks]
    for other in others:
        other.stdout.readline()
    assert end_orphans(here, 10) == []
    for other in others:
        other.kill()
        other.communicate()


def test_command_runs_with_this_python(here):
    with disable_run_logger():
        run_command("which", ["python", "-c", "import sys; print(sys.prefix)"])
    assert (here / "logs/which.log").read_text().strip() == sys.prefix


def test_failure_tells_the_last_lines_of_the_stage(here):
    code = "import sys; [print('noise', i) for i in range(50)]; sys.exit('RewardError: the detector is missing')"
    with disable_run_logger(), pytest.raises(StageError, match="RewardError: the detector is missing") as caught:
        run_command("train", [sys.executable, "-c", code])
    assert str(caught.value).startswith("stage train failed with exit status 1; its last lines were\n  noise")
    assert "noise 20\n" not in str(caught.value)


def test_secrets_that_a_program_prints_reach_neither_the_log_of_the_flow_nor_its_error(here, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "S3cret-of-the-store")
    shown = []
    code = "import sys; print('at http://me:pa/ss@host'); sys.exit('denied to S3cret-of-the-store')"
    with disable_run_logger(), pytest.raises(StageError) as caught:
        run_command("push", [sys.executable, "-c", code], on_line=shown.append)
    assert shown == ["at http://***@host", "denied to ***"]
    assert caught.value.lines == tuple(shown)


def test_exit_status_of_the_stage_is_read_from_what_dvc_says(here):
    build_stub_pipeline(here)
    (here / "fail_prompts").write_text("2")
    with disable_run_logger(), pytest.raises(StageError, match="PolicyError: the stub was told to fail") as caught:
        run_command("prompts", dvc_repro("prompts"))
    assert caught.value.status == 2


def test_stage_that_was_told_to_stop_goes_on_by_itself(here, monkeypatch):
    monkeypatch.setattr(stages, "RETRY_DELAY_S", 0)
    build_stub_pipeline(here)
    (here / "preempt_prompts").write_text("2")
    with disable_run_logger():
        run_command("prompts", dvc_repro("prompts"))
    assert calls(here) == ["prompts"] * 3


def test_stage_does_not_go_on_when_the_flow_is_told_to_stop_as_well(here, monkeypatch):
    monkeypatch.setattr(stages, "is_stopping", lambda within_s=0.0: True)
    build_stub_pipeline(here)
    (here / "preempt_prompts").write_text("2")
    with disable_run_logger(), pytest.raises(Preempted, match="stage prompts was told to stop"):
        run_command("prompts", dvc_repro("prompts"))
    assert calls(here) == ["prompts"]
    assert not worth_retrying(stages.prompts, None, Failed(data=StageError("prompts", 1, ())))


def test_wrong_variable_is_a_wrong_configuration_of_the_stage(here, monkeypatch):
    monkeypatch.setenv("SFGRPO_GRACE_S", "soon")
    with disable_run_logger(), pytest.raises(StageError, match="SFGRPO_GRACE_S: 'soon'") as caught:
        run_command("train", [sys.executable, "-c", ""])
    assert caught.value.status == 2


@pytest.mark.slow
@pytest.mark.distributed
def test_ranks_below_a_stopped_caller_save_their_state_and_are_gone_in_the_time_that_prefect_gives(here):
    (here / "rank.py").write_text(RANK)
    command = [sys.executable, "-c", LAUNCHER, '{"num_processes": 2}']
    code = "import pathlib; from sfgrpo.runtime.shutdown import sigterm_as_exit\n"
    code += "from tasks.supervisor import run_supervised\n"
    code += f"with sigterm_as_exit(): run_supervised({command}, pathlib.Path('log'), print, grace_s=20)"
    caller = subprocess.Popen([sys.executable, "-c", code], env=stub_environment(), stdout=subprocess.DEVNULL)
    wait_for(lambda: len(list(here.glob("pid_*"))) == 2)
    below = psutil.Process(caller.pid).children(recursive=True)
    begin = time.monotonic()
    caller.terminate()
    assert caller.wait(30) == 128 + signal.SIGTERM
    assert sorted(path.name for path in here.glob("saved_*")) == ["saved_0", "saved_1"]
    assert len(below) == 4 and all(is_gone(process.pid) for process in below)
    assert time.monotonic() - begin < 10


def test_stage_is_reproduced_once(here):
    build_stub_pipeline(here)
    with disable_run_logger():
        run_command("prompts", dvc_repro("prompts"))
        run_command("prompts", dvc_repro("prompts"))
    assert calls(here) == ["prompts"]


@pytest.mark.parametrize(
    ("error", "again"), [(StageError("train", 1, ()), True), (StageError("train", 2, ()), False), (OSError(), True)]
)
def test_everything_but_wrong_parameters_is_worth_retrying(error, again):
    assert worth_retrying(stages.train, None, Failed(data=error)) is again


def test_supervisor_loads_no_slow_library():
    code = "import sys, tasks.supervisor; sys.exit(bool({'prefect', 'torch', 'pydantic'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
