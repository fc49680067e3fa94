"""One of Swift's servers, a child that dies with `serve.py`: `swift_process.py KIND FOLDER PARENT_ID`."""

from __future__ import annotations

import ctypes
import importlib
import os
import signal
import sys
from pathlib import Path

from backend_gate import send_key

# mypy runs in .venv; Swift is installed in .venv-s3 alone.
from swift.common import utils  # type: ignore[import-not-found]

PR_SET_PDEATHSIG = 1  # of linux/prctl.h


def main() -> None:
    """Run the server until it is told to stop."""
    kind, folder, parent = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
    _die_with(parent)
    # Swift has no option for this path, and would look in /etc.
    utils.SWIFT_CONF_FILE = str(folder / "swift.conf")
    send_key()
    module = {"object": "swift.obj"}.get(kind, f"swift.{kind}")
    sys.argv = [f"swift-{kind}-server", str(folder / f"{kind}.conf"), "--verbose"]
    importlib.import_module(f"{module}.server").main()


def _die_with(parent: int) -> None:
    """Ask the kernel to kill this process when its parent ends, for whatever reason."""
    if ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL) != 0:
        raise OSError(ctypes.get_errno(), "prctl refuses PR_SET_PDEATHSIG")
    if os.getppid() != parent:
        sys.exit("the parent ended before its child had started")


if __name__ == "__main__":
    main()
