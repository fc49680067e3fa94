"""Entry point of `python -m sfgrpo`."""

import os
import sys

from sfgrpo.runtime.startup import leave_when_told

leave_when_told()

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
