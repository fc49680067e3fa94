"""Prepare a Prefect server for this project and register every deployment: `python -m flows.deploy`.

Idempotent. Changes that a person made in the UI are kept: schedules that were switched on, the number of GPU slots,
settings of the work pool.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from prefect import get_client
from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.actions import GlobalConcurrencyLimitCreate, WorkPoolCreate
from prefect.client.schemas.objects import StateType
from prefect.events.actions import ChangeFlowRunState
from prefect.events.schemas.automations import AutomationCore, EventTrigger, Posture
from prefect.exceptions import ObjectNotFound, PrefectHTTPStatusError
from prefect.settings import PREFECT_API_URL, PREFECT_UI_URL
from prefect.workers.process import ProcessWorker

from sfgrpo.errors import ConfigError
from tasks.gpu_slots import LIMIT

POOL = "sfgrpo"
DEFINITION = Path("prefect.yaml")
SILENCE_S = 90
"""Three missed heartbeats."""
REST_S = 30
"""Pause between a crash and the next attempt."""
MAX_ATTEMPTS = 3
"""How often a training run is started in all: a run that always crashes must not go on for ever."""
RENAMED = {"sweep/every-10-minutes": "close-stale-runs/every-10-minutes"}
"""Deployments of earlier versions, and what they are called now."""

ZOMBIES = AutomationCore(
    name="sfgrpo: dead runs are marked Crashed",
    description=(
        f"A flow run that sent heartbeats and then none for {SILENCE_S} s has lost both its process and its worker; "
        "without this automation it would stay Running for ever."
    ),
    trigger=EventTrigger(
        after={"prefect.flow-run.heartbeat"},
        expect={"prefect.flow-run.*"},
        match={"prefect.resource.id": "prefect.flow-run.*"},
        for_each={"prefect.resource.id"},
        posture=Posture.Proactive,
        threshold=1,
        within=datetime.timedelta(seconds=SILENCE_S),
    ),
    actions=[
        ChangeFlowRunState(
            state=StateType.CRASHED,
            name="Crashed",
            message=f"The run sent no heartbeat for {SILENCE_S} s.",
            force=False,
        )
    ],
)
RESUMPTION = AutomationCore(
    name="sfgrpo: crashed trainings go on",
    description=(
        f"A crashed run of train-policy is scheduled again after {REST_S} s, as the same run, up to {MAX_ATTEMPTS} "
        "starts in all; it resumes from its last checkpoint."
    ),
    trigger=EventTrigger(
        after={"prefect.flow-run.Crashed"},
        expect={"prefect.flow-run.*"},
        match={
            "prefect.resource.id": "prefect.flow-run.*",
            "prefect.run-count": [str(count) for count in range(1, MAX_ATTEMPTS)],
        },
        match_related={"prefect.resource.role": "flow", "prefect.resource.name": "train-policy"},
        for_each={"prefect.resource.id"},
        # Not at once: a worker reports the crash of a process a second time after its cleanup, which would then count
        # as a crash of the new attempt.
        posture=Posture.Proactive,
        threshold=1,
        within=datetime.timedelta(seconds=REST_S),
    ),
    actions=[
        ChangeFlowRunState(
            state=StateType.SCHEDULED,
            name="AwaitingRetry",
            message="The run crashed, and resumes from its last checkpoint.",
            force=False,
        )
    ],
)


def ensure_pool(client: SyncPrefectClient) -> str:
    """Create the work pool unless there is one of its name, of whatever type; return a line about it."""
    try:
        return f"work pool {POOL} is there, of type {client.read_work_pool(POOL).type}"
    except ObjectNotFound:
        template = ProcessWorker.get_default_base_job_template()
        client.create_work_pool(WorkPoolCreate(name=POOL, type=ProcessWorker.type, base_job_template=template))
        return f"work pool {POOL} made, of type {ProcessWorker.type}"


def ensure_slots(client: SyncPrefectClient, num_slots: int) -> str:
    """Create the limit on GPU slots unless there is one; return a line about it."""
    try:
        return f"limit {LIMIT} is there, slots {client.read_global_concurrency_limit_by_name(LIMIT).limit}"
    except ObjectNotFound:
        client.create_global_concurrency_limit(GlobalConcurrencyLimitCreate(name=LIMIT, limit=num_slots, active=True))
        return f"limit {LIMIT} made, slots {num_slots}"


def ensure_automation(client: SyncPrefectClient, wanted: AutomationCore) -> str:
    """Create or update an automation; one that was switched off stays so. Return a line about it."""
    found = client.read_automations_by_name(wanted.name)
    if not found:
        client.create_automation(wanted)
        return f"automation made: {wanted.name}"
    wanted = wanted.model_copy(update={"enabled": found[0].enabled})
    if _content(found[0]) == _content(wanted):
        return f"automation is there: {wanted.name}"
    client.update_automation(found[0].id, wanted)
    return f"automation changed: {wanted.name}"


def _content(automation: AutomationCore) -> dict[str, Any]:
    """Return the definition of an automation without the ids that the server adds."""
    return automation.model_dump(mode="json", include={"name", "description", "enabled", "trigger", "actions"})


def remove_renamed(client: SyncPrefectClient) -> list[str]:
    """Delete the deployments that an earlier version registered under another name; return a line for each."""
    lines: list[str] = []
    for old, new in RENAMED.items():
        with contextlib.suppress(ObjectNotFound):
            client.delete_deployment(client.read_deployment_by_name(old).id)
            lines.append(f"deployment removed: {old}; it is now {new}, whose schedule starts switched off")
    return lines


def count_gpus() -> int:
    """Count the GPUs of this machine by their device files; PyTorch would take seconds to load."""
    return sum(1 for path in Path("/dev").glob("nvidia*") if re.fullmatch(r"nvidia\d+", path.name))


def register_deployments() -> None:
    """Register all deployments of prefect.yaml by Prefect's command line.

    Raises:
        ConfigError: it failed; its own message is on the terminal.
    """
    command = [sys.executable, "-m", "prefect", "--no-prompt", "deploy", "--all", "--prefect-file", str(DEFINITION)]
    if subprocess.run(command).returncode:
        raise ConfigError(f"prefect could not register the deployments of {DEFINITION}; see above")


@contextlib.contextmanager
def schedules_kept(client: SyncPrefectClient) -> Iterator[None]:
    """Restore the switch of every schedule after the block, since a person may have set it."""
    before = {(found.id, each.id): each.active for found in client.read_deployments() for each in found.schedules}
    yield
    for found in client.read_deployments():
        for each in found.schedules:
            switch = before.get((found.id, each.id), each.active)
            if switch != each.active:
                client.update_deployment_schedule(found.id, each.id, active=switch)


def deploy(num_slots: int) -> None:
    """Prepare the server at PREFECT_API_URL and print what was done.

    Raises:
        ConfigError: there is no such server, or it refuses.
    """
    address = PREFECT_API_URL.value()
    if not address:
        raise ConfigError("PREFECT_API_URL is not set; start the services, and set it to their address")
    with get_client(sync_client=True) as client:
        if (error := client.api_healthcheck()) is not None:
            raise ConfigError(f"PREFECT_API_URL {address} does not answer ({error}); start the server there")
        try:
            for line in (
                ensure_pool(client),
                ensure_slots(client, num_slots),
                ensure_automation(client, ZOMBIES),
                ensure_automation(client, RESUMPTION),
                *remove_renamed(client),
            ):
                # Flushed, since Prefect's command line prints next.
                print(line, flush=True)
        except PrefectHTTPStatusError as refusal:
            reason = f"{refusal.response.status_code} {refusal.response.reason_phrase}"
            raise ConfigError(f"{address} refuses ({reason}); check PREFECT_API_AUTH_STRING") from refusal
        with schedules_kept(client):
            register_deployments()
        for deployment in sorted(client.read_deployments(), key=lambda found: found.name):
            flow = client.read_flow(deployment.flow_id)
            print(f"{flow.name}/{deployment.name}: {PREFECT_UI_URL.value()}/deployments/deployment/{deployment.id}")


def main(arguments: list[str]) -> int:
    """Deploy; return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m flows.deploy", description=__doc__)
    parser.add_argument("--gpu-slots", type=int, default=max(1, count_gpus()), help="trainings at a time (%(default)s)")
    try:
        deploy(parser.parse_args(arguments).gpu_slots)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
