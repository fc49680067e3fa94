"""One of Swift's servers, as a child of `serve.py` with which it dies: `swift_process.py KIND FOLDER PARENT_ID`."""

from __future__ import annotations

import ctypes
import importlib
import os
import signal
import sys
from pathlib import Path

from swift.common import utils  # type: ignore[import-not-found]

PR_SET_PDEATHSIG = 1  # of linux/prctl.h


def main() -> None:
    """Runs the server until it is told to stop."""
    kind, folder, parent = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
    _die_with(parent)
    # Swift has no option for it, and would look in /etc.
    utils.SWIFT_CONF_FILE = str(folder / "swift.conf")
    module = {"object": "swift.obj"}.get(kind, f"swift.{kind}")
    sys.argv = [f"swift-{kind}-server", str(folder / f"{kind}.conf"), "--verbose"]
    importlib.import_module(f"{module}.server").main()


def _die_with(parent: int) -> None:
    """Asks the kernel to kill this process when its parent is gone, however that ends."""
    if ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL) != 0:
        raise OSError(ctypes.get_errno(), "prctl refuses PR_SET_PDEATHSIG")
    if os.getppid() != parent:
        sys.exit("the parent ended before its child had started")


if __name__ == "__main__":
    main()
