"""Compare the best and the last adapter of a training with the base model on GenEval."""

from __future__ import annotations

import dataclasses
import functools
import json
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from sfgrpo.config.schema import PolicyConfig, RewardConfig
from sfgrpo.config.stages import EvaluateStage
from sfgrpo.errors import MismatchError
from sfgrpo.evaluation.identity import EVALUATED, EvaluationIdentity, drawing_protocol, reward_identity
from sfgrpo.factory import (
    base_of,
    check_pretrained,
    make_policy,
    make_reward,
    make_text_encoders,
    policy_of,
    use_threads,
)
from sfgrpo.paths import EVALUATE_REPORT, EVALUATION_PROMPTS, POLICY
from sfgrpo.preflight.devices import check_devices
from sfgrpo.prompt_checks import check_prompts
from sfgrpo.prompts import prompts_digest, read_prompt_file, read_prompts
from sfgrpo.runtime.environment import Environment
from sfgrpo.runtime.files import atomic_directory
from sfgrpo.runtime.imports import without_collection
from sfgrpo.types import Prompt

if TYPE_CHECKING:
    from sfgrpo.evaluation.evaluate import Evaluation
    from sfgrpo.policies.adapter import Adapter
    from sfgrpo.rewards import Reward
    from sfgrpo.training.published import PublishedPolicy, TrainingRecord

