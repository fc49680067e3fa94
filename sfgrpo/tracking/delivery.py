"""Delivers records in the background, in order, however often whoever receives them goes away."""

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
    """A queue that one daemon thread sends, first in first out.

    A sending that fails by an outage is repeated until it succeeds, so a sending has to do no harm when done twice. One
    that is refused empties the queue, since what comes later may build on it; the refusal waits to be taken.
    """

    def __init__(self, receiver: str, is_outage: Callable[[Exception], bool]) -> None:
        """Takes the receiver's name for the log, and what tells an outage from a refusal."""
        self.outage: Exception | None = None
        """Why the last try failed; None when it did not."""
        self._receiver = receiver
        self._is_outage = is_outage
        self._queue: deque[Callable[[], object]] = deque()
        self._refusal: Exception | None = None
        self._changed = threading.Condition()
        self._sender = threading.Thread(target=self._send_for_ever, name=f"outbox to {receiver}", daemon=True)

    def __len__(self) -> int:
        return len(self._queue)

    def put(self, send: Callable[[], object]) -> None:
        """Queues a sending and returns at once."""
        with self._changed:
            self._queue.append(send)
            self._changed.notify_all()
            if not self._sender.is_alive():
                self._sender.start()

    def drained(self, deadline: float) -> bool:
        """Waits until all is sent or refused, or until a moment of `time.monotonic`; tells whether it is."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._queue, max(deadline - time.monotonic(), 0.0))

    def discard(self) -> None:
        """Drops what was not sent."""
        with self._changed:
            self._queue.clear()
            self._changed.notify_all()

    def take_refusal(self) -> Exception | None:
        """Returns what was refused since the last call."""
        with self._changed:
            refusal, self._refusal = self._refusal, None
            return refusal

    def _send_for_ever(self) -> None:
        num_failures = 0
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._queue)
                send = self._queue[0]
            try:
                send()
            except Exception as error:
                if self._is_outage(error):
                    self._note_outage(error)
                    time.sleep(min(FIRST_DELAY_S * 2.0**num_failures, MAX_DELAY_S) * random.uniform(0.5, 1.0))
                    num_failures = min(num_failures + 1, 10)
                else:
                    self._refuse(error)
            else:
                num_failures = 0
                self._note_delivery(send)

    def _note_outage(self, error: Exception) -> None:
        if self.outage is None:
            logger.warning("%s takes no records (%s); they wait until it does", self._receiver, first_line(error))
        self.outage = error

    def _note_delivery(self, send: Callable[[], object]) -> None:
        if self.outage is not None:
            logger.info("%s is back; records that waited: %d", self._receiver, len(self))
        self.outage = None
        with self._changed:
            # What was discarded meanwhile is no longer there to be taken off.
            if self._queue and self._queue[0] is send:
                self._queue.popleft()
            self._changed.notify_all()

    def _refuse(self, error: Exception) -> None:
        with self._changed:
            self._refusal = error
            self._queue.clear()
            self._changed.notify_all()


def first_line(error: Exception) -> str:
    """Words an error in one line; those of databases and HTTP libraries go on for pages."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
