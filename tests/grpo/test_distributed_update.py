"""An update by two processes is that of one: the same metrics, gradients and decisions, whoever has which images.

Run as a program it is one of the two processes: `test_distributed_update.py CASE RANK FOLDER`.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor

from sfgrpo.errors import SanityCheckError
from sfgrpo.grpo.distributed import Partition
from sfgrpo.grpo.sanity import require_changed_sampler
from sfgrpo.grpo.update import make_scaler, update_policy
from sfgrpo.types import RolloutBatch
from tests.support.paths import ROOT
from tests.support.tiny import counted_passes, disturb, make_tiny_policy
from tests.support.update import ROLLOUT_BATCH, objective_for, rolled_out, spoil_gradient, weights

NUM_PROCESSES = 2
NUM_STEPS = 2

pytestmark = pytest.mark.slow


def part_of(batch: RolloutBatch, rows: Tensor) -> RolloutBatch:
    trajectory = batch.trajectory
    return RolloutBatch(
        trajectory=dataclasses.replace(
            trajectory,
            latents_NSCHW=trajectory.latents_NSCHW[rows],
            velocities_NKCHW=trajectory.velocities_NKCHW[rows],
            log_probs_NK=trajectory.log_probs_NK[rows],
        ),
        conditioning=batch.conditioning[rows],
        advantages_NK=batch.advantages_NK[rows],
        constant_N=batch.constant_N[rows],
    )


def nothing(policy, batch) -> None:
    pass


def broken_loss(policy, batch) -> None:
    batch.advantages_NK[6, 0] = math.nan


def tampered_log_prob(policy, batch) -> None:
    batch.trajectory.log_probs_NK[2, 1] += 0.01


def tampered_gradient(policy, batch) -> None:
    if os.environ.get("RANK") != "0":
        spoil_gradient(policy, math.nan)


@dataclasses.dataclass(frozen=True)
class Case:
    """What the two processes find; image 2 and 3, 6 and 7 are those of rank 1."""

    constant: tuple[int, ...] = ()
    prepare: Callable[[Any, RolloutBatch], None] = nothing
    changes: dict[str, Any] = dataclasses.field(default_factory=dict)
    learning_rate: float = 1.0


CASES = {
    "plain": Case(),
    "uneven": Case(constant=(2, 3), changes={"micro_batch_size": 1, "kl_coef": 0.05}),
    "idle": Case(constant=(2, 3, 6, 7)),
    "empty_share": Case(constant=(0, 1, 2, 3)),
    "broken_loss": Case(prepare=broken_loss),
    "broken_gradient": Case(prepare=tampered_gradient),
    "tampered": Case(prepare=tampered_log_prob),
    "frozen": Case(learning_rate=0.0),
}


def update(case: Case, accelerator: Accelerator) -> dict[str, Any]:
    """Updates on this process's part of the images."""
    policy = make_tiny_policy()
    disturb(policy)
    whole = rolled_out(policy, constant=case.constant)
    start = weights(policy)
    partition = Partition(num_images=8, num_steps=NUM_STEPS, num_processes=accelerator.num_processes)
    rows = partition.rows(accelerator.process_index)
    case.prepare(policy, whole)
    batch = part_of(whole, rows)
    objective = objective_for(policy, steps_per_update=NUM_STEPS, **case.changes)
    optimizer = torch.optim.SGD(policy.adapter_parameters().values(), lr=case.learning_rate)
    found: dict[str, Any] = {}
    try:
        with counted_passes(policy) as sizes:
            outcome = update_policy(
                policy, optimizer, batch, objective, accelerator, make_scaler("float32", policy.device)
            )
        found = {
            "metrics": outcome.metrics,
            "trained": outcome.trained,
            "broken_loss": rows[outcome.broken_loss_N].tolist(),
            "broken_gradient": rows[outcome.broken_gradient_N].tolist(),
            "passes": len(sizes),
        }
        if outcome.trained:
            require_changed_sampler(policy, batch, min(ROLLOUT_BATCH, len(batch.constant_N)), objective, accelerator)
    except SanityCheckError as error:
        found["error"] = str(error)
    return found | {"moved": (weights(policy) - start).tolist()}


