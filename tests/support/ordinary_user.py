"""Commands as an ordinary user, for tests that root runs."""

from __future__ import annotations

import itertools
import os
import pwd
import shlex
import sys
from collections.abc import Iterable
from pathlib import Path

from tests.support.paths import ROOT

USER = "nobody"
NEEDED = (ROOT, Path(sys.prefix), Path(sys.base_prefix), (ROOT / ".venv-s3").resolve())
"""What every program of ours reads."""


def as_ordinary_user() -> list[str]:
    """Return the start of a command line that runs the rest as `nobody`; empty for who is no root.

    The checkout or Python may lie in a folder that only root enters, such as its home. The command sees such a folder
    as an empty one that has nothing but these two.
    """
    if os.geteuid() != 0:
        return []
    script = "\n".join(["set -eu", "mount -t tmpfs -o mode=700 tmpfs /mnt", *_uncovered(NEEDED), 'exec "$@"'])
    user = pwd.getpwnam(USER)
    drop = ["setpriv", f"--reuid={user.pw_uid}", f"--regid={user.pw_gid}", "--clear-groups", "--"]
    return ["unshare", "--mount", "sh", "-c", script, "sh", *drop]


def _uncovered(needed: Iterable[Path]) -> list[str]:
    """Return the shell commands that replace closed folders, each by one with the needed ones in it."""
    closed: dict[Path, list[Path]] = {}
    for path in needed:
        for parent in reversed(path.parents):
            if not parent.stat().st_mode & 0o001:
                closed.setdefault(parent, []).append(path)
                break
    commands = []
    numbers = itertools.count()
    for parent, paths in closed.items():
        held = {path: f"/mnt/{next(numbers)}" for path in paths}
        commands += [f"mkdir {place} && mount --bind {shlex.quote(str(path))} {place}" for path, place in held.items()]
        commands.append(f"mount -t tmpfs -o mode=755 tmpfs {shlex.quote(str(parent))}")
        for path, place in held.items():
            commands.append(f"mkdir -p {shlex.quote(str(path))} && mount --bind {place} {shlex.quote(str(path))}")
    return commands
