"""Programs that stand in for a launcher and its ranks and need no model."""

from __future__ import annotations

import signal

LAUNCHER = """
import json, pathlib, sys
from sfgrpo.runtime.entry_point import run_guarded, set_up_logging
from sfgrpo.runtime.environment import read_environment
from sfgrpo.runtime.shutdown import LAUNCHER_MARGIN_S, GracefulShutdown
from sfgrpo.config.schema import LaunchConfig

def launch():
    environment = read_environment()
    with GracefulShutdown(environment.grace_s + LAUNCHER_MARGIN_S) as shutdown:
        pathlib.Path("launching").touch()
        from sfgrpo.runtime.launcher import launch_ranks
        launch_ranks(LaunchConfig(**json.loads(sys.argv[1])), environment, ["rank.py"], shutdown)

set_up_logging()
sys.exit(run_guarded(launch))
"""
RANK = """
import os, pathlib, sys, time
from sfgrpo.runtime.entry_point import run_guarded, set_up_logging
from sfgrpo.runtime.environment import read_environment
from sfgrpo.errors import ConfigError, Preempted, RewardError
from sfgrpo.runtime.shutdown import GracefulShutdown
from sfgrpo.runtime.rank import die_with_launcher

rank, attempt = os.environ["RANK"], os.environ["TORCHELASTIC_RESTART_COUNT"]

def mark(name, text=""):
    partial = pathlib.Path(f".{name}.{rank}")
    partial.write_text(text)
    partial.rename(name)

def train():
    die_with_launcher()
    with GracefulShutdown(read_environment().grace_s) as shutdown, shutdown.deferred():
        mark(f"pid_{attempt}_{rank}", str(os.getpid()))
        mark(f"meeting_{attempt}_{rank}", os.environ["MASTER_ADDR"] + ":" + os.environ["MASTER_PORT"])
        if pathlib.Path(f"fail_{rank}").exists():
            raise RewardError("the detector is missing")
        if pathlib.Path(f"refuse_{rank}").exists():
            raise ConfigError("reward.name: 'x' is unknown")
        while not pathlib.Path("finish").exists():
            time.sleep(0.02)
            # One rank is told, all know: what the trainer agrees on by a collective.
            if shutdown.stop_requested and not pathlib.Path("busy").exists():
                mark(f"stop_{attempt}")
            if pathlib.Path(f"stop_{attempt}").exists():
                time.sleep(0.2)
                mark(f"saved_{rank}")
                raise Preempted("its state after update 3 is saved, and starting it again goes on")

set_up_logging()
sys.exit(run_guarded(train))
"""


def hear_signals() -> None:
    """Restore the default handlers of signals that background jobs and nohup ignore."""
    for number in (signal.SIGHUP, signal.SIGINT):
        signal.signal(number, signal.SIG_DFL)
