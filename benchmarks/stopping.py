"""Time Ctrl-C in `make demo`, from the keys to the prompt: `python -m benchmarks.stopping`.

Runs `make demo` in a copy of this checkout, in a process group of its own as a shell makes it, and sends SIGINT to the
group at several moments: on the machine as it is, and with two busy loops beside it. Then it checks that the last line
of the program says what was saved, and that no process is left.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parents[1]
NUM_LOOPS = 2
START_S, END_S = 600.0, 120.0
MOMENTS: Mapping[str, str] = {
    "the temporary Prefect server starts": "Starting temporary server",
    "the training loads its libraries": "python -m sfgrpo train",
    "the evaluation before training": ": new run train-",
    "the first update": "update 0: GenEval",
    "a later update": "update 3/",
}
"""Text after which Ctrl-C is typed, by what the demo is doing then."""


def copy_checkout(folder: Path) -> None:
    """Copy what Git has or would add, with the virtual environment by a link, and commit it."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", "--deduplicate"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in filter(None, listed.split("\0")):
        # The link to the virtual environment, where there is one, is made below.
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)
    (folder / ".venv").symlink_to(Path(sys.prefix))
    identity = ["-c", "user.name=Benchmark", "-c", "user.email=benchmark@example.org", "-c", "commit.gpgsign=false"]
    for arguments in (["init", "--quiet"], ["add", "--all"], [*identity, "commit", "--quiet", "--message", "Copy"]):
        subprocess.run(["git", *arguments], cwd=folder, check=True)


@contextlib.contextmanager
def busy_loops(number: int) -> Iterator[None]:
    """Keep so many cores busy during the block."""
    loops = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(number)]
    try:
        yield
    finally:
        for loop in loops:
            loop.kill()
            loop.wait()


def time_interrupt(folder: Path, text: str) -> tuple[float, str]:
    """Interrupt the demo once it has printed a text; return the seconds to the prompt and the program's last line."""
    log = folder / "logs/demo.log"
    log.parent.mkdir(exist_ok=True)
    with log.open("wb") as output:
        # `setup` is left out: the packages are there, and this is no place to install others.
        demo = subprocess.Popen(
            ["make", "--assume-old=setup", "demo"],
            cwd=folder,
            stdout=output,
            stderr=output,
            start_new_session=True,
            preexec_fn=_hear_interrupts,
        )
    try:
        deadline = time.monotonic() + START_S
        while text not in log.read_text(errors="replace"):
            if demo.poll() is not None or time.monotonic() > deadline:
                raise SystemExit(f"the demo did not get to {text!r}:\n{log.read_text(errors='replace')}")
            time.sleep(0.05)
        # Into the middle of what begins with that line.
        time.sleep(0.5)
        below = psutil.Process(demo.pid).children(recursive=True)
        started = time.monotonic()
        os.killpg(demo.pid, signal.SIGINT)
        demo.wait(END_S)
        seconds = time.monotonic() - started
        _, left = psutil.wait_procs(below, 10)
        if left:
            raise SystemExit(f"processes are left: {left}")
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(demo.pid, signal.SIGKILL)
    said = [line for line in log.read_text(errors="replace").splitlines() if not line.startswith("make: ")]
    return seconds, said[-1]


def _hear_interrupts() -> None:
    # A script's background jobs ignore SIGINT, and so would what this starts there.
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def main() -> None:
    """Print one line for each moment and load."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--moments", nargs="+", choices=range(len(MOMENTS)), type=int, default=range(len(MOMENTS)))
    chosen = [list(MOMENTS.items())[number] for number in parser.parse_args().moments]
    print(f"load average before: {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores", flush=True)
    print("\n| Ctrl-C during | Busy loops | Seconds to the prompt | Last line |\n|---|---:|---:|---|", flush=True)
    for name, text in chosen:
        for number in (0, NUM_LOOPS):
            with tempfile.TemporaryDirectory(prefix="stopping-") as folder, busy_loops(number):
                copy_checkout(Path(folder))
                seconds, line = time_interrupt(Path(folder), text)
            print(f"| {name} | {number} | {seconds:.1f} | {line} |", flush=True)


if __name__ == "__main__":
    main()
