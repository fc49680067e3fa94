"""Compare the trained policy with the base model on GenEval."""

from __future__ import annotations

import functools
import json
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from sfgrpo.config.stages import EvaluateStage
from sfgrpo.factory import check_pretrained, make_policy, make_reward, use_threads
from sfgrpo.paths import EVALUATE_REPORT, EVALUATION_PROMPTS, POLICY
from sfgrpo.prompts import read_prompts
from sfgrpo.runtime.environment import Environment
from sfgrpo.runtime.files import atomic_directory
from sfgrpo.types import Prompt

if TYPE_CHECKING:
    from sfgrpo.evaluation.evaluate import Evaluation


def evaluate(config: EvaluateStage, environment: Environment) -> None:
    """Evaluate base model and trained policy on the same prompts and noise; write table, metrics and images."""
    from sfgrpo.evaluation.evaluate import evaluate_policy, protocol_of
    from sfgrpo.rewards import build_reward, distinct_rewards
    from sfgrpo.tracking.image_archive import add_images
    from sfgrpo.tracking.sample_grid import pick_rows

    rewards = distinct_rewards(make_reward(config.reward), build_reward("likeness"))
    check_pretrained(config.policy)
    use_threads(environment)
    prompts = read_prompts(EVALUATION_PROMPTS)
    policy = make_policy(config.policy, config.seed, environment)
    protocol, shown = protocol_of(config.evaluation), pick_rows(prompts)
    with atomic_directory(EVALUATE_REPORT) as partial:
        with tarfile.open(partial / "images.tar", "w", format=tarfile.USTAR_FORMAT) as tar:

            def evaluated(model: str) -> Evaluation:
                pack = functools.partial(add_images, tar, model, prompts, protocol.images_per_prompt)
                return evaluate_policy(policy, prompts, rewards, protocol, shown=shown, on_images=pack)

            base = evaluated("base")
            policy.load_adapter(POLICY / "adapter")
            trained = evaluated("policy")
        summary = _write_report(partial, prompts, shown, base, trained)
    print(f"{summary}; samples in {EVALUATE_REPORT / 'samples.png'}")


def _write_report(
    folder: Path, prompts: Sequence[Prompt], shown: Sequence[int], base: Evaluation, trained: Evaluation
) -> str:
    """Write metrics, table and sample grid of both models; return the table and the gain as text."""
    from sfgrpo.geneval.table import markdown_table
    from sfgrpo.tracking.sample_grid import sample_grid

    models = {"base model": base, "trained policy": trained}
    table = markdown_table({name: evaluation.table for name, evaluation in models.items()})
    before, after = base.to_dict(), trained.to_dict()
    gain = after["geneval/overall"] - before["geneval/overall"]
    report = {"base": before, "policy": after, "gain": {"geneval/overall": gain}}
    (folder / "metrics.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    (folder / "table.md").write_text(table + "\n", encoding="utf-8")
    images = {name: evaluation.images for name, evaluation in models.items()}
    correct = {name: evaluation.correct for name, evaluation in models.items()}
    sample_grid(prompts, images, correct, shown).save(folder / "samples.png")
    return f"{table}\n\nGenEval overall {gain:+.3f}"
