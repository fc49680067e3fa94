"""The table of layers, which is the truth, and the imports that have to follow it."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.paths import ROOT

LAYERS = (
    (
        "words",
        {
            "types",
            "errors",
            "sections",
            "validation",
            "config",
            "batches",
            "environment",
            "status",
            "paths",
            "redaction",
        },
    ),
    (
        "tools",
        {
            "files",
            "random",
            "signals",
            "preemption",
            "rank",
            "provenance",
            "timing",
            "outbox",
            "memory",
            "distributed",
            "owner",
        },
    ),
    ("maths", {"schedule", "sde", "estimates", "gains", "advantages", "losses"}),
    ("adapters", {"policies", "rewards", "geneval", "shapes", "prompts", "bucket"}),
    ("steps", {"rollout", "scoring", "update", "guards", "evaluation", "promotion", "drift"}),
    (
        "run",
        {
            "ema",
            "learner",
            "checkpoint",
            "mirror",
            "tracking",
            "mlflow_store",
            "mlflow_tracking",
            "sweep",
            "retention",
            "registry",
            "serving",
            "versions",
            "ledger",
            "champion",
            "judgement",
            "mlflow_webhook",
            "trainer",
            "launcher",
            "progress",
            "report",
            "evaluation_store",
            "snapshots",
            "periodic",
            "packing",
            "pretrain",
            "pretrain_reward",
        },
    ),
    ("doors", {"assembly", "training", "aside", "stages", "contest", "promoting", "study", "commands", "__main__"}),
)
"""Members of a layer import lower layers; a folder counts as one member."""

SIBLINGS = {
    "validation": {"errors"},
    "sections": {"types"},
    "config": {"errors", "types", "sections", "validation"},
    "batches": {"config", "errors"},
    "environment": {"errors", "validation"},
    "provenance": {"files"},
    "timing": {"memory"},
    "advantages": {"gains"},
    "prompts": {"geneval", "shapes"},
    "rewards": {"geneval", "shapes"},
    "shapes": {"geneval"},
    "scoring": {"rollout"},
    "update": {"rollout", "scoring"},
    "evaluation": {"rollout", "scoring"},
    "learner": {"ema"},
    "snapshots": {"evaluation_store"},
    "periodic": {"evaluation_store", "snapshots", "report", "tracking"},
    "trainer": {"learner", "checkpoint", "tracking", "progress", "periodic"},
    "mirror": {"checkpoint", "snapshots"},
    "mlflow_tracking": {"mlflow_store", "tracking"},
    "sweep": {"mlflow_store", "mlflow_tracking"},
    "retention": {"mlflow_store", "mlflow_tracking"},
    "registry": {"mlflow_store", "serving"},
    "versions": {"registry"},
    "ledger": {"mlflow_store"},
    "mlflow_webhook": {"mlflow_store"},
    "champion": {"ledger", "registry", "versions"},
    "judgement": {"registry"},
    "training": {"assembly"},
    "contest": {"assembly"},
    "promoting": {"assembly", "contest"},
    "aside": {"assembly", "training"},
    "stages": {"assembly", "training"},
    "study": {"assembly", "__main__"},
    "commands": {"aside", "stages", "training", "sweep", "retention", "promoting"},
    "__main__": {"commands"},
}
"""Members of the same layer that a member may import all the same."""

MATHS_MAY_IMPORT = {"types", "errors"}
MATHS_LIBRARIES = {"torch", "jaxtyping"}

OWNERS = {
    "mlflow": {
        "sfgrpo.tracking.mlflow_client",
        "sfgrpo.tracking.mlflow_tracker",
        "sfgrpo.registry.register",
        "sfgrpo.registry.serving",
        "sfgrpo.tracking.stale_runs",
        "sfgrpo.storage.retention",
        # They handle MLflow's refusals, each of which means something else to them.
        "sfgrpo.registry.versions",
        "sfgrpo.promotion.history",
        "sfgrpo.promotion.aliases",
        "sfgrpo.promotion.decision",
        "sfgrpo.promotion.compare",
        "sfgrpo.commands.promote",
    },
    "prefect": {"tasks", "flows"},
    "boto3": {"sfgrpo.storage.s3"},
    "dvc": set(),
    "pickle": set(),
}
"""Libraries with the only modules and packages that may import them."""

HEAVY = {"torch", "diffusers", "transformers", "peft"}


def modules(*packages: str) -> list[Path]:
    return sorted(path for package in packages for path in (ROOT / package).rglob("*.py"))


def name_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports_of(path: Path) -> Iterator[str]:
    """Lists what a module imports anywhere in it, with dotted names; `from a import b` counts as a.b."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno} imports by relative path; write the whole name"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def member(name: str) -> str | None:
    """Gives the first part below sfgrpo: of sfgrpo.rewards.geneval.score it is rewards."""
    parts = name.split(".")
    return parts[1] if parts[0] == "sfgrpo" and len(parts) > 1 else None


