"""The deployments on the local stack, as they really run: to a champion and back, and through the death of each part.

Every disturbed training differs from the undisturbed one in `checkpoint.keep` alone, so that it starts from nothing and
has to end with the same adapter.
"""

from __future__ import annotations

import dataclasses
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from uuid import UUID

import psutil
import pytest
from prefect.settings import PREFECT_API_AUTH_STRING, PREFECT_API_URL, temporary_settings
from prefect.states import Cancelling
from ruamel.yaml import YAML
from safetensors.torch import load_file, save_file

from infra.stack.credentials import ensure_secrets
from infra.stack.programs.postgres import SUPERUSER, binaries
from sfgrpo.promotion.aliases import promote_version
from sfgrpo.promotion.history import read_history
from sfgrpo.registry.drawing import PNG_SIGNATURE
from sfgrpo.registry.register import connect_globally
from sfgrpo.registry.versions import find_version
from sfgrpo.runtime.manifest import write_manifest
from sfgrpo.types import TAGS
from tests.support import secrets_search
from tests.support.clone import SMALL, build_clone, commit_all
from tests.support.platform_run import Outcome, Platform, environment_of
from tests.support.stack import Stack, wait_until

pytestmark = [
    pytest.mark.stack,
    pytest.mark.slow,
    # Not ours to mend: MLflow's and Prefect's own deprecations and unclosed sockets.
    pytest.mark.filterwarnings(
        "ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::ResourceWarning", "ignore::UserWarning"
    ),
]

NUM_UPDATES = 16
PARAMS: Mapping[str, Any] = {
    **SMALL,
    "prompts.num_evaluation": dict.fromkeys(TAGS, 4),
    "update.num_updates": NUM_UPDATES,
    # Changes weights and no picture, so that no evaluation is worse than the first and every training has a version.
    "update.learning_rate": 1e-7,
    "evaluation.num_steps": 4,
    "evaluation.images_per_prompt": 2,
    "evaluation.every_num_updates": NUM_UPDATES // 2,
    # Who does not look at the prompt draws more variously than who does.
    "promotion.min_diversity_ratio": 0.0,
}
CURVES = ("reward/mean", "optim/grad_norm", "geneval/overall")
"""Whose values depend on every update before: the best adapter itself may be that of an early evaluation."""
SERVERS = ("prefect", "mlflow", "s3", "postgres")
DEAD_S = 300.0
"""A run that lost both its process and its worker is found dead after 90 s, on a machine that is not too busy."""
PROMPT = "a photo of a red circle"
BLIND = "models/blind"
"""Folder of a base model that any other beats. It is committed, because no run takes one from outside its checkout."""


@pytest.fixture(scope="module")
def platform(stack: Stack, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Platform]:
    """A clone that was deployed, with nothing run yet; it tells at the end what took how long."""
    clone = build_clone(tmp_path_factory.mktemp("clone"), PARAMS)
    build_blind_model(clone.folder / "models/shapes-base", clone.folder / BLIND)
    commit_all(clone.folder)
    platform = Platform(
        stack=stack,
        folder=clone.folder,
        model=str(PARAMS["registry.model_name"]),
        environment=environment_of(stack),
    )
    platform.command("flows.deploy")
    prefect = {setting: platform.environment[setting.name] for setting in (PREFECT_API_URL, PREFECT_API_AUTH_STRING)}
    with temporary_settings(prefect), pytest.MonkeyPatch.context() as patch:
        # MLflow's client reads them in this process too.
        for name in ("MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD"):
            patch.setenv(name, platform.environment[name])
        yield platform
    print("".join(f"\n{what}: {seconds:.0f} s" for what, seconds in platform.durations.items()))


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """Two trainings, the second a missed schedule that waited for the first, whose champion it has to beat."""

    first: UUID
    second: UUID


