"""Plumbing on real repositories: commits that nobody's settings shape, worktrees that survive interruptions."""

from __future__ import annotations

import runpy
import subprocess
from pathlib import Path

import pytest

from sfgrpo.errors import ConfigError
from sfgrpo.preflight.checkout import find_checkout
from tasks.git import GitError, add_worktree, commit_files, git, remove_worktree
from tests.support.tiny_run import write_params

# Prefect's own, and that of running a module that other tests have imported.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::RuntimeWarning")


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
    assert find_checkout(folder / ".") == folder
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


def git_answering(monkeypatch: pytest.MonkeyPatch, folder: Path, message: str) -> None:
    """Put a git before the real one that fails with a message."""
    program = folder / "bin/git"
    program.parent.mkdir()
    program.write_text(f"#!/bin/sh\necho '{message}' >&2\nexit 128\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:/usr/bin:/bin")


def test_folder_of_a_zip_file_is_named_with_the_cure(tmp_path):
    with pytest.raises(
        ConfigError, match=rf"^{tmp_path} is no git checkout, as after the download of a ZIP file"
    ) as told:
        find_checkout(tmp_path)
    assert f"or run `git -C {tmp_path} init` and `git -C {tmp_path} add --all && git -C {tmp_path} commit" in str(
        told.value
    )


def test_repository_without_a_commit_is_named_with_the_cure(tmp_path):
    git(tmp_path, "init", "--quiet")
    with pytest.raises(ConfigError, match=rf"^the git repository of {tmp_path} has no commit, and every version names"):
        find_checkout(tmp_path)


def test_worktree_whose_repository_is_gone_is_named_with_the_cure(tmp_path):
    (tmp_path / ".git").write_text("gitdir: /nowhere/.git/worktrees/x\n")
    with pytest.raises(ConfigError, match=r"was a worktree or submodule whose repository is gone; get .* `git clone`"):
        find_checkout(tmp_path)


def test_folder_of_another_user_is_named_with_the_cure(tmp_path, monkeypatch):
    git_answering(monkeypatch, tmp_path, f"fatal: detected dubious ownership in repository at {tmp_path}")
    with pytest.raises(ConfigError, match=f"`git config --global --add safe.directory {tmp_path}`"):
        find_checkout(tmp_path)


def test_machine_without_git_is_named_with_the_cure(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ConfigError, match=r"^git is not installed, and DVC and the flows need it; install the package"):
        find_checkout(tmp_path)


def test_other_refusals_of_git_keep_its_words(tmp_path, monkeypatch):
    git_answering(monkeypatch, tmp_path, "fatal: this operation must be run in a work tree")
    with pytest.raises(
        ConfigError, match=r"git fails in .* .fatal: this operation must be run in a work tree.; correct that"
    ):
        find_checkout(tmp_path)


@pytest.mark.parametrize("flow", ["train_policy", "promote", "study", "close_stale_runs"])
def test_flows_refuse_a_folder_without_git_before_prefect_starts(tmp_path, monkeypatch, flow):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PREFECT_API_URL", "http://127.0.0.1:1/api")
    with pytest.raises(SystemExit, match="is no git checkout"):
        runpy.run_module(f"flows.{flow}", run_name="__main__")


def test_flow_refuses_a_wrong_name_before_anything_is_trained(tmp_path, monkeypatch):
    git(tmp_path, "init", "--quiet")
    write_params(tmp_path, {"registry.alias": "latest"})
    git(tmp_path, "add", "--all")
    git(tmp_path, "-c", "user.name=A", "-c", "user.email=a@example.org", "commit", "--quiet", "-m", "First")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match=r"params\.yaml: registry\.alias: 'latest' is a word that MLflow keeps"):
        runpy.run_module("flows.train_policy", run_name="__main__")
