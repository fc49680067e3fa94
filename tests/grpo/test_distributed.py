"""One run on one, two and four processes: the same images and advantages, and the same weights but for rounding."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
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


def trained(folder: Path, num_processes: int, sharding: str = "none", cases: tuple[str, ...] = tuple(CASES)) -> Any:
    """Runs all cases on so many processes; gives the record of each."""
    folder.mkdir()
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={num_processes}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [*command, str(ROOT / "tests" / "support" / "rank_program.py"), str(folder), sharding, *cases],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return {case: torch.load(folder / f"{case}.pt", weights_only=True) for case in cases}


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Any]:
    folder = tmp_path_factory.mktemp("ranks")
    return {number: trained(folder / str(number), number) for number in (1, 2, 4)}


def untimed(metrics: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in metrics.items() if not name.startswith(("time/", "memory/"))}


def relative_difference(one: dict[str, Any], many: dict[str, Any]) -> float:
    """How far two trained adapters are apart, as a part of the way that the first has come."""
    return distance(one["adapter"], many["adapter"]) / distance(one["adapter"], one["start"])


@pytest.mark.distributed
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("number", [2, 4])
def test_advantages_of_the_first_update_are_equal_bit_for_bit(records, case, number):
    one, many = records[1][case], records[number][case]
    assert torch.equal(one["advantages"][0], many["advantages"][0])
    assert torch.equal(one["constant"][0], many["constant"][0])
    assert one["advantages"][0].any()


@pytest.mark.distributed
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("number", [2, 4])
def test_weights_metrics_and_evaluations_are_equal_but_for_rounding(records, case, number):
    one, many = records[1][case], records[number][case]
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
        one, many = records[1][case]["evaluations"][0], records[number][case]["evaluations"][0]
        assert untimed(one["metrics"]) == untimed(many["metrics"])
        for name in ("thumbnails", "scores"):
            assert torch.equal(records[1][case][name], records[number][case][name])


@pytest.mark.distributed
def test_some_groups_were_constant_so_that_processes_had_different_work(records):
    assert any(0 < float(constant.float().mean()) < 1 for constant in records[1]["stepwise"]["constant"])


@pytest.mark.distributed
def test_sharded_weights_train_the_same_adapter(records, tmp_path):
    sharded = trained(tmp_path / "sharded", 2, sharding="full")
    for case in CASES:
        assert torch.equal(sharded[case]["advantages"][0], records[2][case]["advantages"][0])
        assert relative_difference(records[2][case], sharded[case]) < 1e-3
