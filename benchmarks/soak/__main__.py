"""Soak test: a disturbed training must end where an undisturbed one ends: `python -m benchmarks.soak`.

A small training of the shapes world by two processes runs twice: undisturbed, and then, with an MLflow server and a
mirror on an S3 server, while processes and servers are killed, stopped and frozen at random. Both must end with the
same files, bit for bit, and record and mirror must be complete. Exit status 0 means that all of this holds.
"""

from __future__ import annotations

import argparse
import math
import os
import random
import shutil
import sys
import time
from contextlib import ExitStack
from pathlib import Path

from benchmarks.soak.faults import Chaos
from benchmarks.soak.services import make_bucket, mlflow_server, s3_server
from benchmarks.soak.summary import recovery_complaints, summary
from benchmarks.soak.training import CLEAN, MARK, SoakError, Training, lay_out, processes_where
from benchmarks.soak.verdicts import no_process_left, verdicts
from sfgrpo.runtime.process import end_processes
from sfgrpo.runtime.shutdown import sigterm_as_exit

CALIBRATION_UPDATES = 8
WORK_SHARE = 0.5
"""The share of the disturbed run spent on updates that last; the rest is restarts and replays."""
FAULTS_PER_MINUTE = 25 / 30
MARGIN = 1.2
"""Planned faults for each demanded one."""


def main() -> int:
    """Run the soak and return the exit status."""
    arguments = _arguments()
    folder: Path = arguments.folder.resolve()
    folder.mkdir(parents=True)
    for name in [name for name in os.environ if name.startswith(CLEAN)]:
        del os.environ[name]
    print(f"soak folder: {folder}", flush=True)
    with sigterm_as_exit(), ExitStack() as ending:
        ending.callback(lambda: end_processes(lambda: processes_where(**{MARK: str(folder)}), 0.0))
        try:
            text, holds = _soak(folder, arguments.minutes, arguments.seed, ending)
        except SoakError as error:
            text, holds = f"The soak was aborted: {error}", False
    (folder / "summary.md").write_text(f"{text}\n", encoding="utf-8")
    print(f"\n{text}")
    return 0 if holds else 1


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.soak", description=__doc__.splitlines()[0])
    default = Path(f".scratch/soak/{time.strftime('%Y%m%d-%H%M%S')}")
    parser.add_argument("--minutes", type=float, default=30.0, help="length of the disturbed run (%(default)g)")
    parser.add_argument("--seed", type=int, default=0, help="of the faults (%(default)s)")
    parser.add_argument("--folder", type=Path, default=default, help="a new folder (.scratch/soak/<time>)")
    return parser.parse_args()


def _soak(folder: Path, minutes: float, seed: int, ending: ExitStack) -> tuple[str, bool]:
    num_updates = max(10, round(WORK_SHARE * 60 * minutes / _calibrated(folder, ending) / 10) * 10)
    print(f"{num_updates} updates, undisturbed first", flush=True)
    for name in ("undisturbed", "disturbed"):
        lay_out(folder / name, num_updates)
    undisturbed = ending.enter_context(Training(folder / "undisturbed", num_updates))
    undisturbed.finish()
    print(f"done in {undisturbed.seconds:.0f} s; now the faults", flush=True)

    mlflow = mlflow_server(folder / "mlflow")
    s3, variables = s3_server(folder / "s3")
    os.environ.update(variables)
    for service in (mlflow, s3):
        service.start()
    mirror = make_bucket()
    more = variables | {"MLFLOW_TRACKING_URI": mlflow.uri, "SFGRPO_MIRROR": mirror}
    training = ending.enter_context(Training(folder / "disturbed", num_updates, more))
    num_demanded = math.ceil(FAULTS_PER_MINUTE * minutes)
    num_planned = math.ceil(MARGIN * num_demanded)
    chance = random.Random(seed)
    chaos = Chaos(training, (mlflow, s3), mirror, chance, num_planned, undisturbed.seconds_per_update)
    ending.callback(chaos.stop)
    chaos.run()
    print(f"done in {training.seconds:.0f} s; now the comparison", flush=True)

    enough = "" if len(chaos.faults) >= num_demanded else f"only {len(chaos.faults)}"
    found = [
        (f"at least {num_demanded} faults", enough),
        ("every process ended as it should", "; ".join(chaos.complaints)),
        ("every resumption lost no more than it had to", "; ".join(recovery_complaints(training, chaos.faults))),
        *verdicts(folder / "undisturbed", folder / "disturbed", mlflow.uri, mirror, num_updates),
    ]
    for service in (mlflow, s3):
        service.kill()
    found.append(no_process_left(folder))
    return summary(undisturbed, training, chaos.faults, found), not any(complaint for _, complaint in found)


def _calibrated(folder: Path, ending: ExitStack) -> float:
    """Measure the seconds of an update."""
    lay_out(folder / "calibration", CALIBRATION_UPDATES)
    training = ending.enter_context(Training(folder / "calibration", CALIBRATION_UPDATES))
    training.finish()
    shutil.rmtree(folder / "calibration")
    return training.seconds_per_update


if __name__ == "__main__":
    sys.exit(main())
