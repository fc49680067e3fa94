"""The queue in the background: in order, again after an outage, no further after a refusal."""

from __future__ import annotations

import logging
import threading
import time
from functools import partial

import pytest

from sfgrpo.tracking import delivery
from sfgrpo.tracking.delivery import DeliveryQueue, first_line


class Receiver:
    """Takes numbers; is away for some tries, and refuses a number for good."""

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


def make_outbox() -> DeliveryQueue:
    return DeliveryQueue("the store", lambda error: isinstance(error, OSError))


def soon() -> float:
    return time.monotonic() + 5


def fill(box: DeliveryQueue, receiver: Receiver, numbers: range) -> None:
    for number in numbers:
        box.put(partial(receiver.take, number))


def test_everything_is_sent_in_order():
    box, receiver = make_outbox(), Receiver()
    fill(box, receiver, range(100))
    assert box.drained(soon())
    assert receiver.taken == list(range(100))


def test_outage_delays_but_neither_loses_nor_reorders():
    box, receiver = make_outbox(), Receiver(tries_away=5)
    fill(box, receiver, range(10))
    assert box.drained(soon())
    assert receiver.taken == list(range(10))
    assert box.outage is None


def test_outage_is_told_once_and_so_is_its_end(caplog):
    caplog.set_level(logging.INFO)
    box = make_outbox()
    for _ in range(2):
        fill(box, Receiver(tries_away=4), range(3))
        assert box.drained(soon())
    told = [record.message for record in caplog.records]
    assert told[0] == "the store takes no records (nobody there); they wait until it does"
    assert [message.split(" (")[0].split(";")[0] for message in told] == [
        "the store takes no records",
        "the store is back",
    ] * 2


def test_putting_does_not_wait_for_the_receiver():
    box, release = make_outbox(), threading.Event()
    box.put(release.wait)
    started = time.monotonic()
    fill(box, Receiver(), range(1000))
    assert time.monotonic() - started < 0.5
    assert not box.drained(time.monotonic() + 0.01)
    release.set()
    assert box.drained(soon())


def test_refusal_stops_the_queue_and_waits_to_be_taken():
    box, receiver, release = make_outbox(), Receiver(refused=3), threading.Event()
    box.put(release.wait)
    fill(box, receiver, range(6))
    release.set()
    assert box.drained(soon())
    assert receiver.taken == [0, 1, 2]
    assert str(box.take_refusal()) == "3 is no number"
    assert box.take_refusal() is None


def test_queue_goes_on_when_its_refusal_was_taken():
    box, receiver = make_outbox(), Receiver(refused=0)
    fill(box, receiver, range(1))
    assert box.drained(soon()) and box.take_refusal()
    fill(box, receiver, range(1, 3))
    assert box.drained(soon())
    assert receiver.taken == [1, 2]


def test_discarded_records_are_not_sent():
    box, receiver, release = make_outbox(), Receiver(), threading.Event()
    box.put(release.wait)
    fill(box, receiver, range(3))
    box.discard()
    fill(box, receiver, range(7, 8))
    release.set()
    assert box.drained(soon())
    assert receiver.taken == [7]


def test_error_without_a_message_is_worded_by_its_kind():
    assert first_line(TimeoutError()) == "TimeoutError"
