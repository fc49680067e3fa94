"""Webhooks of an MLflow server, which report that an alias was set."""

from __future__ import annotations

from typing import Literal

from sfgrpo.tracking.mlflow_client import connect

EVENT: Literal["model_version_alias.created"] = "model_version_alias.created"


def register_webhook(uri: str, name: str, url: str, secret: str) -> str:
    """Create or update the webhook of a name, so that there is exactly one and it calls `url`; return its id.

    MLflow signs its messages with `secret`, which it stores encrypted.
    """
    client = connect(uri)
    known = [webhook for webhook in client.list_webhooks(max_results=1000) if webhook.name == name]
    if not known:
        return str(client.create_webhook(name, url, [EVENT], secret=secret).webhook_id)
    first, *others = known
    for other in others:
        client.delete_webhook(other.webhook_id)
    client.update_webhook(first.webhook_id, url=url, events=[EVENT], secret=secret, status="ACTIVE")
    return str(first.webhook_id)
