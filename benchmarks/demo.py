"""Run the demo once per seed and measure its gains and their spread: `python -m benchmarks.demo --out FOLDER`.

Every seed gets a clone of this checkout's last commit, in which prompts, training and evaluation run as `make demo`
runs them, with the seed in a parameter file beside `params.yaml`. A seed that is finished is not repeated, and an
interrupted one goes on from its last checkpoint. `results.json` and `results.md` are written after every seed.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pydantic

from benchmarks.demo_summary import SeedResult, markdown, summarise_seeds
from sfgrpo.config.ranges import Seed
from sfgrpo.errors import ConfigError, SfgrpoError
from sfgrpo.paths import EVALUATE_REPORT
from sfgrpo.preflight.checkout import find_checkout
from sfgrpo.runtime.entry_point import run_guarded
from sfgrpo.runtime.files import write_json

ROOT = Path(__file__).resolve().parents[1]
STAGES = ("prompts", "train", "evaluate")
SEED_PARAMS = "seed.yaml"
"""Parameters of a seed's runs; git does not know the file, so that records name the commit without changes."""
COMMIT, RESULT, SECONDS, LOG = "commit.json", "result.json", "seconds.json", "log.txt"
RESULTS, TABLES = "results.json", "results.md"
STOP_S = 60.0
"""Time that a stage has to save its state when the benchmark ends early."""


