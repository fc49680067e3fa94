"""The temporary Prefect server of a flow that runs as a program, where no server is configured.

Prefect would start one itself, in the process group of the flow: Ctrl-C would end it first, and the flow would wait for
minutes for a server that is gone. It would also answer everybody on this machine, and every page in its browsers.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from sfgrpo.runtime.process import die_with_parent

CODE = Path(__file__).parents[1]


@contextlib.contextmanager
def temporary_server(waits_for_end: Callable[[], bool]) -> Iterator[None]:
    """Start the server that Prefect will use in the block, unless it is to use another one.

    The server knows one login, which this process alone has, and takes no request of a web page. At the end of the
    process it is told to stop, and awaited if `waits_for_end` says so.
    """
    from prefect import settings
    from prefect.client.base import ServerType, determine_server_type
    from prefect.server.api.server import SubprocessASGIServer

    class ShelteredServer(SubprocessASGIServer):
        """A server that no signal to the flow's terminal or process group reaches, and that dies with the flow.

        Prefect has no public hook for this: `_run_uvicorn_command` is private, and so is the table of instances where
        its clients find this one. `tests/tasks/test_server.py` would fail with a version that changes them.
        """

        def _run_uvicorn_command(self) -> subprocess.Popen[bytes]:
            variables = settings.get_current_settings().to_environment_variables(exclude_unset=True)
            server = {"PREFECT_UI_ENABLED": "0", "PREFECT__SERVER_EPHEMERAL": "1", "PREFECT__SERVER_FINAL": "1"}
            path = os.pathsep.join(filter(None, [str(CODE), os.environ.get("PYTHONPATH")]))
            return subprocess.Popen(
                [sys.executable, "-m", "tasks.server", str(os.getpid()), str(self.port)],
                env={**os.environ, **server, **variables, "PYTHONPATH": path},
                start_new_session=True,
            )

        def stop(self) -> None:
            if self.server_process is None or waits_for_end():
                super().stop()
            else:
                self.server_process.terminate()

    if determine_server_type() != ServerType.EPHEMERAL:
        yield
        return
    login = f"flow:{secrets.token_urlsafe(32)}"
    closed = {
        settings.PREFECT_API_AUTH_STRING: login,
        settings.PREFECT_SERVER_API_AUTH_STRING: login,
        settings.PREFECT_SERVER_CSRF_PROTECTION_ENABLED: True,
        settings.PREFECT_SERVER_CORS_ALLOWED_ORIGINS: "http://127.0.0.1",
    }
    with settings.temporary_settings(closed):
        ShelteredServer().start()
        yield


def main(parent_pid: int, port: int) -> None:
    """Serve until the parent dies or SIGTERM."""
    import uvicorn

    die_with_parent(signal.SIGTERM)
    if os.getppid() == parent_pid:
        application = "prefect.server.api.server:create_app"
        uvicorn.run(application, factory=True, host="127.0.0.1", port=port, log_level="error", lifespan="on")


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
