"""Plumbing on real repositories: commits that nobody's settings shape, worktrees that survive interruptions."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tasks.git import GitError, add_worktree, commit_files, git, remove_worktree, top_folder


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "repository"
    folder.mkdir()
    git(folder, "init", "--quiet")
    (folder / "kept.txt").write_text("kept\n")
    (folder / "lock").write_text("old\n")
    git(folder, "add", "--all")
    git(folder, "-c", "user.name=A", "-c", "user.email=a@example.org", "commit", "--quiet", "-m", "First")
    # From here on there is nobody whose name git could take.
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    return folder


def test_commit_replaces_the_files_and_touches_neither_checkout_nor_branch(repository):
    head = git(repository, "rev-parse", "HEAD")
    (repository / "kept.txt").write_text("somebody's work\n")
    git(repository, "add", "kept.txt")
    commit = commit_files(repository, head, {"lock": "new\n", "added/file": "x"}, "Second\n\nRun: 7\n")
    assert git(repository, "show", f"{commit}:lock") == "new"
    assert git(repository, "show", f"{commit}:added/file") == "x"
    assert git(repository, "show", f"{commit}:kept.txt") == "kept"
    assert git(repository, "rev-parse", "HEAD", f"{commit}^").split() == [head, head]
    assert git(repository, "status", "--porcelain") == "M  kept.txt"
    assert (
        git(repository, "show", "--no-patch", "--format=%an %cn %B", commit).strip() == "sfgrpo sfgrpo Second\n\nRun: 7"
    )


def test_commit_with_the_time_of_its_parent_is_always_the_same(repository):
    commits = {commit_files(repository, "HEAD", {"lock": "new\n"}, "Same", same_time=True) for _ in range(2)}
    assert len(commits) == 1
    assert commit_files(repository, "HEAD", {"lock": "newer\n"}, "Same", same_time=True) not in commits


def test_worktree_stands_at_the_commit_and_goes_without_a_trace(repository):
    commit = commit_files(repository, "HEAD", {"lock": "new\n"}, "Second")
    folder = repository / ".worktrees/run"
    add_worktree(repository, folder, commit)
    assert (folder / "lock").read_text() == "new\n"
    assert top_folder(folder / ".") == folder
    (folder / "lock").write_text("changed")
    remove_worktree(repository, folder)
    assert not folder.exists()
    assert len(git(repository, "worktree", "list").splitlines()) == 1


@pytest.mark.parametrize("left", ["folder", "entry", "locked entry"])
def test_what_an_interrupted_making_left_is_no_obstacle(repository, left):
    folder = repository / ".worktrees/run"
    if left == "folder":
        folder.mkdir(parents=True)
        (folder / "half").write_text("half")
    else:
        add_worktree(repository, folder, "HEAD")
        if left == "locked entry":
            git(repository, "worktree", "lock", "--reason", "initializing", str(folder))
        (folder / ".git").unlink()
    add_worktree(repository, folder, "HEAD")
    assert (folder / "kept.txt").exists() and not (folder / "half").exists()
    assert git(folder, "status", "--porcelain") == ""


def test_hooks_and_foreign_git_variables_do_not_interfere(repository, monkeypatch):
    hook = repository / ".git/hooks/post-checkout"
    hook.parent.mkdir(exist_ok=True)
    hook.write_text("#!/bin/sh\nexit 1\n")
    hook.chmod(0o755)
    monkeypatch.setenv("GIT_DIR", "/nowhere")
    add_worktree(repository, repository / ".worktrees/run", "HEAD")


def test_refusal_is_told_in_the_words_of_git(repository):
    with pytest.raises(GitError, match=r"git rev-parse failed in .*bad revision"):
        git(repository, "rev-parse", "nobranch", "--")


def test_removing_what_is_not_there_does_nothing(repository):
    remove_worktree(repository, repository / ".worktrees/none")
    assert subprocess.run(["git", "fsck"], cwd=repository, capture_output=True).returncode == 0
