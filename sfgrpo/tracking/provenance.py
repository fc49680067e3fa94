"""Tags that identify the code and data of a run."""

from __future__ import annotations

import subprocess
from pathlib import Path

from sfgrpo.runtime.environment import Environment
from sfgrpo.runtime.manifest import sha256_of_file
from sfgrpo.runtime.redaction import without_credentials

BRANCH_TAG = "run_branch"
COMMIT_TAG = "run_commit"


def provenance_tags(root: Path, prompts: Path) -> dict[str, str]:
    """Return the tags of the code and the digest of the prompt file."""
    return code_tags(root) | {"prompts_sha256": sha256_of_file(prompts)}


def code_tags(root: Path) -> dict[str, str]:
    """Return the commit, whether tracked files differ from it, and the digest of `dvc.lock`.

    A changed `dvc.lock` is no difference, because the pipeline itself rewrites it.
    """
    commit = _git(root, "rev-parse", "HEAD")
    changes = _git(root, "status", "--porcelain", "--untracked-files=no", "--", ".", ":!dvc.lock")
    tags = {
        "git_commit": commit or "unknown",
        "git_dirty": "unknown" if changes is None else str(bool(changes)).lower(),
    }
    lock = root / "dvc.lock"
    return tags | {"dvc_lock_sha256": sha256_of_file(lock)} if lock.exists() else tags


def flow_tags(environment: Environment, root: Path) -> dict[str, str]:
    """Return the Prefect flow run that started this process and the git branch for its results, where there are any."""
    commit = None if environment.branch is None else _git(root, "rev-parse", "--verify", "--quiet", environment.branch)
    named = {
        "prefect.flow_run_id": environment.flow_run_id,
        "prefect.flow_run_url": without_credentials(environment.flow_run_url or "") or None,
        BRANCH_TAG: environment.branch,
        COMMIT_TAG: commit,
    }
    return {name: value for name, value in named.items() if value is not None}


def _git(root: Path, *arguments: str) -> str | None:
    try:
        answer = subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return answer.stdout.strip()
