"""The delivery queue keeps the order, retries after an outage and stops at a refusal."""

from __future__ import annotations

import logging
import threading
import time
from functools import partial

import pytest

from sfgrpo.tracking import delivery
from sfgrpo.tracking.delivery import DeliveryQueue, first_line


class Receiver:
    """Accepts numbers; fails for some attempts, and refuses one number for good."""

    def __init__(self, tries_away: int = 0, refused: int | None = None) -> None:
        self.taken: list[int] = []
        self.tries_away = tries_away
        self.refused = refused

    def take(self, number: int) -> None:
        if number == self.refused:
            raise ValueError(f"{number} is no number")
        if self.tries_away:
            self.tries_away -= 1
            raise ConnectionError("nobody there\nand more")
        self.taken.append(number)


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(delivery, "FIRST_DELAY_S", 0.001)


def make_queue() -> DeliveryQueue:
    return DeliveryQueue("the store", lambda error: isinstance(error, OSError))


def soon() -> float:
    return time.monotonic() + 5


def fill(queue: DeliveryQueue, receiver: Receiver, numbers: range) -> None:
    for number in numbers:
        queue.put(partial(receiver.take, number))


def test_everything_is_sent_in_order():
    queue, receiver = make_queue(), Receiver()
    fill(queue, receiver, range(100))
    assert queue.wait_until_empty(soon())
    assert receiver.taken == list(range(100))


def test_outage_delays_but_neither_loses_nor_reorders():
    queue, receiver = make_queue(), Receiver(tries_away=5)
    fill(queue, receiver, range(10))
    assert queue.wait_until_empty(soon())
    assert receiver.taken == list(range(10))
    assert queue.outage is None


def test_outage_and_its_end_are_logged_once_each(caplog):
    caplog.set_level(logging.INFO)
    queue = make_queue()
    for _ in range(2):
        fill(queue, Receiver(tries_away=4), range(3))
        assert queue.wait_until_empty(soon())
    logged = [record.message for record in caplog.records]
    assert logged[0] == "delivery to the store fails and is retried until it succeeds: nobody there"
    assert logged[1] == "delivery to the store works again"
    assert logged[2:] == logged[:2]


def test_who_waits_cuts_the_pause_after_a_failure_short(monkeypatch):
    monkeypatch.setattr(delivery, "FIRST_DELAY_S", 60.0)
    queue, receiver = make_queue(), Receiver(tries_away=1)
    fill(queue, receiver, range(1))
    while queue.outage is None:
        time.sleep(0.001)
    assert queue.wait_until_empty(soon())
    assert receiver.taken == [0]


def test_putting_does_not_wait_for_the_receiver():
    queue, release = make_queue(), threading.Event()
    queue.put(release.wait)
    started = time.monotonic()
    fill(queue, Receiver(), range(1000))
    assert time.monotonic() - started < 0.5
    assert not queue.wait_until_empty(time.monotonic() + 0.01)
    release.set()
    assert queue.wait_until_empty(soon())


def test_refusal_stops_the_queue_and_waits_to_be_taken():
    queue, receiver, release = make_queue(), Receiver(refused=3), threading.Event()
    queue.put(release.wait)
    fill(queue, receiver, range(6))
    release.set()
    assert queue.wait_until_empty(soon())
    assert receiver.taken == [0, 1, 2]
    assert str(queue.take_refusal()) == "3 is no number"
    assert queue.take_refusal() is None


def test_queue_continues_when_its_refusal_was_taken():
    queue, receiver = make_queue(), Receiver(refused=0)
    fill(queue, receiver, range(1))
    assert queue.wait_until_empty(soon()) and queue.take_refusal()
    fill(queue, receiver, range(1, 3))
    assert queue.wait_until_empty(soon())
    assert receiver.taken == [1, 2]


def test_cleared_requests_are_not_sent():
    queue, receiver, release = make_queue(), Receiver(), threading.Event()
    queue.put(release.wait)
    fill(queue, receiver, range(3))
    queue.clear()
    fill(queue, receiver, range(7, 8))
    release.set()
    assert queue.wait_until_empty(soon())
    assert receiver.taken == [7]


def test_error_without_a_message_is_described_by_its_type():
    assert first_line(TimeoutError()) == "TimeoutError"
