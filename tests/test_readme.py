"""Links lead somewhere, commands exist, every metric has its line."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest

from sfgrpo.cli import main
from sfgrpo.types import TAGS
from tests.support.metrics_page import METRICS, documented
from tests.support.tiny_run import ROOT, TINY, build_tiny_project, inside, write_params

# Not ours to mend: deprecations of diffusers and of what it imports.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")

PAGES = (
    "README.md",
    "CONTRIBUTING.md",
    "CHANGELOG.md",
    "docs/full_scale.md",
    "docs/performance.md",
    "docs/metrics.md",
    "docs/training.md",
    "docs/platform.md",
    "docs/prompts.md",
    "docs/results.md",
    "docs/detector.md",
    "data/shapes_labels/README.md",
    "infra/README.md",
    "infra/terraform/README.md",
)
PLACEHOLDERS = {
    "<kk>": r"\d\d",
    "<task>": f"(?:{'|'.join(TAGS)})",
    "<reward>": "[a-z_]+",
    "<phase>": "(?:rollout|estimates|decode|reward|update)",
    "<metric>": ".+",
}


def links(page: str) -> list[str]:
    """List the targets of the links of a page, without other sites and places on the page itself."""
    text = re.sub(r"```.*?```", "", (ROOT / page).read_text(encoding="utf-8"), flags=re.DOTALL)
    targets = re.findall(r"\]\(([^)\s]+)\)", text)
    return [target.partition("#")[0] for target in targets if not re.match(r"[a-z]+:|#", target)]


def pattern(key: str) -> re.Pattern[str]:
    parts = re.split(r"(<\w+>)", key)
    return re.compile("".join(PLACEHOLDERS[part] if part in PLACEHOLDERS else re.escape(part) for part in parts))


@pytest.fixture(scope="module")
def logged(tmp_path_factory: pytest.TempPathFactory) -> set[str]:
    """Return the metric keys of two trainings, one of them in float16, which has some of its own."""
    folder = tmp_path_factory.mktemp("tiny")
    build_tiny_project(folder)
    keys: set[str] = set()
    for dtype in ("float32", "float16"):
        write_params(folder, {**TINY, "policy.dtype": dtype, "update.ratio_tolerance": 1.0})
        with inside(folder) as tracker:
            assert main(["train"]) == 0
        keys |= set(tracker.metrics)
    return keys


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    missing = [target for target in links(page) if not ((ROOT / page).parent / target).exists()]
    assert not missing


def test_every_page_is_checked():
    found = {
        str(path.relative_to(ROOT))
        for pattern in ("*.md", "docs/**/*.md", "infra/**/*.md", "data/shapes*/*.md")
        for path in ROOT.glob(pattern)
    }
    assert found == set(PAGES)


@pytest.mark.parametrize("command", ["make bench", "make demo", "make stack", "make test"])
def test_readme_names_the_commands(command):
    assert command in (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.mark.slow
def test_update_of_the_readme_runs():
    code = re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), flags=re.DOTALL)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "SFGRPO_DEVICE": "cpu"}
    output = subprocess.check_output([sys.executable, "-c", code[1]], cwd=ROOT, env=environment, text=True)
    reward, clip_fraction = map(float, output.split())
    assert 0 < reward < 1
    assert 0 <= clip_fraction < 1


@pytest.mark.parametrize("page", PAGES)
def test_targets_of_make_exist(page):
    targets = set(re.findall(r"^([a-z0-9-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE))
    code = re.findall(r"```.*?```|`[^`]+`", (ROOT / page).read_text(encoding="utf-8"), flags=re.DOTALL)
    named = {target for piece in code for target in re.findall(r"\bmake ([a-z0-9-]+)", piece)}
    assert named <= targets


def test_every_logged_metric_has_one_line(logged):
    keys = documented()
    lines = {metric: [key for key in keys if pattern(key).fullmatch(metric)] for metric in logged}
    assert {metric: found for metric, found in lines.items() if len(found) != 1} == {}


def test_every_line_is_of_a_metric_that_is_logged(logged):
    # What registration and promotion log is tested with them; the tiny model draws no correct image to agree on.
    others = ("final/", "promotion/", "time/promotion", "recheck/", "agreement/share")
    keys = [key for key in documented() if not key.startswith(others)]
    assert [key for key in keys if not any(pattern(key).fullmatch(metric) for metric in logged)] == []
    assert len(set(documented())) == len(documented())


def test_terminal_credit_logs_what_the_page_says(tmp_path):
    build_tiny_project(tmp_path)
    write_params(tmp_path, {**TINY, "advantage.credit": "terminal"})
    with inside(tmp_path) as tracker:
        assert main(["train"]) == 0
    stepwise = [
        line.split("`")[1]
        for line in METRICS.read_text(encoding="utf-8").splitlines()
        if line.endswith("stepwise credit only |")
    ]
    assert len(stepwise) == 4
    assert not [metric for metric in tracker.metrics for key in stepwise if pattern(key).fullmatch(metric)]
    assert "reward/mean" in tracker.metrics
