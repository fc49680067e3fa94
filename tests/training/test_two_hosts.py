"""A training on two hosts without a shared disk: whatever fails on the way, it ends with the same adapter.

Needs root on Linux, for network namespaces. TWO_HOSTS=skip leaves these tests out where that is not to be had.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import re
import sqlite3
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from sfgrpo.checkpoint.state import CHECKPOINTS, update_of
from sfgrpo.runtime.manifest import MANIFEST
from tests.support.hosts import HostsUnavailableError, Network, Node, outputs, wait_for, wait_until
from tests.support.paths import ROOT
from tests.support.s3 import BUCKET, S3Server
from tests.support.trainings import lay_out, timeless

pytestmark = [
    pytest.mark.distributed,
    pytest.mark.slow,
    pytest.mark.skipif(os.environ.get("TWO_HOSTS") == "skip", reason="TWO_HOSTS=skip"),
]

NUM_UPDATES, DISTURBED_AFTER = 20, 6
TIMEOUT_S, CUT_S = 20, 22
"""How long a rank waits for the other, and for how long it does so in vain."""
RESTART_PAUSE_S = 3
MIDDLE_S, END_S = 120, 180
"""By when a training must be in its middle, and then at its end: on two idle cores it takes a quarter of that."""
HOSTS = ("first", "second")
KEPT = f"s3://{BUCKET}/kept"
REPORTS = ("history", "evaluations")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """What a training has left behind, which does not depend on what happened to it."""

    last: str
    """SHA-256 of the adapter of the last checkpoint."""
    published: dict[str, str]
    """SHA-256 of each file of the published adapter."""
    history: list[dict[str, Any]]
    evaluations: list[dict[str, Any]]


class Training:
    """A training of two nodes, each in a folder of its own; they meet on the first, which has the checkpoints."""

    def __init__(self, network: Network, folder: Path, environment: dict[str, str]) -> None:
        command = [sys.executable, "-m", "sfgrpo", "train"]
        self.first, self.second = self.nodes = [
            Node(host, command, lay_out_node(folder / host.name), node_environment() | environment, RESTART_PAUSE_S)
            for host in network.hosts.values()
        ]

    def reach_middle(self, saved: Callable[[], list[int]] | None = None) -> None:
        """Waits for a checkpoint on the first host, or for the list of updates that have one to show it."""

        def is_there() -> bool:
            return max((saved or self._saved)(), default=0) >= DISTURBED_AFTER

        wait_until(is_there, self.nodes, f"a checkpoint after update {DISTURBED_AFTER} or later", MIDDLE_S)
        assert not any(node.is_done for node in self.nodes), f"too late to be disturbed\n{outputs(self.nodes)}"

    def finish(self) -> Result:
        """Waits for the end, and looks at what is left; only the first node may have recorded and published."""
        wait_until(lambda: all(node.is_done for node in self.nodes), self.nodes, "the end of the training", END_S)
        told = outputs(self.nodes)
        assert [node.statuses[-1] for node in self.nodes] == [0, 0], told
        idle = "the end of all that the nodes have started"
        wait_until(lambda: not any(node.host.processes() for node in self.nodes), self.nodes, idle, 5)
        first, second = (node.folder for node in self.nodes)
        assert not any((second / name).exists() for name in ("models", "reports", "mlflow.db")), told
        history, evaluations = (json.loads((first / f"reports/train/{name}.json").read_text()) for name in REPORTS)
        assert [entry["update"] for entry in history] == list(range(1, NUM_UPDATES + 1)), told
        assert recorded_steps(first / "mlflow.db") == list(range(1, NUM_UPDATES + 1)), told
        (last,) = first.glob(f".scratch/train-*/{CHECKPOINTS}/update-{NUM_UPDATES:06d}/adapter.safetensors")
        return Result(
            last=digest_of(last),
            published={path.name: digest_of(path) for path in sorted((first / "models/policy/adapter").iterdir())},
            history=timeless(history),
            evaluations=timeless(evaluations),
        )

    def require_same_end(self, undisturbed: Result) -> None:
        """Requires that the training goes on from a checkpoint, and ends as if nothing had happened to it."""
        result, told = self.finish(), outputs(self.nodes)
        resumed = re.findall(r"resuming after update (\d+)", self.first.output())
        assert resumed and int(resumed[0]) >= DISTURBED_AFTER, told
        for field in dataclasses.fields(Result):
            assert getattr(result, field.name) == getattr(undisturbed, field.name), f"{field.name} differs\n{told}"

    def _saved(self) -> list[int]:
        return [update_of(path) for path in self.first.folder.glob(f".scratch/train-*/{CHECKPOINTS}/update-??????")]


def lay_out_node(folder: Path) -> Path:
    """Makes the working directory of a node, with all that a training of two nodes reads."""
    lay_out(folder)
    params = json.loads((folder / "params.yaml").read_text())
    params["launch"] |= {"num_processes": 1, "num_nodes": 2, "max_restarts": 3}
    params["rollout"] |= {"micro_batch_size": 12}
    params["update"] |= {"num_updates": NUM_UPDATES, "micro_batch_size": 6}
    params["checkpoint"] |= {"every_num_updates": 2, "keep": 2}
    params["evaluation"] |= {"every_num_updates": NUM_UPDATES // 2, "images_per_prompt": 4, "micro_batch_size": 8}
    (folder / "params.yaml").write_text(json.dumps(params))
    return folder


def node_environment() -> dict[str, str]:
    """Gives the variables of both nodes."""
    foreign = ("SFGRPO_", "PET_", "MLFLOW_", "AWS_", "TORCH", "MASTER_", "GLOO_")
    return {name: value for name, value in os.environ.items() if not name.startswith(foreign)} | {
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "SFGRPO_NUM_THREADS": "1",
        "SFGRPO_DEVICE": "cpu",
        "SFGRPO_TIMEOUT_S": str(TIMEOUT_S),
        "PET_RDZV_ENDPOINT": f"{HOSTS[0]}:29400",
        "PET_RDZV_ID": "two-hosts",
        "PET_RDZV_BACKEND": "c10d",
    }


def digest_of(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def recorded_steps(database: Path) -> list[int]:
    """Reads the steps of a metric of every update; requires one run, and no metric twice at a step."""
    with contextlib.closing(sqlite3.connect(database)) as opened:
        assert opened.execute("SELECT COUNT(*) FROM runs").fetchone() == (1,)
        twice = opened.execute("SELECT key, step, COUNT(*) FROM metrics GROUP BY key, step HAVING COUNT(*) > 1")
        assert twice.fetchall() == []
        return [step for (step,) in opened.execute("SELECT step FROM metrics WHERE key = 'reward/mean' ORDER BY step")]


@contextlib.contextmanager
def training_in(folder: Path, server: S3Server | None = None) -> Iterator[Training]:
    """Makes a network and two nodes that train on it, with a mirror if there is a server; ends all of it."""
    try:
        with contextlib.ExitStack() as stack:
            network = stack.enter_context(Network(folder, HOSTS))
            environment: dict[str, str] = {}
            if server is not None:
                address = stack.enter_context(network.exposed(server.port))
                environment = {**server.environment, "AWS_ENDPOINT_URL": f"http://{address}", "SFGRPO_MIRROR": KEPT}
            training = Training(network, folder, environment)
            for node in training.nodes:
                stack.callback(node.stop)
            yield training
    except HostsUnavailableError as error:
        pytest.fail(f"{error}; TWO_HOSTS=skip leaves these tests out")


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Result:
    with training_in(tmp_path_factory.mktemp("undisturbed")) as training:
        result = training.finish()
        assert [node.statuses for node in training.nodes] == [[0], [0]], outputs(training.nodes)
        assert "resuming" not in training.first.output(), outputs(training.nodes)
        return result


def test_two_hosts_train_and_the_first_publishes(undisturbed):
    assert undisturbed.published and undisturbed.history


def test_link_that_is_cut_for_a_while_changes_nothing(undisturbed, tmp_path):
    with training_in(tmp_path) as training:
        training.reach_middle()
        with training.second.host.cut_off():
            wait_for(CUT_S, training.nodes)
        training.require_same_end(undisturbed)


def test_second_node_that_is_killed_and_comes_back_changes_nothing(undisturbed, tmp_path):
    with training_in(tmp_path) as training:
        training.reach_middle()
        training.second.kill()
        training.require_same_end(undisturbed)
        # The first node waits for the other one, and starts its own ranks again; it does not end.
        assert [node.statuses for node in training.nodes] == [[0], [-9, 0]], outputs(training.nodes)


def test_first_node_that_is_killed_and_loses_its_disk_goes_on_from_the_mirror(undisturbed, tmp_path):
    with S3Server(tmp_path / "s3") as server:
        client = server.client()
        client.create_bucket(Bucket=BUCKET)

        def mirrored() -> list[int]:
            paths = (Path(entry["Key"]) for entry in client.list_objects_v2(Bucket=BUCKET).get("Contents", ()))
            return [update_of(path.parent) for path in paths if path.match(f"{CHECKPOINTS}/*/{MANIFEST}")]

        with training_in(tmp_path, server) as training:
            training.reach_middle(mirrored)
            training.first.kill()
            training.first.lose_disk(lay_out_node)
            training.require_same_end(undisturbed)
            assert f"from {KEPT}/train-" in training.first.output(), outputs(training.nodes)
            # Where the nodes meet is gone with the first one, so the second one ends, to be started again.
            assert [node.statuses for node in training.nodes] == [[-9, 0], [75, 0]], outputs(training.nodes)
