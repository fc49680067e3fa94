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


class DeliveryQueue:
    """A first-in, first-out queue of requests that one daemon thread sends.

    A request that fails by an outage is repeated until it succeeds, so it must be idempotent. A refused one clears the
    queue, because later requests may depend on it; the refusal is kept for `take_refusal`.
    """

    def __init__(self, receiver: str, is_outage: Callable[[Exception], bool], max_delay_s: float = 10.0) -> None:
        """Create an empty queue.

        Args:
            receiver: name for the log.
            is_outage: tells an outage from a refusal.
            max_delay_s: the pauses between attempts double up to this many seconds.
        """
        self.outage: Exception | None = None
        """Error of the last attempt; None if it succeeded."""
        self._is_outage = is_outage
        self._max_delay_s = max_delay_s
        self._is_awaited = False
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
        """Wait until the queue is empty or `time.monotonic` reaches the deadline; return whether it is empty.

        A pause after a failure ends at once, because the deadline may come before the next attempt.
        """
        with self._changed:
            self._is_awaited = True
            self._changed.notify_all()
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
        delay_s = FIRST_DELAY_S
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._queue)
                send = self._queue[0]
            try:
                send()
            except Exception as error:
                if self._is_outage(error):
                    self._report_outage(error)
                    cut_short = self._pause(delay_s)
                    delay_s = FIRST_DELAY_S if cut_short else min(2 * delay_s, self._max_delay_s)
                else:
                    self._refuse(error)
            else:
                delay_s = FIRST_DELAY_S
                self._report_delivery(send)

    def _pause(self, delay_s: float) -> bool:
        """Pause after a failure; return whether `wait_until_empty` cut the pause short."""
        with self._changed:
            # Jitter, so that many runs do not retry in step.
            cut_short = self._changed.wait_for(lambda: self._is_awaited, delay_s * random.uniform(0.5, 1.0))
            self._is_awaited = False
            return cut_short

    def _report_outage(self, error: Exception) -> None:
        # A request that was cleared meanwhile is not retried.
        if self.outage is None and self._queue:
            logger.warning("%s fails and is retried until it succeeds: %s", self._thread.name, first_line(error))
        self.outage = error

    def _report_delivery(self, send: Callable[[], object]) -> None:
        if self.outage is not None:
            logger.warning("%s works again", self._thread.name)
        self.outage = None
        with self._changed:
            self._is_awaited = False
            # Unless it was cleared meanwhile.
            if self._queue and self._queue[0] is send:
                self._queue.popleft()
            self._changed.notify_all()

    def _refuse(self, error: Exception) -> None:
        with self._changed:
            self._refusal = error
            self.clear()


def first_line(error: Exception) -> str:
    """Return the first line of an error; those of databases and HTTP libraries fill pages."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