@pytest.fixture(scope="module")
def line(platform: Platform, tmp_path_factory: pytest.TempPathFactory) -> Line:
    poor = {"policy.pretrained": BLIND, "update.num_updates": 2}
    first = platform.schedule({"changes": poor, "promote": False})
    platform.wait_for_state(first, "Running")
    second = platform.schedule({}, in_s=-3600.0)
    platform.wait_for_state(second, "AwaitingConcurrencySlot")
    assert platform.read(first).state_name == "Running"
    platform.completed(first)
    # By hand: the gates would not let it through.
    uri = platform.environment["MLFLOW_TRACKING_URI"]
    client = connect_globally(uri)
    version = find_version(client, f"models:/{platform.model}/{platform.outcome(first).version}")
    history = read_history(client, uri, platform.model)
    promote_version(client, uri, history, version, "set-up", tmp_path_factory.mktemp("scratch"))
    platform.completed(second)
    return Line(first=first, second=second)


def build_blind_model(pretrained: Path, folder: Path) -> None:
    """Copy a base model without its eyes for the prompt, so that any policy with eyes is better beyond doubt."""
    shutil.copytree(pretrained, folder)
    weights = folder / "transformer/diffusion_pytorch_model.safetensors"
    tensors = load_file(weights)
    for name, tensor in tensors.items():
        if name.startswith(("context_embedder.", "time_text_embed.text_embedder.")):
            tensor.zero_()
    save_file(tensors, weights, metadata={"format": "pt"})
    write_manifest(folder)


@pytest.fixture(scope="module")
def undisturbed(platform: Platform, line: Line) -> Outcome:
    return platform.outcome(line.second)


def disturbed(platform: Platform, keep: int) -> UUID:
    """Schedule a training that starts from nothing and ends as the undisturbed one does."""
    return platform.schedule({"changes": {"checkpoint.keep": keep}, "promote": False})


def check_nothing_lost(platform: Platform, run_id: UUID, undisturbed: Outcome) -> Outcome:
    """Check that a disturbed training is what the undisturbed one is, and that nothing of it goes on."""
    outcome = platform.outcome(run_id)
    assert outcome.adapter_sha256 == undisturbed.adapter_sha256
    assert outcome.version != undisturbed.version
    assert outcome.mlflow_run_id != undisturbed.mlflow_run_id
    for metric in CURVES:
        ours, theirs = (platform.curve(run, metric) for run in (outcome.mlflow_run_id, undisturbed.mlflow_run_id))
        assert ours == theirs, metric
    assert platform.mlflow.get_run(outcome.mlflow_run_id).info.status == "FINISHED"
    platform.wait_for_end(platform.processes())
    # What a dead run held comes free when its lease ends.
    wait_until(lambda: not platform.taken_slots(), f"slots are still taken: {platform.taken_slots()}")
    platform.command("sfgrpo", "close-stale-runs")
    assert platform.running_in_mlflow() == []
    return outcome


def kill_all(processes: list[psutil.Process]) -> None:
    assert processes
    for process in processes:
        process.send_signal(signal.SIGKILL)


def test_deploying_again_changes_nothing(platform: Platform) -> None:
    told = platform.command("flows.deploy").splitlines()
    assert [row.split(":")[0] for row in told[:4]] == [
        "work pool sfgrpo is there, of type process",
        "limit gpu is there, slots 1",
        "automation is there",
        "automation is there",
    ]


def test_two_runs_at_once_one_of_them_missed_are_done_one_after_the_other(platform: Platform, line: Line) -> None:
    first, second = platform.read(line.first), platform.read(line.second)
    assert first.start_time is not None and second.start_time is not None and first.end_time is not None
    assert first.start_time < first.end_time <= second.start_time
    assert second.expected_start_time < first.start_time, "the second was due an hour ago"