def layer_of(name: str) -> int:
    for number, (_, members) in enumerate(LAYERS):
        if name in members:
            return number
    raise AssertionError(f"sfgrpo/{name} is in no layer; add it to the table in {'tests/test_imports.py'}")


def complaints(importer: str, imported: str) -> Iterator[str]:
    """Says why `importer`, a dotted module name, must not import `imported`."""
    library, here, there = imported.split(".")[0], member(importer), member(imported)
    if importer.startswith("sfgrpo") and library in ("tasks", "flows"):
        yield f"{importer} imports {imported}, but the library knows nothing of who runs it"
    if library in OWNERS and not any(f"{importer}.".startswith(f"{owner}.") for owner in OWNERS[library]):
        yield f"{importer} imports {library}; only {sorted(OWNERS[library]) or 'nobody'} may"
    if library in HEAVY and not importer.startswith("sfgrpo."):
        yield f"{importer} imports {library}; a stage runs in a process of its own, which alone needs it"
    if here is None:
        return
    if LAYERS[layer_of(here)][0] == "maths":
        ours = library == "sfgrpo" and there in MATHS_MAY_IMPORT | SIBLINGS.get(here, set())
        if not ours and library not in MATHS_LIBRARIES | sys.stdlib_module_names:
            yield f"{importer} is maths and imports {imported}"
    foreign = there is not None and there != here and there not in SIBLINGS.get(here, set())
    if foreign and layer_of(there) >= layer_of(here):
        yield f"{importer} ({LAYERS[layer_of(here)][0]}) imports {imported} ({LAYERS[layer_of(there)][0]})"


@pytest.mark.parametrize("path", modules("sfgrpo", "tasks", "flows"), ids=name_of)
def test_imports_follow_the_table(path):
    found = [complaint for imported in imports_of(path) for complaint in complaints(name_of(path), imported)]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("importer", "imported"),
    [
        ("sfgrpo.training.trainer", "tasks.train"),
        ("sfgrpo.training.trainer", "mlflow.tracking"),
        ("sfgrpo.commands.evaluate", "prefect"),
        ("tasks.train", "mlflow"),
        ("tasks.train", "torch"),
        ("sfgrpo.grpo.sde", "sfgrpo.config.stages.TrainStage"),
        ("sfgrpo.grpo.sde", "numpy"),
        ("sfgrpo.grpo.rollout", "sfgrpo.training.trainer"),
        ("sfgrpo.grpo.rollout", "sfgrpo.grpo.update"),
        ("sfgrpo.checkpoint.state", "pickle"),
    ],
)
def test_forbidden_imports_are_found(importer, imported):
    assert list(complaints(importer, imported))


@pytest.mark.parametrize(
    ("importer", "imported"),
    [
        ("sfgrpo.tracking.mlflow_tracker", "mlflow"),
        ("tasks.train", "prefect"),
        ("flows.train_policy", "prefect.flow"),
        ("sfgrpo.rewards.geneval", "sfgrpo.rewards.base.AbstractReward"),
        ("sfgrpo.training.trainer", "sfgrpo.grpo.rollout.roll_out"),
        ("sfgrpo.grpo.sde", "math"),
        ("sfgrpo.prefectly", "dvclive"),
    ],
)
def test_allowed_imports_are_let_through(importer, imported, monkeypatch):
    monkeypatch.setitem(SIBLINGS, "prefectly", set())
    monkeypatch.setattr(sys.modules[__name__], "LAYERS", (*LAYERS, ("extra", {"prefectly"})))
    assert not list(complaints(importer, imported))


def test_module_outside_the_table_is_reported():
    with pytest.raises(AssertionError, match="sfgrpo/helpers is in no layer; add it to the table"):
        list(complaints("sfgrpo.helpers", "sfgrpo.types"))


def test_every_module_says_in_one_line_what_it_is_for():
    silent = [
        name_of(path)
        for path in modules("sfgrpo", "tasks", "flows")
        if path.stat().st_size and not ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
    ]
    assert not silent


def test_import_is_fast_and_light():
    code = (
        "import sys, time; start = time.perf_counter(); import sfgrpo; print(time.perf_counter() - start);"
        "print(*{name.split('.')[0] for name in sys.modules})"
    )
    output = subprocess.check_output([sys.executable, "-c", code], cwd=ROOT, text=True)
    seconds, loaded = output.splitlines()
    assert float(seconds) < 1
    assert not set(loaded.split()) & (HEAVY | {"mlflow", "prefect"})
