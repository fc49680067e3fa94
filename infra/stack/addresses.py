"""Addresses by which browsers and clients may reach MLflow and Prefect: they answer to no others."""

from __future__ import annotations

import socket
from urllib.parse import urlsplit

import psutil

from infra.stack.settings import LOOPBACK, Settings

HTTP_PORT = 80
"""Browsers leave it out."""


def own_origins(settings: Settings, port: int) -> list[str]:
    """Return the origins of the pages of a server that listens on a port."""
    names = {"localhost", LOOPBACK, settings.local_host}
    if settings.host.is_unspecified:
        names |= {socket.gethostname().lower(), socket.getfqdn().lower()}
        for interface in psutil.net_if_addrs().values():
            names |= {entry.address for entry in interface if entry.family == socket.AF_INET}
    suffix = "" if port == HTTP_PORT else f":{port}"
    return [*(f"http://{name}{suffix}" for name in sorted(names)), *settings.further_origins]


def own_hosts(settings: Settings, port: int) -> list[str]:
    """Return the same addresses as values of the Host header."""
    return [urlsplit(origin).netloc for origin in own_origins(settings, port)]