def work(rank: int, folder: Path) -> None:
    """Is one of the processes, and writes what it found of every case."""
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
    os.environ |= {"WORLD_SIZE": str(NUM_PROCESSES), "LOCAL_WORLD_SIZE": str(NUM_PROCESSES)}
    rendezvous = f"file://{folder / 'rendezvous'}"
    torch.distributed.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=NUM_PROCESSES)
    accelerator = Accelerator(cpu=True)
    assert accelerator.num_processes == NUM_PROCESSES
    found = {name: update(case, accelerator) for name, case in CASES.items()}
    (folder / f"{rank}.json").write_text(json.dumps(found))
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def of_two(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of two processes found, by case."""
    folder = tmp_path_factory.mktemp("two")
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    commands = [[sys.executable, __file__, str(rank), str(folder)] for rank in range(NUM_PROCESSES)]
    processes = [
        subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True, cwd=folder)
        for command in commands
    ]
    try:
        errors = [process.communicate(timeout=120)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert not any(process.returncode for process in processes), "\n".join(errors)
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(NUM_PROCESSES)]


def of_one(name: str) -> dict[str, Any]:
    return update(CASES[name], Accelerator())


@pytest.mark.parametrize("name", [name for name in CASES if name not in ("tampered", "frozen")])
def test_two_processes_move_the_adapter_and_measure_as_one_does(of_two, name):
    expected = of_one(name)
    moved = torch.tensor(expected["moved"])
    for found in of_two:
        torch.testing.assert_close(
            torch.tensor(found[name]["moved"]), moved, rtol=1e-3, atol=1e-4 * float(moved.abs().max())
        )
        assert found[name]["metrics"] == pytest.approx(expected["metrics"], rel=1e-3, abs=1e-5)
        assert found[name]["trained"] == expected["trained"]
    assert of_two[0][name]["metrics"] == of_two[1][name]["metrics"]
    assert of_two[0][name]["moved"] == of_two[1][name]["moved"]
    for kind in ("broken_loss", "broken_gradient"):
        assert sorted(of_two[0][name][kind] + of_two[1][name][kind]) == expected[kind]


@pytest.mark.parametrize(("name", "passes"), [("plain", 4), ("uneven", 16), ("idle", 4), ("empty_share", 2)])
def test_processes_do_as_many_passes_as_each_other(of_two, name, passes):
    assert [found[name]["passes"] for found in of_two] == [passes, passes]


def test_number_that_is_not_finite_on_one_process_stops_the_step_of_both(of_two):
    assert [found["broken_loss"]["broken_loss"] for found in of_two] == [[], [6]]
    assert [found["broken_loss"]["metrics"]["guards/skipped_steps"] for found in of_two] == [1, 1]
    assert any(of_two[0]["broken_loss"]["moved"])


def test_gradient_that_is_not_finite_on_one_process_stops_both(of_two):
    assert [found["broken_gradient"]["broken_gradient"] for found in of_two] == [[0, 1, 4, 5], [2, 3, 6, 7]]
    assert not any(of_two[0]["broken_gradient"]["moved"])


def test_ratio_that_is_off_on_one_process_stops_both_and_names_its_rank(of_two):
    for found in of_two:
        assert "the ratio is off 1 by 0.0" in found["tampered"]["error"]
        assert "on rank 1 of 2, more than update.ratio_tolerance" in found["tampered"]["error"]


def test_sampler_that_did_not_change_stops_both(of_two):
    for found in of_two:
        assert "the sampler's output did not change with the first update" in found["frozen"]["error"]


if __name__ == "__main__":
    work(int(sys.argv[1]), Path(sys.argv[2]))
