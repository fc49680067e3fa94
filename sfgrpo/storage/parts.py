"""Files in parts: their digests, and requests for several parts at a time."""

from __future__ import annotations

import collections
import concurrent.futures
import hashlib
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import BinaryIO, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")

PART_SIZE = 8 * 2**20
"""Bytes of a part; files of at least this size are transferred in parts, of which S3 takes at most 10,000."""
NUM_PARTS_AT_ONCE = 4
"""Parts of one file in flight: as many requests, and as many parts in memory."""


class FileParts:
    """The parts of an open file, digested while they are read."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._sha256 = hashlib.sha256()
        self._md5_of_parts: list[bytes] = []
        self.size = 0
        """Bytes read so far."""

    def __iter__(self) -> Iterator[bytes]:
        while part := self._file.read(PART_SIZE):
            self._sha256.update(part)
            self._md5_of_parts.append(hashlib.md5(part, usedforsecurity=False).digest())
            self.size += len(part)
            yield part

    @property
    def sha256(self) -> str:
        """SHA-256 of what was read so far, as 64 hex digits."""
        return self._sha256.hexdigest()

    @property
    def etag(self) -> str:
        """The ETag that S3 gives to what was read: its MD5, or the MD5 of the parts' MD5s with their number."""
        joined = b"".join(self._md5_of_parts)
        if self.size < PART_SIZE:
            return joined.hex() or hashlib.md5(usedforsecurity=False).hexdigest()
        return f"{hashlib.md5(joined, usedforsecurity=False).hexdigest()}-{len(self._md5_of_parts)}"


def overlapped(work: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
    """Yield `work(item)` for every item, in order, with `NUM_PARTS_AT_ONCE` of them running at a time.

    An error is raised once all that is running has ended.
    """
    running: collections.deque[concurrent.futures.Future[Result]] = collections.deque()
    try:
        for item in items:
            running.append(_start(work, item))
            if len(running) == NUM_PARTS_AT_ONCE:
                yield running.popleft().result()
        while running:
            yield running.popleft().result()
    except Exception:
        concurrent.futures.wait(running)
        raise


def _start(work: Callable[[Item], Result], item: Item) -> concurrent.futures.Future[Result]:
    future: concurrent.futures.Future[Result] = concurrent.futures.Future()

    def run() -> None:
        try:
            future.set_result(work(item))
        except BaseException as error:
            future.set_exception(error)

    # A daemon: the threads of a `ThreadPoolExecutor` would keep the process alive while a server hangs.
    threading.Thread(target=run, name="part of a file", daemon=True).start()
    return future
