"""Queue whose background thread delivers in order and retries during outages."""

from __future__ import annotations

import logging
import random
import threading
import time
from collections import deque
from collections.abc import Callable

logger = logging.getLogger(__name__)

FIRST_DELAY_S = 0.25
MAX_DELAY_S = 10.0


class DeliveryQueue:
    """A first-in, first-out queue of requests that one daemon thread sends.

    A request that fails by an outage is repeated until it succeeds, so it must be idempotent. A refused one clears the
    queue, because later requests may depend on it; the refusal is kept for `take_refusal`.
    """

    def __init__(self, receiver: str, is_outage: Callable[[Exception], bool]) -> None:
        """Create an empty queue.

        Args:
            receiver: name for the log.
            is_outage: tells an outage from a refusal.
        """
        self.outage: Exception | None = None
        """Error of the last attempt; None if it succeeded."""
        self._receiver = receiver
        self._is_outage = is_outage
        self._queue: deque[Callable[[], object]] = deque()
        self._refusal: Exception | None = None
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, name=f"delivery to {receiver}", daemon=True)

    def __len__(self) -> int:
        return len(self._queue)

    def put(self, send: Callable[[], object]) -> None:
        """Queue a request and return at once."""
        with self._changed:
            self._queue.append(send)
            self._changed.notify_all()
            if not self._thread.is_alive():
                self._thread.start()

    def wait_until_empty(self, deadline: float) -> bool:
        """Wait until the queue is empty or `time.monotonic` reaches the deadline; return whether it is empty."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._queue, max(deadline - time.monotonic(), 0.0))

    def clear(self) -> None:
        """Drop the requests that were not sent."""
        with self._changed:
            self._queue.clear()
            self._changed.notify_all()

    def take_refusal(self) -> Exception | None:
        """Return and forget the last refusal."""
        with self._changed:
            refusal, self._refusal = self._refusal, None
            return refusal

    def _run(self) -> None:
        num_failures = 0
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._queue)
                send = self._queue[0]
            try:
                send()
            except Exception as error:
                if self._is_outage(error):
                    self._report_outage(error)
                    time.sleep(min(FIRST_DELAY_S * 2.0**num_failures, MAX_DELAY_S) * random.uniform(0.5, 1.0))
                    num_failures = min(num_failures + 1, 10)
                else:
                    self._refuse(error)
            else:
                num_failures = 0
                self._report_delivery(send)

    def _report_outage(self, error: Exception) -> None:
        if self.outage is None:
            logger.warning("%s does not answer (%s); records are kept until it does", self._receiver, first_line(error))
        self.outage = error

    def _report_delivery(self, send: Callable[[], object]) -> None:
        if self.outage is not None:
            logger.info("%s is back; delivering %d records", self._receiver, len(self))
        self.outage = None
        with self._changed:
            # Unless it was cleared meanwhile.
            if self._queue and self._queue[0] is send:
                self._queue.popleft()
            self._changed.notify_all()

    def _refuse(self, error: Exception) -> None:
        with self._changed:
            self._refusal = error
            self._queue.clear()
            self._changed.notify_all()


def first_line(error: Exception) -> str:
    """Return the first line of an error; those of databases and HTTP libraries fill pages."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
