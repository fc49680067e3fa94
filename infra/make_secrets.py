"""Generate the secrets that `infra/compose.yaml` reads: `python3 infra/make_secrets.py`.

Existing secrets are never replaced. Everyone can read the files, since each container reads them as another user; only
the owner can enter their folder.
"""

from __future__ import annotations

import base64
import json
import secrets
import sys
from pathlib import Path

FOLDER = Path(__file__).parent / "secrets"
PASSWORDS = (
    "postgres_password",
    "prefect_database_password",
    "mlflow_database_password",
    "valkey_password",
    "mlflow_session_key",
    "webhook_secret",
)
USER = "sfgrpo"
"""Who logs in to Prefect and MLflow, as `mlflow/login.ini` says too."""
RIGHTS = {
    "admin": ["Admin"],
    "mlflow": ["Read:mlflow", "Write:mlflow", "List:mlflow"],
    "training": ["Read:runs", "Write:runs", "List:runs"],
}
"""Rights of each user of the S3 server, in the notation of SeaweedFS: `Right:bucket`."""


def main(folder: Path) -> int:
    """Write all secrets into a new folder; return the exit status."""
    try:
        folder.mkdir(mode=0o700)
    except FileExistsError:
        print(f"{folder} exists; remove it first, together with the volumes that were made with it", file=sys.stderr)
        return 1
    for name in PASSWORDS:
        _write(folder / name, secrets.token_urlsafe(32))
    prefect, mlflow = f"{USER}:{secrets.token_urlsafe(32)}", secrets.token_urlsafe(32)
    _write(folder / "prefect_login", prefect)
    _write(folder / "mlflow_password", mlflow)
    # For shells of clients.
    login = {
        "PREFECT_API_AUTH_STRING": prefect,
        "MLFLOW_TRACKING_USERNAME": USER,
        "MLFLOW_TRACKING_PASSWORD": mlflow,
    }
    _write(folder / "login", "".join(f"export {name}={value}\n" for name, value in login.items()))
    # A key of Fernet, which MLflow encrypts the secrets of webhooks by.
    _write(folder / "mlflow_webhook_key", base64.urlsafe_b64encode(secrets.token_bytes(32)).decode())
    identities = []
    for user, actions in RIGHTS.items():
        access, secret = secrets.token_hex(10), secrets.token_hex(20)
        _write(folder / f"s3_{user}", f"[default]\naws_access_key_id = {access}\naws_secret_access_key = {secret}\n")
        keys = [{"accessKey": access, "secretKey": secret}]
        identities.append({"name": user, "credentials": keys, "actions": actions})
    _write(folder / "s3_identities.json", json.dumps({"identities": identities}, indent=2) + "\n")
    return 0


def _write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")
    path.chmod(0o444)


if __name__ == "__main__":
    sys.exit(main(FOLDER))
