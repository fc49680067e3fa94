"""A training on two hosts without a shared disk, whose network fails and which lose their power: the same adapter."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import sqlite3
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hosts import HostsUnavailableError, Network, Node, outputs, wait_for, wait_until
from s3 import BUCKET, S3Server
from test_trainer import ROOT, lay_out, timeless

from sfgrpo.files import MANIFEST

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

NUM_UPDATES, EVERY = 24, 2
TIMEOUT_S, CUT_S = 10, 12
START_S, FINISH_S = 90, 150
PORT = 29400


def lay_out_node(folder: Path) -> Path:
    """Makes the working directory of a node, with all that a training of two nodes reads."""
    lay_out(folder)
    params = json.loads((folder / "params.yaml").read_text())
    params["launch"] |= {"num_processes": 1, "num_nodes": 2, "max_restarts": 3}
    params["rollout"] |= {"micro_batch_size": 12}
    params["update"] |= {"num_updates": NUM_UPDATES, "micro_batch_size": 6}
    params["checkpoint"] |= {"every_num_updates": EVERY, "keep": 2}
    params["evaluation"] |= {"every_num_updates": NUM_UPDATES // 2, "images_per_prompt": 4, "micro_batch_size": 8}
    (folder / "params.yaml").write_text(json.dumps(params))
    return folder


@dataclasses.dataclass(frozen=True, slots=True)
class Result:
    """What a training has left on the first host."""

    last: bytes
    published: dict[str, bytes]
    history: list[dict[str, Any]]
    evaluations: list[dict[str, Any]]


class Training:
    """A training of two nodes: `first` is where they meet, and has the checkpoints."""

    def __init__(self, network: Network, folder: Path, environment: dict[str, str]) -> None:
        self.network = network
        self.first, self.second = self.nodes = tuple(
            Node(
                host,
                [sys.executable, "-m", "sfgrpo", "train"],
                lay_out_node(folder / host.name),
                _environment() | environment,
                pause_s=3,
            )
            for host in network.hosts.values()
        )

    def saved(self) -> list[int]:
        """Lists the updates of which the first host has a checkpoint."""
        paths = self.first.folder.glob(".scratch/train-*/checkpoints/update-??????")
        return [int(path.name.removeprefix("update-")) for path in paths]

    def wait_for_update(self, update: int, saved: Callable[[], list[int]] | None = None) -> None:
        """Waits until a checkpoint after this update, or a later one, is there, or wherever `saved` looks."""
        look = saved or self.saved
        wait_until(lambda: max(look(), default=0) >= update, self.nodes, f"checkpoint after update {update}", START_S)
        assert not any(node.is_done for node in self.nodes), outputs(self.nodes)

    def finish(self) -> Result:
        """Waits for the end, and looks at what is left."""
        wait_until(lambda: all(node.is_done for node in self.nodes), self.nodes, "end of the training", FINISH_S)
        told = outputs(self.nodes)
        assert [node.statuses[-1] for node in self.nodes] == [0, 0], told
        assert [node.host.processes() for node in self.nodes] == [[], []], told
        folder = self.first.folder
        assert not (self.second.folder / "models").exists() and not (self.second.folder / "mlflow.db").exists(), told
        (last,) = folder.glob(f".scratch/train-*/checkpoints/update-{NUM_UPDATES:06d}/adapter.safetensors")
        history, evaluations = (
            timeless(json.loads((folder / f"reports/train/{name}.json").read_text()))
            for name in ("history", "evaluations")
        )
        assert [entry["update"] for entry in history] == list(range(1, NUM_UPDATES + 1)), told
        assert recorded_steps(folder / "mlflow.db") == list(range(1, NUM_UPDATES + 1)), told
        return Result(
            last=last.read_bytes(),
            published={path.name: path.read_bytes() for path in (folder / "models/policy/adapter").iterdir()},
            history=history,
            evaluations=evaluations,
        )


def recorded_steps(database: Path) -> list[int]:
    """Reads the steps at which the runs of a database have an update's reward, a step as often as it is there."""
    with contextlib.closing(sqlite3.connect(database)) as opened:
        return [step for (step,) in opened.execute("SELECT step FROM metrics WHERE key = 'reward/mean' ORDER BY step")]


def _environment() -> dict[str, str]:
    foreign = ("SFGRPO_", "PET_", "MLFLOW_", "AWS_", "TORCHELASTIC_", "MASTER_", "GLOO_")
    return {name: value for name, value in os.environ.items() if not name.startswith(foreign)} | {
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "SFGRPO_NUM_THREADS": "1",
        "SFGRPO_DEVICE": "cpu",
        "SFGRPO_TIMEOUT_S": str(TIMEOUT_S),
        "PET_RDZV_ENDPOINT": f"first:{PORT}",
        "PET_RDZV_ID": "two-hosts",
        "PET_RDZV_BACKEND": "c10d",
        **({"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"} if os.environ.get("EXPERIMENT") else {}),
    }


@contextlib.contextmanager
def training_in(folder: Path, server: S3Server | None = None) -> Iterator[Training]:
    try:
        with Network(folder, ["first", "second"]) as network, contextlib.ExitStack() as stack:
            environment = {}
            if server is not None:
                url = f"http://{stack.enter_context(network.exposed(server.port))}"
                environment = {**server.environment, "AWS_ENDPOINT_URL": url, "SFGRPO_MIRROR": f"s3://{BUCKET}/kept"}
            yield Training(network, folder, environment)
    except HostsUnavailableError as error:
        pytest.fail(str(error))


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Result:
    with training_in(tmp_path_factory.mktemp("undisturbed")) as training:
        begin = time.monotonic()
        result = training.finish()
        print(outputs(training.nodes), time.monotonic() - begin)
        assert [node.statuses for node in training.nodes] == [[0], [0]], outputs(training.nodes)
        return result


def test_undisturbed_training_ends_on_both_hosts(undisturbed):
    assert undisturbed.published


def test_link_that_fails_for_a_while_changes_nothing(undisturbed, tmp_path):
    with training_in(tmp_path) as training:
        training.wait_for_update(8)
        with training.second.host.cut_off():
            wait_for(CUT_S, training.nodes)
        try:
            assert training.finish() == undisturbed
        finally:
            print(outputs(training.nodes))


def test_second_host_that_loses_power_changes_nothing(undisturbed, tmp_path):
    with training_in(tmp_path) as training:
        training.wait_for_update(8)
        training.second.lose_power()
        try:
            assert training.finish() == undisturbed
        finally:
            print(outputs(training.nodes))


def test_first_host_that_loses_power_and_disk_changes_nothing(undisturbed, tmp_path):
    with S3Server(tmp_path / "s3") as server:
        client = server.client()
        client.create_bucket(Bucket=BUCKET)

        def mirrored() -> list[int]:
            names = [Path(entry["Key"]) for entry in client.list_objects_v2(Bucket=BUCKET).get("Contents", ())]
            return [int(name.parent.name.removeprefix("update-")) for name in names if name.name == MANIFEST and "checkpoints" in name.parts]

        with training_in(tmp_path, server) as training:
            training.wait_for_update(4, mirrored)
            training.first.lose_power()
            training.first.lose_disk(lay_out_node)
            try:
                assert training.finish() == undisturbed
                assert "came from s3" in training.first.output()
            finally:
                print(outputs(training.nodes))
