"""The flow of a promotion against a real Prefect server: judged, approved or refused by a person, applied."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import pytest
from prefect import get_client
from prefect.client.schemas.filters import FlowRunFilter
from prefect.flow_runs import resume_flow_run

from flows import promote as module
from flows.promote import promote
from tasks import promotion, stages
from tasks.promotion import promote_version
from tasks.stages import StageError
from tests.support.stub_pipeline import build_stub_pipeline, calls

# Not ours to mend: Prefect's own deprecations and unclosed sockets.
pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning"),
]


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    build_stub_pipeline(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(module, "POLL_S", 1)
    for task in (stages.prompts, promotion.decide, promotion.apply):
        monkeypatch.setattr(task, "retry_delay_seconds", 0)
    return tmp_path


def answering(answer: dict[str, Any], waited: list[str]) -> threading.Thread:
    """Answer the next run that waits for a person."""

    def answer_it() -> None:
        paused = FlowRunFilter.model_validate({"state": {"type": {"any_": ["PAUSED"]}}})
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline:
            with get_client(sync_client=True) as client:
                runs = client.read_flow_runs(flow_run_filter=paused)
            if runs:
                waited.append(runs[0].name)
                resume_flow_run(runs[0].id, run_input=answer)
                return
            time.sleep(0.5)

    thread = threading.Thread(target=answer_it)
    thread.start()
    return thread


def artifacts() -> dict[str | None, Any]:
    with get_client(sync_client=True) as client:
        return {artifact.key: artifact.data for artifact in client.read_artifacts()}


def test_candidate_that_passes_is_applied_by_the_run_of_its_decision(prefect_server, project):
    decision = promote(model="stub", version=7)
    assert (decision["run_id"], decision["promoted"]) == ("r7", True)
    assert calls(project) == ["prompts", "promote", "promote"]
    assert (project / "judged").read_text() == "--judge-only --model stub --version 7"
    assert (project / "applied").read_text() == "--apply r7"
    assert artifacts()["promotion"] == "**Stub.** It was judged.\n"


def test_link_leads_to_the_version_at_the_server(prefect_server, project, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://mlflow.example:5000/")
    promote()
    assert "(http://mlflow.example:5000/#/models/stub/versions/7)" in artifacts()["promotion-version"]
    assert (project / "judged").read_text() == "--judge-only"


def test_candidate_that_is_refused_is_not_applied(prefect_server, project):
    (project / "worse").touch()
    assert not promote()["promoted"]
    assert not (project / "applied").exists()


def test_refused_candidate_needs_no_approval(prefect_server, project):
    (project / "worse").touch()
    assert not promote(approval=True)["promoted"]


@pytest.mark.parametrize("approve", [True, False])
def test_person_has_the_last_word(prefect_server, project, approve):
    waited: list[str] = []
    thread = answering({"approve": approve, "reason": "seen the samples"}, waited)
    promote(approval=True)
    thread.join()
    assert len(waited) == 1
    assert (project / "applied").exists() == approve


def test_failure_of_the_command_is_the_failure_of_the_flow(prefect_server, project):
    (project / "fail_promote").write_text("1")
    with pytest.raises(StageError, match="PolicyError: the stub was told to fail"):
        promote()
    assert calls(project) == ["prompts", *["promote"] * 3]


def test_other_flows_promote_what_they_registered(prefect_server, project):
    from prefect import flow

    assert flow(promote_version)(version=7)["promoted"]
    assert (project / "applied").read_text() == "--apply r7"
