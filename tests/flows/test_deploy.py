"""Deploying without a server: what is told; and what prefect.yaml promises."""

from __future__ import annotations

import re
import zoneinfo

import pytest
from prefect.settings import PREFECT_API_URL, temporary_settings
from ruamel.yaml import YAML

from flows.deploy import POOL, main
from tests.support.stub_pipeline import ROOT

# Not ours to mend: Prefect's own deprecations.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

DEPLOYMENTS = YAML(typ="safe").load(ROOT / "prefect.yaml")["deployments"]


def test_without_an_address_nothing_is_deployed(capsys):
    with temporary_settings(restore_defaults={PREFECT_API_URL}):
        assert main([]) == 2
    assert capsys.readouterr().err.startswith("error: PREFECT_API_URL is not set; start the services")


def test_server_that_is_away_is_told_in_one_sentence(capsys):
    with temporary_settings({PREFECT_API_URL: "http://127.0.0.1:9/api"}):
        assert main([]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert re.fullmatch(r"error: PREFECT_API_URL http://127\.0\.0\.1:9/api does not answer \(.*\); start the .*", line)


@pytest.mark.parametrize("deployment", DEPLOYMENTS, ids=lambda deployment: deployment["entrypoint"])
def test_deployments_are_described_wait_in_line_and_start_nothing_by_surprise(deployment):
    path, _, function = deployment["entrypoint"].partition(":")
    assert f"def {function}(" in (ROOT / path).read_text()
    assert deployment["work_pool"]["name"] == POOL
    assert deployment["concurrency_limit"] == {"limit": 1, "collision_strategy": "ENQUEUE"}
    assert len(deployment["description"]) > 80 and deployment["tags"]
    for schedule in deployment.get("schedules", []):
        assert schedule["active"] is False
        zoneinfo.ZoneInfo(schedule["timezone"])
