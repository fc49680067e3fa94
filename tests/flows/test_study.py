"""The study's flow against a real Prefect server and real DVC, with runs that take no time."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tasks.git import git
from tests.support.stub_pipeline import ROOT, calls, stub_environment

PLAN = {
    "tiny": {
        "seeds": [0, 1],
        "num_updates": 1,
        "evaluate_every_num_updates": 1,
        "rows": {"flow_grpo": "Flow-GRPO", "stepwise": "Stepwise"},
        "pairs": [{"title": "Tiny", "flow_grpo": "flow_grpo", "stepwise": "stepwise"}],
        "ablations": [],
    }
}
STAGES = {
    "stages": {
        "tiny": {
            "matrix": {"row": ["flow_grpo", "stepwise"], "seed": [0, 1]},
            "wdir": "..",
            "cmd": "python stub.py study/tiny/${item.row}/${item.seed}",
            "outs": ["study/tiny/${item.row}/${item.seed}"],
        },
        "tiny-report": {
            "wdir": "..",
            "cmd": "python stub.py reports/study/tiny",
            "deps": ["study/tiny"],
            "outs": ["reports/study/tiny"],
        },
    }
}
STUB = """
import os, pathlib, sys, time

with open("calls.txt", "a") as calls:
    print(sys.argv[1], os.environ["SFGRPO_NUM_THREADS"], sep=":", file=calls)
print("stub runs", flush=True)
if pathlib.Path("slow").exists():
    time.sleep(600)
if pathlib.Path("fail").exists() and "stepwise/1" in sys.argv[1]:
    sys.exit(2)
pathlib.Path(sys.argv[1]).mkdir(parents=True)
pathlib.Path(sys.argv[1], "run.json").write_text("{}")
"""

pytestmark = pytest.mark.slow


@pytest.fixture
def project(tmp_path: Path) -> Path:
    (tmp_path / "experiments").mkdir()
    (tmp_path / "experiments/study.yaml").write_text(json.dumps(PLAN))
    (tmp_path / "experiments/dvc.yaml").write_text(json.dumps(STAGES))
    (tmp_path / "stub.py").write_text(STUB)
    for name in ("params.yaml", "prefect.toml", ".dvcignore", ".gitignore", ".dvc/config"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes((ROOT / name).read_bytes())
    subprocess.run(["git", "init", "--quiet"], cwd=tmp_path, check=True)
    git(tmp_path, "add", "--all")
    git(tmp_path, "-c", "user.name=A", "-c", "user.email=a@example.org", "commit", "--quiet", "-m", "First")
    return tmp_path


@pytest.fixture
def started(project: Path, prefect_server: str) -> Iterator[subprocess.Popen[str]]:
    with start(project, prefect_server) as flow:
        yield flow
        flow.kill()


def start(project: Path, prefect_server: str) -> subprocess.Popen[str]:
    environment = {key: value for key, value in stub_environment().items() if not key.startswith("PREFECT_")}
    environment["PREFECT_API_URL"] = prefect_server
    command = [sys.executable, "-m", "flows.study", "tiny"]
    return subprocess.Popen(
        command, cwd=project, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def test_study_runs_every_run_with_one_thread_and_then_reports(project, prefect_server):
    flow = start(project, prefect_server)
    output, _ = flow.communicate(timeout=240)
    assert flow.returncode == 0, output
    *runs, last = calls(project)
    assert sorted(runs) == [f"study/tiny/{row}/{seed}:1" for row in ("flow_grpo", "stepwise") for seed in (0, 1)]
    assert last == "reports/study/tiny:1"
    again = start(project, prefect_server)
    assert again.communicate(timeout=240) and again.returncode == 0
    assert calls(project) == []


def test_failed_run_fails_the_study_after_the_others_are_done(project, prefect_server):
    (project / "fail").touch()
    flow = start(project, prefect_server)
    output, _ = flow.communicate(timeout=240)
    assert flow.returncode == 1
    assert "short" not in output and "failed with exit status 2" in output
    assert (project / "study/tiny/flow_grpo/1").exists()
    assert not (project / "reports/study/tiny").exists()


def test_interrupted_study_leaves_no_process(project, started):
    (project / "slow").touch()
    deadline = time.monotonic() + 120
    while not (project / "calls.txt").exists() and time.monotonic() < deadline:
        time.sleep(0.5)
    below = psutil.Process(started.pid).children(recursive=True)
    assert any("stub.py" in " ".join(process.cmdline()) for process in below)
    started.send_signal(signal.SIGTERM)
    started.communicate(timeout=60)
    _, alive = psutil.wait_procs(below, timeout=20)
    assert not [process for process in alive if process.status() != psutil.STATUS_ZOMBIE]
