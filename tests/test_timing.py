"""The clock adds up what the phases take, and waits for the device at both ends."""

from __future__ import annotations

import time

import pytest

from sfgrpo.timing import PhaseClock


def test_blocks_of_one_phase_add_up() -> None:
    clock = PhaseClock()
    for _ in range(2):
        with clock("decode"):
            time.sleep(0.02)
    with clock("reward"):
        pass
    assert clock.seconds["decode"] >= 0.04 > clock.seconds["reward"]
    assert clock.metrics().keys() == {"time/decode_s", "time/reward_s"}


def test_device_is_waited_for_before_and_after_a_phase() -> None:
    order: list[str] = []
    clock = PhaseClock(lambda: order.append("wait"))
    with clock("update"):
        order.append("work")
    assert order == ["wait", "work", "wait"]


def test_phase_that_fails_is_counted() -> None:
    clock = PhaseClock()
    with pytest.raises(RuntimeError, match="broken"), clock("update"):
        raise RuntimeError("broken")
    assert clock.seconds["update"] >= 0
