"""A copy of the pipeline around a stub of its command line, whose stages take no time and fail on demand."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from tests.support.paths import ROOT

DEFINITION = ("dvc.yaml", "params.yaml", "prefect.toml", ".dvcignore", ".gitignore", ".dvc/config")

STUB = """
import json, os, pathlib, sys

stage = sys.argv[1]
if stage == "prompts" and pathlib.Path("real_prompts").exists():
    from sfgrpo.cli import main

    sys.exit(main())
with open("calls.txt", "a") as calls:
    print(stage, file=calls)
print(f"stub runs {stage}", flush=True)
failure = pathlib.Path(f"fail_{stage}")
if failure.exists():
    print("PolicyError: the stub was told to fail", file=sys.stderr)
    sys.exit(int(failure.read_text()))

OUTPUTS = {
    "prompts": {f"data/prompts/{name}.jsonl": "{}\\n" for name in ("train", "validation", "evaluation")},
    "train": {
        "models/policy/training.json": pathlib.Path("params.yaml").read_text(),
        "reports/train/summary.json": json.dumps({"reward": 0.5}),
    },
    "evaluate": {
        "reports/evaluate/metrics.json": json.dumps({"after": {"overall": 0.5}}),
        "reports/evaluate/table.md": "| task | before | after |\\n|---|---|---|\\n| overall | 0.10 | 0.50 |\\n",
        "reports/evaluate/samples.png": "no picture",
    },
    "register": {"reports/registered.json": json.dumps({"name": "stub", "version": 7, "alias": "challenger"})},
    "promote": {"applied": " ".join(sys.argv[2:])} if "--apply" in sys.argv else {
        "judged": " ".join(sys.argv[2:]),
        "reports/promotion/report.md": "**Stub.** It was judged.\\n",
        "reports/promotion/decision.json": json.dumps({
            "model": "stub", "version": 7, "run_id": "r7", "promoted": not pathlib.Path("worse").exists()
        }),
    },
}
if stage == "train" and pathlib.Path("crash_once").exists():
    progress = pathlib.Path(".scratch/progress")
    progress.parent.mkdir(exist_ok=True)
    start = int(progress.read_text()) if progress.exists() else 0
    for update in range(start, 4):
        print(f"update {update} starting from {start}", flush=True)
        progress.write_text(str(update + 1))
        if start == 0 and update == 1:
            os._exit(137)
extra = pathlib.Path(f"extra_{stage}.py")
if extra.exists():
    exec(extra.read_text())
preempted = pathlib.Path(f"preempt_{stage}")
if preempted.exists():
    left = int(preempted.read_text()) - 1
    preempted.write_text(str(left)) if left else preempted.unlink()
    sys.exit(75)
for name, text in OUTPUTS[stage].items():
    path = pathlib.Path(name)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
"""


def read_definition() -> dict[str, Any]:
    """Read the project's dvc.yaml."""
    definition: dict[str, Any] = YAML(typ="safe").load(ROOT / "dvc.yaml")
    return definition


def build_stub_pipeline(folder: Path) -> None:
    """Make a git and DVC repository of the project's own definition and code, whose command line is the stub."""
    for name in DEFINITION:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, folder / name)
    shutil.copytree(ROOT / "sfgrpo", folder / "sfgrpo", ignore=shutil.ignore_patterns("__pycache__"))
    (folder / "sfgrpo/__main__.py").write_text(STUB)
    stages = read_definition()["stages"]
    # The outputs of frozen stages are files of the repository.
    shipped = {output for stage in stages.values() if stage.get("frozen") for output in outputs_of(stage)}
    made = {output for stage in stages.values() if not stage.get("frozen") for output in outputs_of(stage)}
    for dependency in {path for stage in stages.values() for path in stage["deps"]} - made | shipped:
        if not (path := folder / dependency).exists():
            path.mkdir(parents=True)
            (path / "content").touch()
    subprocess.run(["git", "init", "--quiet"], cwd=folder, check=True)


def outputs_of(stage: dict[str, Any]) -> list[str]:
    """List the outputs of a stage, with or without settings of their own."""
    return [name for output in stage["outs"] for name in ([output] if isinstance(output, str) else output)]


def stub_environment() -> dict[str, str]:
    """Return the environment in which `python` is this one, and tasks and flows are the project's."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    return {**os.environ, "PATH": path, "PYTHONPATH": str(ROOT)}


def calls(folder: Path) -> list[str]:
    """List the stages that the stub ran, in order, and forget them."""
    record = folder / "calls.txt"
    stages = record.read_text().split() if record.exists() else []
    record.unlink(missing_ok=True)
    return stages


def change_param(folder: Path, section: str, name: str, value: Any) -> None:
    """Change one value of params.yaml."""
    path = folder / "params.yaml"
    params = YAML(typ="safe").load(path)
    assert params[section][name] != value, "the test has to change the value"
    params[section][name] = value
    # JSON is YAML.
    path.write_text(json.dumps(params))
