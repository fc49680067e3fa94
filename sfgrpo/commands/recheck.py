"""Evaluate the champion again and report drift."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sfgrpo.config.schema import RewardConfig
from sfgrpo.errors import IntegrityError
from sfgrpo.factory import use_threads
from sfgrpo.paths import RECHECK
from sfgrpo.preflight.devices import check_devices
from sfgrpo.promotion.aliases import sync_aliases
from sfgrpo.promotion.decision import PROMPTS, EvaluationRecord, read_file, read_record
from sfgrpo.promotion.drift import drift
from sfgrpo.promotion.evaluation import (
    EvaluationSetup,
    download_judged,
    evaluate,
    load_policy,
    make_rewards,
    tracked_run,
)
from sfgrpo.prompts import prompts_digest, read_prompts
from sfgrpo.registry.register import connect_globally
from sfgrpo.registry.versions import Version, find_version, require_model
from sfgrpo.runtime.environment import Environment
from sfgrpo.runtime.files import temporary_directory, write_json

if TYPE_CHECKING:
    from sfgrpo.types import Prompt


def recheck(environment: Environment, model: str) -> None:
    """Evaluate the champion once more as when it was promoted; write and record whether its metrics changed.

    A model without a champion has not drifted.

    Raises:
        RegistryError: There is no such model, or the champion is not what was registered or was never evaluated.
        IntegrityError: The recorded prompts are not those that it was evaluated on.
    """
    uri = environment.tracking_uri
    check_devices(environment)
    client = connect_globally(uri)
    require_model(client, model)
    number = sync_aliases(client, uri, model).champion
    if number is None:
        reason = f"{model} has no champion, so there is nothing to check"
        write_json(RECHECK, {"drifted": False, "reasons": [reason], "table": "", "metrics": {}})
        print(reason)
        return
    outcome = _evaluate_again(environment, find_version(client, f"models:/{model}/{number}"))
    write_json(RECHECK, outcome)
    drifted = f"has drifted: {'; '.join(outcome['reasons'])}" if outcome["drifted"] else "has not drifted"
    print(f"version {number} of {model} {drifted}\n\n{outcome['table']}")


def _evaluate_again(environment: Environment, champion: Version) -> dict[str, Any]:
    """Evaluate as the version's record says, and log an MLflow run with the outcome."""
    from sfgrpo.evaluation.evaluate import SamplingProtocol

    record = read_record(champion.address, champion.tags)
    use_threads(environment)
    with tracked_run(environment, champion.model, f"recheck of version {champion.number}") as tracker:
        with temporary_directory(environment.scratch_dir, "recheck") as folder:
            judged = download_judged(champion, folder / "version")
            judged.require_subject_of(record.subject(), f"the record of MLflow run {record.run_id}")
            training, held_out = (RewardConfig(**reward) for reward in record.rewards)
            setup = EvaluationSetup(
                prompts=_recorded_prompts(record, folder),
                protocol=SamplingProtocol(**record.protocol),
                rewards=make_rewards(training, held_out),
                reward_configs=(training, held_out),
            )
            policy = load_policy(judged, environment)
            policy.load_adapter(judged.package.adapter)
            metrics = evaluate(policy, setup).to_dict()
        num_prompts = Counter(prompt.tag for prompt in setup.prompts)
        num_images = {tag: setup.protocol.images_per_prompt * count for tag, count in num_prompts.items()}
        reasons, table = drift(record.metrics, metrics, num_images)
        tracker.log_params({"model": champion.model, "version": champion.number, "recorded_run": record.run_id})
        tracker.log_metrics({**metrics, "recheck/drifted": float(bool(reasons))}, 0)
        tracker.log_text(table, "recheck.md")
    evaluated = judged.identity(setup).to_dict()
    return {"drifted": bool(reasons), "reasons": reasons, "table": table, "metrics": metrics, "evaluated": evaluated}


def _recorded_prompts(record: EvaluationRecord, folder: Path) -> list[Prompt]:
    path = folder / PROMPTS
    path.write_text(read_file(record.run_id, PROMPTS), encoding="utf-8")
    prompts = read_prompts(path)
    if (found := prompts_digest(prompts)) != record.prompts_sha256:
        raise IntegrityError(path, f"sha256 {record.prompts_sha256}", f"sha256 {found}")
    return prompts
