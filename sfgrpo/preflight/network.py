"""Proxies, the hub and Prefect: what requests of the commands and of the libraries meet."""

from __future__ import annotations

import base64
import json
import os
import urllib.request
from collections.abc import Mapping
from urllib.error import HTTPError, URLError
from urllib.parse import urlsplit

from sfgrpo.errors import ConfigError, SfgrpoError
from sfgrpo.preflight.report import Doubt
from sfgrpo.runtime.redaction import without_secrets

ANSWER_S = 5.0
LOOPBACK = ("127.0.0.1", "localhost")


def check_proxies(addresses: Mapping[str, str]) -> str:
    """Check that no proxy stands between this machine and itself, or its own services.

    Args:
        addresses: addresses of services, by the variables that name them.

    Raises:
        ConfigError: Requests to this machine would go to a proxy.
    """
    proxies = {kind: address for kind, address in urllib.request.getproxies().items() if kind != "no"}
    if not proxies:
        return "none"
    listed = ", ".join(f"{kind} by {without_secrets(address)}" for kind, address in sorted(proxies.items()))
    if caught := [host for host in LOOPBACK if not urllib.request.proxy_bypass(host)]:
        raise ConfigError(
            f"{listed}, also for {' and '.join(caught)}, where flows start a Prefect server that would never answer; "
            f"add 127.0.0.1,localhost to NO_PROXY"
        )
    hosts = {name: urlsplit(address).hostname for name, address in addresses.items()}
    if through := [name for name, host in hosts.items() if host and not urllib.request.proxy_bypass(host)]:
        raise Doubt(
            f"{listed}, also for {' and '.join(through)}; add their hosts to NO_PROXY if they are in your network"
        )
    return f"{listed}, not for this machine"


def describe_hub(*, is_used: bool) -> str:
    """Return how the hub is reached: by its cache alone, with a token, or without; doubt settings that do not fit.

    Args:
        is_used: whether a model of the parameters comes from the hub.
    """
    if not is_used:
        return "not used: all models are folders"
    from huggingface_hub import constants, get_token

    token = "a token" if get_token() else "no token"
    text = f"cache {constants.HF_HUB_CACHE}, {token}"
    if constants.HF_HUB_OFFLINE:
        return f"{text}, offline"
    if token == "no token":
        raise Doubt(f"{text}; gated models, such as Stable Diffusion 3.5, need HF_TOKEN")
    return text


def check_prefect() -> str:
    """Ask the Prefect server of the environment for its version.

    Raises:
        ConfigError: There is no Prefect server at PREFECT_API_URL, or it refuses the login.
        SfgrpoError: It does not answer.
    """
    address = os.environ.get("PREFECT_API_URL")
    if not address:
        return "PREFECT_API_URL is not set: each flow starts a server for itself"
    request = urllib.request.Request(f"{address.rstrip('/')}/admin/version")
    if login := os.environ.get("PREFECT_API_AUTH_STRING"):
        request.add_header("Authorization", f"Basic {base64.b64encode(login.encode()).decode()}")
    shown = without_secrets(address)
    try:
        with urllib.request.urlopen(request, timeout=ANSWER_S) as answer:
            version = json.loads(answer.read())
    except HTTPError as error:
        if error.code in (401, 403):
            raise ConfigError(
                f"PREFECT_API_URL {shown} refuses the login; set PREFECT_API_AUTH_STRING to user:password"
            ) from error
        raise ConfigError(f"PREFECT_API_URL {shown} answers {error.code}; it should end in /api") from error
    except (URLError, TimeoutError, ConnectionError) as error:
        reason = getattr(error, "reason", error)
        raise SfgrpoError(
            f"PREFECT_API_URL {shown} does not answer ({reason}); start the server, or unset the variable"
        ) from error
    except ValueError as error:
        raise ConfigError(f"PREFECT_API_URL {shown} is no Prefect server ({error}); it should end in /api") from error
    return f"{shown} runs Prefect {version}"
