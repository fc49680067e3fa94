"""The webhook that MLflow calls when a version becomes challenger; it starts the promotion."""

from __future__ import annotations

from infra.stack.health import require_answer
from infra.stack.program import BIN, ROOT, Launch, Program, Stack
from infra.stack.programs.prefect import client_environment
from infra.stack.settings import LOOPBACK


def _address(stack: Stack) -> str:
    return f"http://{LOOPBACK}:{stack.settings.webhook_port}"


def _launch(stack: Stack) -> Launch:
    folder = stack.folder.make_data("webhook")
    return Launch(
        command=[str(BIN / "python"), "-m", "flows.webhook", "--port", str(stack.settings.webhook_port)],
        environment={
            **client_environment(stack),
            "WEBHOOK_SECRET": stack.secrets.webhook_secret,
            "PREFECT_HOME": str(folder),
        },
        working_directory=ROOT,
    )


def _check(stack: Stack) -> None:
    require_answer(_address(stack))


WEBHOOK = Program(
    name="webhook",
    launch=_launch,
    check=_check,
    address=_address,
    port="STACK_WEBHOOK_PORT",
    needs=("mlflow", "prefect"),
)