class Demo:
    """The runs of a folder: one commit, and a clone of it for every seed."""

    def __init__(self, out: Path, commit: str, num_jobs: int) -> None:
        """Take the folder, the commit of all runs and the number of runs at a time."""
        self.out, self.commit, self.num_jobs = out.resolve(), commit, num_jobs
        self._running: set[subprocess.Popen[bytes]] = set()
        self._lock, self._stopped = threading.Lock(), False

    def run_all(self, seeds: Sequence[int]) -> None:
        """Run every seed that is not finished; write the results again after each.

        Raises:
            SfgrpoError: a stage of a seed failed, after the other seeds were run; it goes on when started again.
        """
        failures: list[str] = []
        todo = [seed for seed in seeds if not (self._folder(seed) / RESULT).exists()]
        for seed in seeds:
            print(f"seed {seed}: {'to do' if seed in todo else 'done before'}", flush=True)
        pool = concurrent.futures.ThreadPoolExecutor(self.num_jobs)
        try:
            for done in concurrent.futures.as_completed([pool.submit(self._run_seed, seed) for seed in todo]):
                try:
                    done.result()
                except SfgrpoError as error:
                    failures.append(str(error))
                    print(f"failed: {error}", flush=True)
                self.write_results(seeds)
        finally:
            self._stop()
            pool.shutdown(cancel_futures=True)
        self.write_results(seeds)
        if failures:
            raise SfgrpoError("\n".join(failures))

    def write_results(self, seeds: Sequence[int]) -> None:
        """Summarise all seeds that are finished in `results.json` and `results.md`."""
        files = [self._folder(seed) / RESULT for seed in seeds]
        results = [SeedResult(**json.loads(file.read_text(encoding="utf-8"))) for file in files if file.exists()]
        if results:
            summary = {"commit": self.commit, "jobs": self.num_jobs} | summarise_seeds(results)
            write_json(self.out / RESULTS, summary)
            (self.out / TABLES).write_text(markdown(summary), encoding="utf-8")

    def _folder(self, seed: int) -> Path:
        return self.out / f"seed-{seed}"

    def _run_seed(self, seed: int) -> None:
        """Run the stages of one seed in its clone, and keep what they measured."""
        folder = self._folder(seed)
        if not (folder / SEED_PARAMS).exists():
            self._clone(folder)
            write_json(folder / SEED_PARAMS, {"extends": "params.yaml", "seed": seed})
        for stage in STAGES:
            self._run_stage(folder, seed, stage)
        metrics = json.loads((folder / EVALUATE_REPORT / "metrics.json").read_text(encoding="utf-8"))
        models = {name: metrics[key] for name, key in (("base", "base"), ("last", "last"), ("best", "policy"))}
        seconds = json.loads((folder / SECONDS).read_text(encoding="utf-8"))
        write_json(folder / RESULT, {"seed": seed, "minutes": sum(seconds.values()) / 60.0, "models": models})
        print(f"seed {seed}: done in {sum(seconds.values()) / 60.0:.1f} min", flush=True)

    def _clone(self, folder: Path) -> None:
        """Clone the commit; a clone that was interrupted is taken up again."""
        if not (folder / ".git").exists():
            git(self.out, "clone", "--quiet", "--shared", "--no-checkout", str(find_checkout(ROOT)), str(folder))
        git(folder, "checkout", "--quiet", "--force", "--detach", self.commit)

    def _run_stage(self, folder: Path, seed: int, stage: str) -> None:
        """Run a stage; add its seconds to those of earlier starts, since what these computed is not repeated."""
        command = [sys.executable, "-m", "sfgrpo", stage, "--params", SEED_PARAMS]
        print(f"seed {seed}: {stage}", flush=True)
        started = time.monotonic()
        try:
            with (folder / LOG).open("ab") as log:
                with self._lock:
                    if self._stopped:
                        raise SfgrpoError(f"seed {seed} was stopped before {stage}; start the benchmark again")
                    process = subprocess.Popen(command, cwd=folder, env=self._variables(), stdout=log, stderr=log)
                    self._running.add(process)
                status = process.wait()
        finally:
            self._add_seconds(folder, stage, time.monotonic() - started)
        self._running.discard(process)
        if status:
            raise SfgrpoError(
                f"seed {seed}: `{' '.join(command[1:])}` ended with status {status} ({last_line(folder / LOG)}); "
                f"see {folder / LOG}, then start the benchmark again"
            )

    def _variables(self) -> dict[str, str]:
        """Return the environment of a run: nothing that names another store or repository, and its share of cores."""
        foreign = ("GIT_", "MLFLOW_", "SFGRPO_", "PYTHONPATH")
        kept = {name: value for name, value in os.environ.items() if not name.startswith(foreign)}
        kept |= {name: os.environ[name] for name in ("SFGRPO_DEVICE", "SFGRPO_NUM_THREADS") if name in os.environ}
        if self.num_jobs == 1:
            return kept
        # Threads of runs beside one another mostly wait for each other.
        num_threads = str(max(1, len(os.sched_getaffinity(0)) // self.num_jobs))
        return {"OMP_NUM_THREADS": num_threads, "OMP_WAIT_POLICY": "PASSIVE"} | kept

    def _add_seconds(self, folder: Path, stage: str, seconds: float) -> None:
        path = folder / SECONDS
        known = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        write_json(path, known | {stage: known.get(stage, 0.0) + seconds})

    def _stop(self) -> None:
        """End what still runs: a training saves its state."""
        with self._lock:
            self._stopped = True
            running = [process for process in self._running if process.poll() is None]
        for process in running:
            process.terminate()
        for process in running:
            try:
                process.wait(STOP_S)
            except subprocess.TimeoutExpired:
                process.kill()


def open_demo(out: Path, num_jobs: int) -> Demo:
    """Open a folder of runs; a new one is of the checkout's commit, an old one keeps its own.

    Raises:
        ConfigError: the checkout has changes, which no record would name.
    """
    checkout = find_checkout(ROOT)
    if (out / COMMIT).exists():
        commit = str(json.loads((out / COMMIT).read_text(encoding="utf-8"))["commit"])
    else:
        if changed := git(checkout, "status", "--porcelain", "--untracked-files=no").splitlines():
            raise ConfigError(
                f"{checkout} has {len(changed)} changed files, the first is {changed[0].split()[-1]}, and the runs are "
                "of its last commit; commit them, or take them back by `git stash`"
            )
        commit = git(checkout, "rev-parse", "HEAD")
        write_json(out / COMMIT, {"commit": commit})
    print(f"all runs are of commit {commit}, in {out}", flush=True)
    return Demo(out, commit, num_jobs)


def git(folder: Path, *arguments: str) -> str:
    """Run git in a folder and return what it prints.

    Raises:
        SfgrpoError: git failed; the message is its own.
    """
    # The caller may be a hook of git, whose variables name another repository.
    variables: Mapping[str, str] = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    answer = subprocess.run(["git", *arguments], cwd=folder, env=variables, capture_output=True, text=True)
    if answer.returncode:
        raise SfgrpoError(f"`git {' '.join(arguments)}` failed in {folder}: {answer.stderr.strip()}")
    return answer.stdout.strip()


def last_line(log: Path) -> str:
    """Return the last line of a log that is not blank."""
    lines = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    return lines[-1] if lines else "it printed nothing"


def _seed(text: str) -> int:
    try:
        return pydantic.TypeAdapter(Seed).validate_python(int(text))
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text[:40]!r} is no seed; give whole numbers from 0") from error


def _jobs(text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text) <= 64:
        raise argparse.ArgumentTypeError(f"{text[:40]!r} is no number of runs at a time; give one from 1 to 64")
    return int(text)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the seeds, print the tables and return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.demo", description=str(__doc__).split("\n\n")[0])
    help_text = "seeds of the runs (0 1 2 3 4)"
    parser.add_argument("--seeds", type=_seed, nargs="+", default=list(range(5)), metavar="SEED", help=help_text)
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="folder for clones and results")
    help_text = "runs at a time; the minutes are those of `make demo` only with one (%(default)s)"
    parser.add_argument("--jobs", type=_jobs, default=1, metavar="N", help=help_text)
    chosen: Any = parser.parse_args(arguments)

    def run() -> None:
        seeds = list(dict.fromkeys(chosen.seeds))
        open_demo(chosen.out, chosen.jobs).run_all(seeds)
        print(f"\n{(chosen.out / TABLES).read_text(encoding='utf-8')}\nresults in {chosen.out / RESULTS}")

    return run_guarded(run)


if __name__ == "__main__":
    sys.exit(main())
