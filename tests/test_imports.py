"""Which folder may import which, and which libraries."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.paths import ROOT

ORDER = (
    ("types", "errors", "paths"),
    ("config", "policies", "geneval"),
    ("runtime", "shapes"),
    ("rewards", "tracking", "prompts", "checkpoint", "preflight"),
    ("grpo", "storage", "registry", "factory", "prompt_checks"),
    ("evaluation",),
    ("training", "promotion", "pretraining"),
    ("commands",),
    ("study",),
    ("cli",),
    ("__main__",),
)
"""Folders and modules of `sfgrpo`, lowest first: each imports only what stands in an earlier line."""

MATHS = {"sde", "estimates", "gains", "advantages", "losses"}
"""Modules of `grpo` that are formulas only."""
MATHS_LIBRARIES = {"torch", "jaxtyping"}

OWNERS = {
    "mlflow": {
        "sfgrpo.tracking",
        "sfgrpo.registry",
        "sfgrpo.storage.retention",
        # They handle MLflow's refusals, each of which means something else to them.
        "sfgrpo.promotion",
        "sfgrpo.commands",
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
    """Return the folder or module directly below sfgrpo: of sfgrpo.rewards.geneval.score it is rewards."""
    parts = name.split(".")
    return parts[1] if parts[0] == "sfgrpo" and len(parts) > 1 else None


def level_of(name: str) -> int:
    """Return the line of `ORDER` that a folder or module stands in."""
    for level, members in enumerate(ORDER):
        if name in members:
            return level
    raise AssertionError(f"sfgrpo/{name} has no place; add it to ORDER in tests/test_imports.py")


def complaints(importer: str, imported: str) -> Iterator[str]:
    """Yield the reasons why `importer`, a dotted module name, must not import `imported`."""
    library, here, there = imported.split(".")[0], member(importer), member(imported)
    if importer.startswith("sfgrpo") and library in ("tasks", "flows"):
        yield f"{importer} imports {imported}, but the library does not know who runs it"
    if library in OWNERS and not any(f"{importer}.".startswith(f"{owner}.") for owner in OWNERS[library]):
        yield f"{importer} imports {library}; only {sorted(OWNERS[library]) or 'nobody'} may"
    if library in HEAVY and not importer.startswith("sfgrpo."):
        yield f"{importer} imports {library}; only the stages, which run in processes of their own, need it"
    if here is None:
        return
    if here == "grpo" and importer.split(".")[2] in MATHS:
        ours = imported.startswith(("sfgrpo.types.", "sfgrpo.errors.", *(f"sfgrpo.grpo.{name}." for name in MATHS)))
        if not ours and library not in MATHS_LIBRARIES | sys.stdlib_module_names:
            yield f"{importer} is maths and imports {imported}"
    if there not in (None, here) and level_of(there) >= level_of(here):
        yield f"{importer} imports {imported}, which stands no lower in ORDER"


@pytest.mark.parametrize("path", modules("sfgrpo", "tasks", "flows"), ids=name_of)
def test_imports_follow_the_order(path):
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
        ("sfgrpo.evaluation.evaluate", "sfgrpo.training.run"),
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
        ("sfgrpo.rewards.geneval", "sfgrpo.rewards.base.Reward"),
        ("sfgrpo.training.trainer", "sfgrpo.grpo.rollout.roll_out"),
        ("sfgrpo.grpo.sde", "math"),
        ("sfgrpo.storage.mirror", "dvclive"),
    ],
)
def test_allowed_imports_pass(importer, imported):
    assert not list(complaints(importer, imported))


def test_tests_import_of_one_another_only_what_supports_them():
    found = [
        f"{name_of(path)} imports {imported}"
        for path in modules("tests")
        for imported in imports_of(path)
        if imported.startswith("tests.") and not imported.startswith("tests.support.")
    ]
    assert not found, "\n".join(found)


def test_folder_without_a_place_is_reported():
    with pytest.raises(AssertionError, match="sfgrpo/helpers has no place; add it to ORDER"):
        list(complaints("sfgrpo.helpers.text", "sfgrpo.types.Prompt"))


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


def test_commands_load_no_heavy_library_before_they_run():
    """So that help, wrong parameters and absent files cost no seconds."""
    names = [name_of(path) for path in modules("sfgrpo/commands")]
    code = (
        f"import {', '.join(['sfgrpo.cli', 'sfgrpo.training.run', 'sfgrpo.factory', *names])}, sys; print(*sys.modules)"
    )
    loaded = subprocess.check_output([sys.executable, "-c", code], cwd=ROOT, text=True).split()
    assert not set(loaded) & (HEAVY | {"accelerate", "cv2", "matplotlib", "mlflow", "pandas"})
