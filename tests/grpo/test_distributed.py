"""One run on one, two and four processes: the same images and advantages, and the same weights but for rounding."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from accelerate import Accelerator

from sfgrpo.grpo.distributed import (
    Partition,
    even_slices,
    gathered,
    highest,
    shared_files,
    summed,
    total,
    total_gradients,
)
from tests.support.comparing import distance
from tests.support.paths import ROOT
from tests.support.rank_program import CASES

RUNS = ("1-none", "2-none", "4-none", "2-full")
"""Number of processes and sharding."""


@pytest.mark.parametrize("num_processes", [1, 2, 4])
def test_every_image_belongs_to_one_process_and_every_optimiser_step_is_shared_evenly(num_processes):
    partition = Partition(num_images=24, num_steps=2, num_processes=num_processes)
    rows = [partition.rows(process) for process in range(num_processes)]
    assert sorted(torch.cat(rows).tolist()) == list(range(24))
    for own in rows:
        assert own.tolist() == sorted(own.tolist())
        assert (own < 12).sum() == (own >= 12).sum() == 12 // num_processes
    assert partition.in_order(torch.cat(rows)).tolist() == list(range(24))
    squares = torch.stack([torch.cat(rows), torch.cat(rows) ** 2], dim=1)
    assert partition.in_order(squares).tolist() == [[row, row**2] for row in range(24)]


def test_one_process_gathers_and_adds_up_what_it_has():
    accelerator = Accelerator(cpu=True)
    assert gathered(torch.tensor([1.0, 2.0]), accelerator).tolist() == [1.0, 2.0]
    assert summed(torch.tensor([[1, 2]]), accelerator).tolist() == [[1, 2]]
    assert total([1, 0.1], accelerator) == [1.0, 0.1]
    assert highest([2.0, float("nan")], accelerator)[0] == 2.0
    assert highest([float("nan")], accelerator)[0] != highest([float("nan")], accelerator)[0]
    assert even_slices(5, 2, accelerator) == [slice(0, 2), slice(2, 4), slice(4, 5)]
    assert shared_files({"a": b"\x00b", "c": b""}, accelerator) == {"a": b"\x00b", "c": b""}
    assert shared_files(None, accelerator) == {}


def test_parameters_without_a_gradient_count_as_zero():
    first, second = torch.nn.Parameter(torch.ones(2)), torch.nn.Parameter(torch.ones(3))
    first.grad = torch.tensor([1.0, 2.0])
    total_gradients([first, second], Accelerator(cpu=True))
    assert first.grad.tolist() == [1.0, 2.0] and second.grad is not None and not second.grad.any()


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Train all cases on 1, 2 and 4 processes, and on 2 with sharded weights; give the records of each."""
    folder = tmp_path_factory.mktemp("ranks")
    done = subprocess.run(
        [sys.executable, str(ROOT / "tests" / "support" / "rank_program.py"), str(folder), *RUNS],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return {run: {case: torch.load(folder / run / f"{case}.pt", weights_only=True) for case in CASES} for run in RUNS}


def untimed(metrics: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in metrics.items() if not name.startswith(("time/", "memory/"))}


def relative_difference(one: dict[str, Any], many: dict[str, Any]) -> float:
    """How far two trained adapters are apart, as a part of the way that the first has come."""
    return distance(one["adapter"], many["adapter"]) / distance(one["adapter"], one["start"])


@pytest.mark.distributed
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("number", [2, 4])
def test_advantages_of_the_first_update_are_equal_bit_for_bit(records, case, number):
    one, many = records["1-none"][case], records[f"{number}-none"][case]
    assert torch.equal(one["advantages"][0], many["advantages"][0])
    assert torch.equal(one["constant"][0], many["constant"][0])
    assert one["advantages"][0].any()


@pytest.mark.distributed
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("number", [2, 4])
def test_weights_metrics_and_evaluations_are_equal_but_for_rounding(records, case, number):
    one, many = records["1-none"][case], records[f"{number}-none"][case]
    same = [torch.equal(ours, theirs) for ours, theirs in zip(one["advantages"], many["advantages"], strict=True)]
    apart = relative_difference(one, many)
    print(f"| {case} | 1 and {number} | {', '.join(map(str, same))} | {apart:.1e} |")
    assert apart < 1e-3
    for ours, theirs in zip(one["history"], many["history"], strict=True):
        assert untimed(ours) == pytest.approx(untimed(theirs), rel=1e-2, abs=5e-4)
    for ours, theirs in zip(one["evaluations"], many["evaluations"], strict=True):
        assert untimed(ours["metrics"]) == pytest.approx(untimed(theirs["metrics"]), abs=2e-3)


@pytest.mark.distributed
@pytest.mark.parametrize("number", [2, 4])
def test_first_evaluation_and_its_grid_do_not_depend_on_the_number_of_processes(records, number):
    for case in CASES:
        one, many = records["1-none"][case], records[f"{number}-none"][case]
        assert untimed(one["evaluations"][0]["metrics"]) == untimed(many["evaluations"][0]["metrics"])
        for name in ("thumbnails", "scores"):
            assert torch.equal(one[name], many[name])


@pytest.mark.distributed
def test_some_groups_were_constant_so_that_processes_had_different_work(records):
    assert any(0 < float(constant.float().mean()) < 1 for constant in records["1-none"]["stepwise"]["constant"])


@pytest.mark.distributed
def test_sharded_weights_train_the_same_adapter(records):
    whole, sharded = records["2-none"], records["2-full"]
    for case in CASES:
        assert torch.equal(sharded[case]["advantages"][0], whole[case]["advantages"][0])
        assert relative_difference(whole[case], sharded[case]) < 1e-3
