"""The clock sums seconds of phases, keeps their peak memory, waits for the device and reports failed allocations."""

from __future__ import annotations

import subprocess
import sys
import time

import pytest
import torch

from sfgrpo.errors import MemoryExhaustedError
from sfgrpo.runtime.timing import PhaseClock

CUDA = torch.device("cuda")


def test_blocks_of_one_phase_add_up() -> None:
    clock = PhaseClock()
    for _ in range(2):
        with clock("decode"):
            time.sleep(0.02)
    with clock("reward"):
        pass
    assert clock.seconds["decode"] >= 0.04 > clock.seconds["reward"]
    assert clock.metrics().keys() == {"time/decode_s", "time/reward_s", "memory/decode_mb", "memory/reward_mb"}


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux forgets a peak")
def test_phase_keeps_the_highest_peak_of_its_blocks_and_not_that_of_others() -> None:
    clock = PhaseClock()
    for phase, megabytes in (("decode", 1), ("decode", 128), ("reward", 1), ("decode", 1)):
        with clock(phase):
            torch.ones(megabytes * 2**20, dtype=torch.uint8)
    assert clock.megabytes["decode"] - clock.megabytes["reward"] == pytest.approx(127, abs=16)


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Record the calls to a GPU that is not there."""
    order: list[str] = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: order.append("wait"))
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: order.append("forget"))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: order.append("peak") or 5 * 2**20)
    return order


def test_device_is_waited_for_before_and_after_a_phase(cuda: list[str]) -> None:
    clock = PhaseClock(CUDA)
    with clock("update"):
        cuda.append("work")
    assert cuda == ["wait", "forget", "work", "wait", "peak"]
    assert clock.metrics()["memory/update_mb"] == 5


def test_phase_that_fails_is_counted() -> None:
    clock = PhaseClock()
    with pytest.raises(RuntimeError, match="broken"), clock("update"):
        raise RuntimeError("broken")
    assert clock.seconds["update"] >= 0 < clock.megabytes["update"]


def test_lack_of_gpu_memory_names_phase_use_and_parameter(cuda: list[str]) -> None:
    clock = PhaseClock(CUDA, {"update": ("update.micro_batch_size", 96)})
    message = r"^the phase update ran out of memory on cuda with 5 MB used; lower update.micro_batch_size, which is 96$"
    with pytest.raises(MemoryExhaustedError, match=message) as caught, clock("update"):
        raise torch.OutOfMemoryError("CUDA out of memory")
    assert isinstance(caught.value.__cause__, torch.OutOfMemoryError)


def test_lack_of_memory_in_a_phase_without_a_parameter_is_still_reported() -> None:
    with pytest.raises(MemoryExhaustedError, match="use a larger device or smaller batches"), PhaseClock()("update"):
        raise MemoryError


LIMITED = """
import resource, torch
from sfgrpo.errors import MemoryExhaustedError
from sfgrpo.runtime.timing import PhaseClock

layer = torch.nn.Linear(1024, 1024)
clock = PhaseClock(settings={"rollout": ("rollout.micro_batch_size", 300000)})
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 2**28, used + 2**28))
try:
    with clock("rollout"):
        layer(torch.ones(1, 1024).expand(300000, 1024))
except MemoryExhaustedError as error:
    print(error)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc and a limit that is kept")
def test_real_lack_of_memory_on_a_cpu_is_reported() -> None:
    answer = subprocess.run([sys.executable, "-c", LIMITED], capture_output=True, text=True, check=True, timeout=60)
    assert answer.stdout.startswith("the phase rollout ran out of memory on cpu with "), answer.stderr
    assert answer.stdout.rstrip().endswith("lower rollout.micro_batch_size, which is 300000")
