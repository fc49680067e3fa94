"""MLflow's server: runs and models in PostgreSQL, artifacts in S3, large ones by presigned addresses."""

from __future__ import annotations

from infra.stack.addresses import own_hosts, own_origins
from infra.stack.credentials import write_private
from infra.stack.health import post_json
from infra.stack.program import BIN, ROOT, Launch, Program, Stack
from infra.stack.programs.postgres import database_url
from infra.stack.programs.s3 import client_environment as s3_environment

USER = "sfgrpo"
NUM_WORKERS = 2

LOGIN = """\
[mlflow]
default_permission = READ
database_uri = sqlite:///{database}
admin_username = {user}
authorization_function = sfgrpo_login:authenticate
"""


def address(stack: Stack) -> str:
    """Return the address for clients on this machine."""
    return f"http://{stack.settings.local_host}:{stack.settings.mlflow_port}"


def client_environment(stack: Stack) -> dict[str, str]:
    """Return the environment of MLflow's clients."""
    login = {"MLFLOW_TRACKING_USERNAME": USER, "MLFLOW_TRACKING_PASSWORD": stack.secrets.mlflow_password}
    return {
        "MLFLOW_TRACKING_URI": address(stack),
        "MLFLOW_ENABLE_PROXY_MULTIPART_UPLOAD": "true",
        **(login if stack.settings.auth else {}),
    }


def _launch(stack: Stack) -> Launch:
    folder = stack.folder.make_data("mlflow")
    settings, secrets = stack.settings, stack.secrets
    command = [str(BIN / "mlflow"), "server", "--host", str(settings.host), "--port", str(settings.mlflow_port)]
    command += ["--workers", str(NUM_WORKERS), "--artifacts-destination", "s3://mlflow"]
    # Its own default lets in every name that looks like a private address, such as 10.example.org.
    command += ["--allowed-hosts", ",".join(own_hosts(settings, settings.mlflow_port))]
    command += ["--cors-allowed-origins", ",".join(own_origins(settings, settings.mlflow_port))]
    environment = {
        **s3_environment(stack),
        "MLFLOW_BACKEND_STORE_URI": database_url(stack, "psycopg2", "mlflow", secrets.mlflow_database_password),
        "MLFLOW_ENABLE_PROXY_MULTIPART_UPLOAD": "true",
        # The receiver of webhooks listens on this machine, by plain HTTP.
        "MLFLOW_WEBHOOK_ALLOWED_SCHEMES": "http,https",
        "MLFLOW_WEBHOOK_ALLOW_PRIVATE_IPS": "true",
        "MLFLOW_WEBHOOK_SECRET_ENCRYPTION_KEY": secrets.mlflow_webhook_key,
        # Four more processes for judges of generated text, which are not used here.
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
        "MLFLOW_DISABLE_TELEMETRY": "true",
    }
    if settings.auth:
        login = folder / "login.ini"
        write_private(login, LOGIN.format(database=folder / "login.db", user=USER).replace("%", "%%"))
        command += ["--app-name", "basic-auth"]
        environment |= {
            "MLFLOW_AUTH_CONFIG_PATH": str(login),
            # Where `sfgrpo_login` is.
            "PYTHONPATH": str(ROOT / "infra" / "mlflow"),
            "MLFLOW_AUTH_ADMIN_PASSWORD": secrets.mlflow_password,
            "MLFLOW_FLASK_SERVER_SECRET_KEY": secrets.mlflow_session_key,
        }
    return Launch(command=command, environment=environment, working_directory=folder)


def _check(stack: Stack) -> None:
    credentials = (USER, stack.secrets.mlflow_password) if stack.settings.auth else None
    post_json(f"{address(stack)}/api/2.0/mlflow/experiments/search", {"max_results": 1}, credentials)


MLFLOW = Program(
    name="mlflow", launch=_launch, check=_check, address=address, port="STACK_MLFLOW_PORT", needs=("postgres", "s3")
)
