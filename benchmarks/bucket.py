"""Time a checkpoint's way to S3 and back: `python -m benchmarks.bucket`.

Sends 200 MB of random bytes to the local S3 server and fetches them, by boto3 alone with its own defaults, which proves
nothing, and by `Bucket` with its proofs: digests before, while and after. Both take turns, and medians are printed,
because machines are noisy. The last column is the CPU time of this process, which a training beside it would miss.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from benchmarks.soak.services import BUCKET, make_bucket, s3_server
from sfgrpo.runtime.manifest import sha256_of_file
from sfgrpo.storage.s3 import Bucket

SIZE = 200_000_000
ROUNDS = 5

Way = tuple[Callable[[Path], object], Callable[[Path], object]]


def by_boto3() -> Way:
    """Return upload and download by boto3 alone."""
    import boto3

    client = boto3.session.Session().client("s3")

    def send(path: Path) -> None:
        with path.open("rb") as file:
            client.upload_fileobj(file, BUCKET, "plain")

    def fetch(path: Path) -> None:
        with path.open("wb") as file:
            client.download_fileobj(BUCKET, "plain", file)

    return send, fetch


def by_bucket(sha256: str) -> Way:
    """Return upload and download as the mirror of a run does them; checkpoints bring their digests."""
    bucket = Bucket(f"s3://{BUCKET}/proven")

    def send(path: Path) -> None:
        with path.open("rb") as file:
            bucket.put("checkpoint", file, sha256)

    def fetch(path: Path) -> None:
        with path.open("wb") as file:
            if bucket.fetch("checkpoint", file) != bucket.sha256("checkpoint"):
                raise RuntimeError("what came back is not what was sent")

    return send, fetch


def clocked(work: Callable[[Path], object], path: Path) -> tuple[float, float]:
    """Return the seconds that the work took, and the CPU seconds of this process."""
    started, computed = time.perf_counter(), time.process_time()
    work(path)
    return time.perf_counter() - started, time.process_time() - computed


def main() -> None:
    """Measure and print."""
    argparse.ArgumentParser(prog="python -m benchmarks.bucket", description=str(__doc__).split("\n\n")[1]).parse_args()
    seconds: dict[tuple[str, str], list[tuple[float, float]]] = {}
    with tempfile.TemporaryDirectory() as name:
        source, target = Path(name, "source"), Path(name, "target")
        source.write_bytes(os.urandom(SIZE))
        server, variables = s3_server(Path(name, "server"))
        os.environ.update(variables)
        try:
            server.start()
            make_bucket()
            ways: Mapping[str, Way] = {"plain boto3": by_boto3(), "Bucket": by_bucket(sha256_of_file(source))}
            for round_index in range(ROUNDS + 1):
                for way, (send, fetch) in ways.items():
                    measured = {"up": clocked(send, source), "down": clocked(fetch, target)}
                    for direction, both in measured.items() if round_index else ():  # the first round warms up
                        seconds.setdefault((direction, way), []).append(both)
        finally:
            server.kill()
    print("| | | s | MB/s | of plain boto3 | CPU s |\n|---|---|---:|---:|---:|---:|")
    for direction in ("up", "down"):
        base = statistics.median(taken for taken, _ in seconds[direction, "plain boto3"])
        for way in ways:
            taken, computed = (statistics.median(each) for each in zip(*seconds[direction, way], strict=True))
            rate = f"{SIZE / taken / 1e6:.0f} | {base / taken:.0%}"
            print(f"| {direction} | {way} | {taken:.2f} | {rate} | {computed:.2f} |")


if __name__ == "__main__":
    main()
