"""Time a training by one and by several processes on one machine: `python -m benchmarks.processes`.

Trains the shapes by the shipped parameters, a few updates each, with one process of one thread, one of as many threads
as there are cores, and as many processes of one thread. Variants take turns, and medians are printed, because machines
are noisy. Then every run is started again for one more update, to time a resume.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

from ruamel.yaml import YAML

ROOT = Path(__file__).resolve().parents[1]
NUM_CORES = len(os.sched_getaffinity(0))
NUM_UPDATES, ROUNDS = 4, 3
VARIANTS: Mapping[str, tuple[int, int]] = {
    "1 process, 1 thread": (1, 1),
    f"1 process, {NUM_CORES} threads": (1, NUM_CORES),
    f"{NUM_CORES} processes, 1 thread": (NUM_CORES, 1),
}


def lay_out(folder: Path, num_processes: int) -> None:
    """Create a folder in which the training runs, and saves after every update but the first."""
    (folder / "models").mkdir()
    (folder / "models/shapes-base").symlink_to(ROOT / "models/shapes-base")
    params = YAML(typ="safe", pure=True).load(ROOT / "params.yaml")
    params["launch"] = {"num_processes": num_processes}
    params["update"]["num_updates"] = NUM_UPDATES
    params["checkpoint"]["every_num_updates"] = NUM_UPDATES - 1
    params["evaluation"] |= {"every_num_updates": 10 * (NUM_UPDATES - 1), "images_per_prompt": 1, "num_steps": 1}
    (folder / "params.yaml").write_text(json.dumps(params))
    run(folder, "prompts", 1)


def run(folder: Path, stage: str, num_threads: int) -> float:
    """Run a stage and return the seconds until its first update, or until its end if it has none."""
    threads = {"OMP_NUM_THREADS": str(num_threads), "SFGRPO_NUM_THREADS": str(num_threads)}
    environment = {**os.environ, **threads, "PYTHONPATH": str(ROOT), "SFGRPO_DEVICE": "cpu"}
    started, first = time.monotonic(), 0.0
    command = [sys.executable, "-m", "sfgrpo", stage]
    with (
        (folder / "log").open("a") as log,
        subprocess.Popen(
            command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=log, text=True
        ) as process,
    ):
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("update ") and not first:
                first = time.monotonic() - started
    if process.returncode:
        raise RuntimeError(f"{' '.join(command)} failed with {process.returncode}:\n{(folder / 'log').read_text()}")
    return first or time.monotonic() - started


def measure(num_processes: int, num_threads: int) -> tuple[float, float, float]:
    """Return images per second, and the seconds from launch to the first update of a new and of a resumed run."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        lay_out(folder, num_processes)
        fresh = run(folder, "train", num_threads)
        history = json.loads((folder / "reports/train/history.json").read_text())
        seconds = [metrics["time/total_s"] for metrics in history[1:]]
        rollout = YAML(typ="safe", pure=True).load(folder / "params.yaml")["rollout"]
        images = rollout["prompts_per_update"] * rollout["group_size"]
        # Without its last checkpoint the run has its last update to do again.
        (last,) = folder.glob(f".scratch/train-*/checkpoints/update-{NUM_UPDATES:06d}")
        shutil.rmtree(last)
        return images / statistics.median(seconds), fresh, run(folder, "train", num_threads)


def main() -> None:
    """Measure all variants in turn and print the medians."""
    argparse.ArgumentParser(
        prog="python -m benchmarks.processes", description=str(__doc__).split("\n\n")[1]
    ).parse_args()
    rounds = [{name: measure(*variant) for name, variant in VARIANTS.items()} for _ in range(ROUNDS)]
    print("| | images/s | x the first | first update after s | resumed after s |\n|---|---:|---:|---:|---:|")
    base = 0.0
    for name in VARIANTS:
        speed, fresh, resumed = (statistics.median(each[name][i] for each in rounds) for i in range(3))
        base = base or speed
        print(f"| {name} | {speed:.1f} | {speed / base:.2f} | {fresh:.1f} | {resumed:.1f} |")


if __name__ == "__main__":
    main()
