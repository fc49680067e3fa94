"""Tags that lead from a record back to the flow run and the branch behind it."""

from __future__ import annotations

import subprocess
from pathlib import Path

from sfgrpo.runtime.environment import Environment
from sfgrpo.tracking.provenance import flow_tags


def test_flow_run_and_branch_are_named_only_where_there_are_any(tmp_path: Path):
    def git(*arguments: str) -> str:
        who = ["-c", "user.name=A", "-c", "user.email=a@example.org"]
        command = ["git", *who, *arguments]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True).stdout.strip()

    assert flow_tags(Environment(), tmp_path) == {}
    git("init", "--quiet")
    git("commit", "--quiet", "--allow-empty", "--message", "First")
    git("branch", "runs/calm-owl")
    settings = {"SFGRPO_FLOW_RUN_ID": "f-1", "SFGRPO_FLOW_RUN_URL": "http://here/f-1", "SFGRPO_BRANCH": "runs/calm-owl"}
    assert flow_tags(Environment(**settings), tmp_path) == {
        "prefect.flow_run_id": "f-1",
        "prefect.flow_run_url": "http://here/f-1",
        "run_branch": "runs/calm-owl",
        "run_commit": git("rev-parse", "HEAD"),
    }
    assert "run_commit" not in flow_tags(Environment(**{**settings, "SFGRPO_BRANCH": "runs/none"}), tmp_path)
