"""Entry point of `python -m sfgrpo`."""

import os
import signal
import sys
from types import FrameType


def leave(number: int, frame: FrameType | None) -> None:
    """End the process at once: nothing is open. The status is that of `sfgrpo.errors.ExitStatus.RESUMABLE`."""
    os.write(2, b"stopped: the command was told to stop before it was done; start it again\n")
    os._exit(75)


# Before the imports, which take a second. `sfgrpo.runtime.shutdown` takes over when the command begins.
for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP, signal.SIGINT):
    if signal.getsignal(number) is not signal.SIG_IGN:
        signal.signal(number, leave)

from sfgrpo.cli import main  # noqa: E402
from sfgrpo.errors import ExitStatus  # noqa: E402

if __name__ == "__main__":
    status = main()
    if status == ExitStatus.RESUMABLE:
        # All is closed, and somebody waits: taking down the libraries would take seconds, and one that was interrupted
        # in its import may fail at it.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)