HELD_OUT = RewardConfig(name="likeness")
"""Reward that is reported beside the one that was trained on."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Models:
    """The evaluations of the three models."""

    base: Evaluation
    last: Evaluation
    best: Evaluation


def evaluate(config: EvaluateStage, environment: Environment) -> None:
    """Evaluate base model, last and best adapter on the same prompts and noise; write table, metrics and images.

    Raises:
        ConfigError: The training, its prompts or its base model are absent or others than it names.
        AdapterError: An adapter is damaged, or the best one changes nothing.
    """
    with without_collection():
        from sfgrpo.evaluation.evaluate import evaluate_policy, protocol_of
        from sfgrpo.rewards import build_reward, distinct_rewards
        from sfgrpo.tracking.image_archive import add_images
        from sfgrpo.tracking.sample_grid import pick_rows
        from sfgrpo.training.published import read_published

    check_devices(environment)
    check_pretrained(config.policy)
    published = read_published(POLICY)
    prompts = _read_prompts(published.record)
    policy_config = policy_of(published.adapter, config.policy)
    identity = _identity(config, policy_config, published.adapter, prompts)
    # After the files, since a reward may have a model of gigabytes.
    rewards = distinct_rewards(make_reward(config.reward), build_reward(HELD_OUT.name))
    _check_prompts(policy_config, (build_reward("geneval_correct"), *rewards))
    use_threads(environment)
    policy = make_policy(policy_config, config.seed, environment)
    protocol = protocol_of(config.evaluation)
    shown = pick_rows(prompts, seed=protocol.seed)
    with atomic_directory(EVALUATE_REPORT) as partial:
        with tarfile.open(partial / "images.tar", "w", format=tarfile.USTAR_FORMAT) as tar:

            def evaluated(model: str) -> Evaluation:
                pack = functools.partial(add_images, tar, model, prompts, protocol.images_per_prompt)
                return evaluate_policy(policy, prompts, rewards, protocol, shown=shown, on_images=pack)

            def trained(model: str, adapter: Adapter) -> Evaluation:
                policy.load_adapter(adapter.path.parent)
                return evaluated(model)

            base = evaluated("base")
            last = None if published.last_is_best else trained("last", published.last)
            best = trained("policy", published.adapter)
        models = Models(base=base, last=last or best, best=best)
        summary = _write_report(partial, prompts, shown, models, identity, published)
    print(f"{summary}; samples in {EVALUATE_REPORT / 'samples.png'}")


def _read_prompts(record: TrainingRecord) -> list[Prompt]:
    """Read the evaluation prompts; refuse others than the training kept out, some of which it may have used."""
    prompts = read_prompts(EVALUATION_PROMPTS)
    if (found := prompts_digest(prompts)) != record.evaluation_prompts_sha256:
        raise MismatchError(
            f"{EVALUATION_PROMPTS} has the digest {found}, and the training of {POLICY} kept out the prompts "
            f"{record.evaluation_prompts_sha256} and may have used others; train again with these kept out by "
            "`python -m sfgrpo train`, or write those again by `python -m sfgrpo prompts`"
        )
    return prompts


def _check_prompts(policy: PolicyConfig, judges: Sequence[Reward]) -> None:
    """Refuse evaluation prompts that cannot be drawn, judged or counted; an overlap is refused by the training."""
    encoders = make_text_encoders(policy.pretrained, policy.revision, policy.max_sequence_length)
    check_prompts(read_prompt_file(EVALUATION_PROMPTS), judges, encoders=encoders)


def _identity(
    config: EvaluateStage, policy: PolicyConfig, adapter: Adapter, prompts: Sequence[Prompt]
) -> EvaluationIdentity:
    from sfgrpo.evaluation.evaluate import protocol_of
    from sfgrpo.policies.adapter import require_base

    base = base_of(policy)
    require_base(adapter, base)
    return EvaluationIdentity(
        adapter_sha256=adapter.sha256,
        base_revision=base.revision,
        prompts_sha256=prompts_digest(prompts),
        protocol=drawing_protocol(protocol_of(config.evaluation), policy),
        rewards=[reward_identity(reward) for reward in (config.reward, HELD_OUT)],
    )


def _write_report(
    folder: Path,
    prompts: Sequence[Prompt],
    shown: Sequence[int],
    models: Models,
    identity: EvaluationIdentity,
    published: PublishedPolicy,
) -> str:
    """Write metrics and table of the three models, what they are of, and samples; return the table and the gain."""
    from sfgrpo.geneval.table import markdown_table
    from sfgrpo.tracking.sample_grid import sample_grid

    record = published.record
    rows = {
        "base model": models.base,
        f"last adapter (update {record.num_updates})": models.last,
        f"best adapter (update {record.update})": models.best,
    }
    table = markdown_table({name: evaluation.table for name, evaluation in rows.items()})
    if published.last_is_best:
        table += "\nThe last adapter is the best one, and was drawn once.\n"
    table += f"\n{identity.sentence()}"
    metrics = {"base": models.base.to_dict(), "last": models.last.to_dict(), "policy": models.best.to_dict()}
    gain = metrics["policy"]["geneval/overall"] - metrics["base"]["geneval/overall"]
    adapters = {
        "last": {"update": record.num_updates, "sha256": record.last_adapter_sha256},
        "policy": {"update": record.update, "sha256": record.adapter_sha256},
    }
    report = metrics | {"gain": {"geneval/overall": gain}, "adapters": adapters, EVALUATED: identity.to_dict()}
    (folder / "metrics.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    (folder / "table.md").write_text(table + "\n", encoding="utf-8")
    samples = {"base model": models.base.samples, "best adapter": models.best.samples}
    sample_grid(prompts, samples, shown).save(folder / "samples.png")
    return f"{table}\n\n{_agreement_lines(rows)}GenEval overall {gain:+.3f} by the best adapter"


def _agreement_lines(models: Mapping[str, Evaluation]) -> str:
    """Return a line with the agreement of each model, with a warning where it is low."""
    lines = []
    for name, evaluation in models.items():
        if (agreement := evaluation.agreement) is None:
            return "This detector has no independent counter: no agreement was measured.\n\n"
        confirmed = f"{agreement.num_confirmed} of {agreement.num_correct} correct counts"
        lines.append(f"An independent counter confirms {confirmed} of the {name}.\n")
        if agreement.warning is not None:
            lines.append(f"WARNING: {name}: {agreement.warning}.\n")
    return "".join([*lines, "\n"])
