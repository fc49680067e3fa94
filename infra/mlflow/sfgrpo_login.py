"""Login of MLflow's server for its own pages alone.

MLflow takes the pages of every port of this machine for its own. A browser sends the login by itself, so that a page of
somebody else's server, behind a tunnel for example, could act in the name of who has logged in.
"""

from __future__ import annotations

import os

from flask import Response, request
from mlflow.server.auth import authenticate_request_basic_auth
from werkzeug.datastructures import Authorization


def authenticate() -> Authorization | Response:
    """Return who asks, or a refusal; MLflow calls it by `authorization_function`."""
    # Set by --cors-allowed-origins.
    own = os.environ["MLFLOW_SERVER_CORS_ALLOWED_ORIGINS"].split(",")
    # Absent where a page asks its own server for something, and for clients that are no browsers.
    if any(origin not in own for origin in request.headers.getlist("Origin")):
        return Response("pages of another Origin get no answer", status=403)
    return authenticate_request_basic_auth()
