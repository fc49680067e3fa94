"""Time the upload and the download of a checkpoint: `python -m benchmarks.bucket`.

Sends 200 MB of random bytes to the local S3 server and fetches them: by boto3 alone with its own defaults, which
verifies nothing, and by `Bucket`, which verifies every transfer. The two alternate, and medians are printed, because
machines are noisy. The last column is the CPU time of this process, which a training beside it would lose.
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

Transfer = tuple[Callable[[Path], object], Callable[[Path], object]]
"""Upload of a file and download to one."""


def boto3_transfer() -> Transfer:
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


def bucket_transfer(sha256: str) -> Transfer:
    """Return upload and download as the mirror of a run does them; the manifest of a checkpoint has the digests."""
    bucket = Bucket(f"s3://{BUCKET}/verified")

    def send(path: Path) -> None:
        with path.open("rb") as file:
            bucket.put("checkpoint", file, sha256)

    def fetch(path: Path) -> None:
        with path.open("wb") as file:
            if bucket.fetch("checkpoint", file) != bucket.sha256("checkpoint"):
                raise RuntimeError("the download differs from the upload")

    return send, fetch


def timed(transfer: Callable[[Path], object], path: Path) -> tuple[float, float]:
    """Return the seconds that a transfer took, and the CPU seconds of this process."""
    start, cpu_start = time.perf_counter(), time.process_time()
    transfer(path)
    return time.perf_counter() - start, time.process_time() - cpu_start


def main() -> None:
    """Measure both ways and print a table."""
    argparse.ArgumentParser(prog="python -m benchmarks.bucket", description=str(__doc__).split("\n\n")[1]).parse_args()
    seconds: dict[tuple[str, str], list[tuple[float, float]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder, "source"), Path(folder, "target")
        source.write_bytes(os.urandom(SIZE))
        server, variables = s3_server(Path(folder, "server"))
        os.environ.update(variables)
        try:
            server.start()
            make_bucket()
            transfers: Mapping[str, Transfer] = {
                "plain boto3": boto3_transfer(),
                "Bucket": bucket_transfer(sha256_of_file(source)),
            }
            for round_index in range(ROUNDS + 1):
                for name, (send, fetch) in transfers.items():
                    measured = {"up": timed(send, source), "down": timed(fetch, target)}
                    # The first round only warms up.
                    for direction, both in measured.items() if round_index else ():
                        seconds.setdefault((direction, name), []).append(both)
        finally:
            server.kill()
    print("| | | s | MB/s | of plain boto3 | CPU s |\n|---|---|---:|---:|---:|---:|")
    for direction in ("up", "down"):
        base = statistics.median(taken for taken, _ in seconds[direction, "plain boto3"])
        for name in transfers:
            taken, cpu = (statistics.median(each) for each in zip(*seconds[direction, name], strict=True))
            rate = f"{SIZE / taken / 1e6:.0f} | {base / taken:.0%}"
            print(f"| {direction} | {name} | {taken:.2f} | {rate} | {cpu:.2f} |")


if __name__ == "__main__":
    main()
