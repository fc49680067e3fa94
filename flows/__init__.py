"""Prefect flows: which tasks run, and in which order."""

import sys

if sys.argv[0] == "-m":
    # A flow is about to run as a program, `python -m flows.NAME`, and Prefect takes seconds to load.
    from sfgrpo.runtime.startup import leave_when_told

    leave_when_told()
