"""The worker that starts scheduled flow runs as processes of this machine."""

from __future__ import annotations

import os
from datetime import datetime

from infra.stack.clients import client_environment
from infra.stack.program import BIN, ROOT, Launch, Program, Stack
from infra.stack.programs.prefect import ask_prefect

POOL = "sfgrpo"
NAME = "local"


def _launch(stack: Stack) -> Launch:
    folder = stack.folder.make_data("worker")
    return Launch(
        command=[
            *(str(BIN / "prefect"), "--no-prompt", "worker", "start"),
            *("--pool", POOL, "--type", "process", "--name", NAME),
        ],
        environment={
            **client_environment(stack),
            # Flows call `dvc` and `prefect` by name.
            "PATH": os.pathsep.join([str(BIN), os.environ.get("PATH", os.defpath)]),
            "PREFECT_HOME": str(folder),
            "TMPDIR": str(stack.folder.temporary),
            # In seconds; a flow run that has missed three heartbeats counts as dead.
            "PREFECT_FLOWS_HEARTBEAT_FREQUENCY": "30",
            "MLFLOW_DISABLE_TELEMETRY": "true",
        },
        working_directory=ROOT,
    )


def _last_heartbeat(stack: Stack) -> float:
    workers = ask_prefect(stack, f"work_pools/{POOL}/workers/filter", {})
    times = [
        datetime.fromisoformat(worker["last_heartbeat_time"]).timestamp()
        for worker in workers
        if worker["name"] == NAME and worker["status"] == "ONLINE"
    ]
    return max(times, default=0.0)


WORKER = Program(
    name="worker",
    launch=_launch,
    last_heartbeat=_last_heartbeat,
    address=lambda stack: f"work pool {POOL}",
    needs=("prefect",),
    keeps_children=True,
    # Prefect itself gives flow runs 30 seconds.
    stop_timeout_s=40,
)