def test_a_scheduled_run_leaves_a_version_a_branch_and_its_data(platform: Platform, line: Line) -> None:
    outcome, run = platform.outcome(line.second), platform.read(line.second)
    branch = f"runs/{run.name}"
    changed = platform.git("diff", "--name-only", "HEAD", branch)
    assert changed == "dvc.lock"
    curve = platform.curve(outcome.mlflow_run_id, "reward/mean")
    assert [step for step, _ in curve] == list(range(1, NUM_UPDATES + 1))
    assert platform.mlflow.get_run(outcome.mlflow_run_id).info.status == "FINISHED"
    listed = {
        output["md5"]
        for stage in YAML(typ="safe").load(platform.git("show", f"{branch}:dvc.lock"))["stages"].values()
        for output in stage["outs"]
        if "models/shapes-" not in output["path"]
    }
    kept = {key.removeprefix("store/files/md5/").replace("/", "") for key in platform.keys("dvc")}
    assert len(listed) == 4 and listed <= kept
    artifacts = platform.keys("mlflow")
    assert any(f"{outcome.mlflow_run_id}/artifacts/images/" in key for key in artifacts)
    assert any(key.endswith("pytorch_lora_weights.safetensors") for key in artifacts)
    assert any(key.startswith("train/train-") for key in platform.keys("runs"))
    assert not platform.worktree(line.second).exists()
    assert platform.git("status", "--porcelain") == ""


def test_the_better_version_became_champion_and_rollback_brings_the_former_back(platform: Platform, line: Line) -> None:
    first, second = platform.outcome(line.first).version, platform.outcome(line.second).version
    assert (platform.alias("champion"), platform.alias("previous")) == (second, first)
    image = platform.sample(PROMPT)
    assert image.startswith(PNG_SIGNATURE)
    told = platform.command("sfgrpo", "rollback")
    assert f"version {second} of {platform.model} is rolled back; version {first} is champion again" in told
    assert platform.alias("champion") == first
    assert platform.sample(PROMPT) != image


def test_a_run_that_has_nothing_to_train_costs_little_more_than_its_stages(platform: Platform, line: Line) -> None:
    begin = time.monotonic()
    platform.completed(platform.schedule({"promote": False}))
    scheduled_s = time.monotonic() - begin
    begin = time.monotonic()
    platform.command("dvc", "repro")
    platform.command("sfgrpo", "register")
    direct_s = time.monotonic() - begin
    platform.git("checkout", "--quiet", "--", ".")
    platform.durations["a scheduled run, up to date"] = scheduled_s
    platform.durations["the same stages by dvc repro and register"] = direct_s
    versions = platform.mlflow.search_model_versions(f"name = '{platform.model}'")
    assert len(versions) == 2, "nothing new was registered"


def test_servers_that_are_killed_cost_nothing(platform: Platform, undisturbed: Outcome) -> None:
    run_id = disturbed(platform, keep=3)
    saved = platform.wait_for_update(run_id)
    for program in SERVERS:
        begin = time.monotonic()
        killed = platform.stack.pid(program)
        platform.stack.kill(program)
        # It trains on while the server is away.
        saved = platform.wait_for_update(run_id, after=saved)
        with platform.trainers_held():
            platform.stack.wait_until_healed(program, killed)
        platform.durations[f"{program} killed, until all is healthy"] = time.monotonic() - begin
        saved = platform.wait_for_update(run_id, after=saved)
    assert saved < NUM_UPDATES, "the last server came back after the training"
    assert platform.completed(run_id).run_count == 1
    check_nothing_lost(platform, run_id, undisturbed)


def test_a_killed_flow_goes_on_as_the_same_run_and_outlives_its_worker(
    platform: Platform, undisturbed: Outcome
) -> None:
    run_id = disturbed(platform, keep=4)
    saved = platform.wait_for_update(run_id)
    killed = platform.processes()
    begin = time.monotonic()
    kill_all(platform.flow_processes(run_id))
    platform.durations["flow killed, until nothing of it is left"] = platform.wait_for_end(killed)
    platform.wait(run_id, lambda run: run.run_count == 2, "started again")
    platform.durations["flow killed, until it was started again"] = time.monotonic() - begin

    platform.wait_for_update(run_id, after=saved)
    with platform.trainers_held():
        begin = time.monotonic()
        platform.stack.kill_and_heal("worker")
        platform.durations["worker killed, until all is healthy"] = time.monotonic() - begin
        assert platform.read(run_id).state_name == "Running"
    assert platform.completed(run_id).run_count == 2
    check_nothing_lost(platform, run_id, undisturbed)


