"""Prefect's server with its services, on PostgreSQL."""

from __future__ import annotations

import uuid
from typing import Any

from infra.stack.addresses import own_origins
from infra.stack.health import get_json, post_json
from infra.stack.program import BIN, ROOT, Launch, Program, Stack
from infra.stack.programs.postgres import database_url

USER = "sfgrpo"
SERVER = ROOT / "infra" / "prefect_server" / "serve.py"


def address(stack: Stack) -> str:
    """Return the address for clients on this machine."""
    return f"http://{stack.settings.local_host}:{stack.settings.prefect_port}"


def client_environment(stack: Stack) -> dict[str, str]:
    """Return the environment of Prefect's clients."""
    login = {"PREFECT_API_AUTH_STRING": _credentials(stack)} if stack.settings.auth else {}
    return {"PREFECT_API_URL": f"{address(stack)}/api", **login}


def ask_prefect(stack: Stack, path: str, content: object) -> Any:
    """Post a request to the server and return its answer; raise `UnhealthyError` for every other outcome."""
    credentials = (USER, stack.secrets.prefect_password) if stack.settings.auth else None
    client = str(uuid.uuid4())
    token = get_json(f"{address(stack)}/api/csrf-token?client={client}", credentials)["token"]
    headers = {"Prefect-Csrf-Client": client, "Prefect-Csrf-Token": token}
    return post_json(f"{address(stack)}/api/{path}", content, credentials, headers)


def _credentials(stack: Stack) -> str:
    return f"{USER}:{stack.secrets.prefect_password}"


def _launch(stack: Stack) -> Launch:
    folder = stack.folder.make_data("prefect")
    settings = stack.settings
    login = {"PREFECT_SERVER_API_AUTH_STRING": _credentials(stack)} if settings.auth else {}
    return Launch(
        command=[
            *(str(BIN / "python"), str(SERVER)),
            *("--host", str(settings.host), "--port", str(settings.prefect_port)),
        ],
        environment={
            "PREFECT_HOME": str(folder),
            "PREFECT_API_DATABASE_CONNECTION_URL": database_url(
                stack, "asyncpg", "prefect", stack.secrets.prefect_database_password
            ),
            "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
            "PREFECT_SERVER_CORS_ALLOWED_ORIGINS": ",".join(own_origins(settings, settings.prefect_port)),
            "PREFECT_SERVER_CSRF_PROTECTION_ENABLED": "true",
            # Prefect fills in its pages, by default in its own package, which the user may not write.
            "PREFECT_UI_STATIC_DIRECTORY": str(folder / "ui"),
            # In memory, a restarted server would have lost the leases of slots, and never free those slots.
            "PREFECT_SERVER_CONCURRENCY_LEASE_STORAGE": "prefect.server.concurrency.lease_storage.filesystem",
            "PREFECT_SERVER_SERVICES_DB_VACUUM_ENABLED": "events,flow_runs",
            # Relative to the address of the page, since browsers may know this machine by another name.
            "PREFECT_SERVER_UI_API_URL": "/api",
            "PREFECT_SERVER_UI_SHOW_PROMOTIONAL_CONTENT": "false",
            **login,
        },
        working_directory=folder,
    )


def _check(stack: Stack) -> None:
    ask_prefect(stack, "flows/count", {})


PREFECT = Program(
    name="prefect", launch=_launch, check=_check, address=address, port="STACK_PREFECT_PORT", needs=("postgres",)
)