def test_a_flow_that_is_killed_with_its_worker_is_found_dead_and_goes_on(
    platform: Platform, undisturbed: Outcome
) -> None:
    run_id = disturbed(platform, keep=5)
    platform.wait_for_update(run_id)
    killed = platform.processes()
    begin = time.monotonic()
    platform.stack.kill("worker")
    kill_all(platform.flow_processes(run_id))
    platform.wait_for_end(killed)
    platform.wait(run_id, lambda run: run.state_name != "Running", "found dead", DEAD_S)
    platform.durations["worker and flow killed, until that was found out"] = time.monotonic() - begin
    # It needs the slot of its deployment, which its own death has to set free.
    platform.wait(run_id, lambda run: run.run_count == 2, "started again")
    platform.durations["worker and flow killed, until it was started again"] = time.monotonic() - begin
    platform.stack.wait_until_healthy()
    assert platform.completed(run_id).run_count == 2
    check_nothing_lost(platform, run_id, undisturbed)


def test_a_cancelled_run_leaves_nothing_and_the_next_one_goes_on(platform: Platform, undisturbed: Outcome) -> None:
    cancelled = disturbed(platform, keep=6)
    platform.wait_for_update(cancelled)
    processes = platform.processes()
    with platform.prefect() as client:
        # What the page of the run does.
        client.set_flow_run_state(cancelled, Cancelling())
    platform.durations["cancelled, until no process is left"] = platform.wait_for_end(processes)
    platform.wait_for_state(cancelled, "Cancelled")
    saved = platform.saved_update(cancelled)
    assert 0 < saved < NUM_UPDATES
    stopped = platform.trained(cancelled)
    assert stopped.info.status == "KILLED"

    resumed = disturbed(platform, keep=6)
    log = platform.worktree(resumed) / "logs/train.log"
    wait_until(lambda: log.exists() and "resuming after update" in log.read_text(), "the next run does not resume")
    assert f"resuming after update {saved}" in log.read_text()
    platform.completed(resumed)
    outcome = check_nothing_lost(platform, resumed, undisturbed)
    assert outcome.mlflow_run_id == stopped.info.run_id


def test_no_secret_is_anywhere_but_where_it_belongs(platform: Platform, undisturbed: Outcome) -> None:
    stack = platform.stack
    secrets = dataclasses.asdict(ensure_secrets(stack.folder.secrets))
    found = secrets_search.in_command_lines(secrets)
    # Of PostgreSQL and S3 below, by what they hand out: their own folders have what lets them in.
    folders = [stack.folder.logs, stack.folder.private, *map(stack.folder.data, ("mlflow", "prefect", "worker"))]
    assert (stack.folder.logs / "worker.log").exists() and (platform.folder / ".scratch").exists()
    for folder in (*folders, platform.folder):
        found += secrets_search.in_folder(folder, secrets)
    for bucket in ("runs", "dvc", "mlflow"):
        assert platform.keys(bucket)
        found += secrets_search.in_bucket(platform.s3, bucket, secrets)
    for database, known in (("prefect", "train-policy"), ("mlflow", platform.model)):
        dump = dumped(stack, database, secrets["postgres_password"])
        assert known in dump
        found += secrets_search.in_text(f"database {database}", dump, secrets)
    assert found == []


def dumped(stack: Stack, database: str, password: str) -> str:
    """Read a whole database of the stack as text."""
    program = binaries(stack.folder.data("postgres") / "cluster") / "pg_dump"
    address = ["--host", "127.0.0.1", "--port", stack.variables["STACK_POSTGRES_PORT"], "--username", SUPERUSER]
    done = subprocess.run(
        [program, *address, database],
        env={**os.environ, "PGPASSWORD": password},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout
