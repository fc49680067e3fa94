"""What people and flows do with registered versions: promote, roll back, recheck, sample."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sfgrpo.assembly import use_threads
from sfgrpo.champion import champion_of, crown, prove, roll_back, settle
from sfgrpo.config import PromoteStage
from sfgrpo.contest import Rules, champion_already, evaluate, judge, load_package, make_rewards
from sfgrpo.environment import Environment
from sfgrpo.errors import ConfigError, IntegrityError
from sfgrpo.files import atomic_write, temporary_directory
from sfgrpo.judgement import PROMPTS, Judgement, Record, read_file, read_judgement, read_record
from sfgrpo.ledger import Ledger, LedgerError, experiment_of
from sfgrpo.paths import PROMOTION_REPORT, RECHECK
from sfgrpo.prompts import prompts_digest, read_prompts
from sfgrpo.registry import RegistryError, connect_globally, draw
from sfgrpo.sections import RewardConfig
from sfgrpo.signals import sigterm_as_exit
from sfgrpo.tracking import ending
from sfgrpo.versions import Version, download_version, find_version

if TYPE_CHECKING:
    from mlflow import MlflowClient

    from sfgrpo.types import Prompt


def promote(
    config: PromoteStage,
    environment: Environment,
    *,
    model: str | None = None,
    number: int | None = None,
    judge_only: bool = False,
) -> None:
    """Judges a candidate, by default the version with the alias of `registry`, and makes it champion if it passes.

    With `judge_only` the decision is written and recorded, and nothing moves.

    Raises:
        LedgerError: another promotion or rollback was decided while this one was judged.
        RegistryError: a version is not what was registered, or the new champion cannot draw.
    """
    client, uri = connect_globally(environment.tracking_uri), environment.tracking_uri
    name = model or config.registry.model_name
    candidate = find_version(
        client, f"models:/{name}@{config.registry.alias}" if number is None else f"models:/{name}/{number}"
    )
    ledger = settle(client, uri, name)
    champion = champion_of(client, ledger)
    if champion == candidate.number:
        print(champion_already(candidate, ledger).sentence)
        return
    opponent = None if champion is None else find_version(client, f"models:/{name}/{champion}")
    judgement = judge(client, config, environment, candidate, opponent, ledger)
    print(f"{judgement.sentence}\n\nFigures and samples are in {PROMOTION_REPORT}, MLflow run {judgement.run_id}")
    if judgement.promoted and judge_only:
        print(f"nothing has moved; `python -m sfgrpo promote --apply {judgement.run_id}` makes it champion")
    elif judgement.promoted:
        _crown(client, uri, ledger, judgement)


def apply(environment: Environment, run_id: str) -> None:
    """Makes the candidate of an earlier decision champion, unless the champion has changed since.

    Applied twice, it changes nothing and has the champion draw once more.

    Raises:
        LedgerError: the champion has changed.
        RegistryError: there is no such decision, it was not to promote, or the version is not what was registered.
    """
    client, uri = connect_globally(environment.tracking_uri), environment.tracking_uri
    judgement = read_judgement(client, run_id)
    if not judgement.promoted:
        raise RegistryError(f"MLflow run {run_id} decided not to promote version {judgement.version}")
    ledger = settle(client, uri, judgement.model)
    if _is_applied(ledger, judgement):
        # Whoever applied it may have died before the proof.
        prove(client, uri, ledger)
        print(f"version {judgement.version} of {judgement.model} is champion already, by this decision")
        return
    if len(ledger.entries) != judgement.num_entries:
        raise LedgerError(
            f"MLflow run {run_id} decided against a champion of {judgement.model} that has changed since; judge again "
            f"by `python -m sfgrpo promote --model {judgement.model} --version {judgement.version}`"
        )
    candidate = find_version(client, f"models:/{judgement.model}/{judgement.version}")
    with temporary_directory(environment.scratch_dir, "promotion") as folder:
        download_version(candidate, folder)
    _crown(client, uri, ledger, judgement)


def rollback(environment: Environment, model: str) -> None:
    """Makes the champion before the present one champion again.

    Raises:
        LedgerError: another promotion or rollback was decided at the same time.
        RegistryError: there is no such model or no champion before, or the former one cannot draw.
    """
    client = connect_globally(environment.tracking_uri)
    _require_model(client, model)
    old, new = roll_back(client, environment.tracking_uri, model)
    now = "it has no champion now" if new is None else f"version {new} is champion again"
    print(f"version {old} of {model} is rolled back; {now}")


def recheck(environment: Environment, model: str) -> None:
    """Has the champion draw once more as when it was promoted, and writes and records whether its figures moved.

    A model without a champion has not drifted.

    Raises:
        RegistryError: there is no such model, or the champion is not what was registered or was never judged.
        IntegrityError: the recorded prompts are not those that it was judged on.
    """
    client, uri = connect_globally(environment.tracking_uri), environment.tracking_uri
    _require_model(client, model)
    number = champion_of(client, settle(client, uri, model))
    if number is None:
        reason = f"{model} has no champion, so there is nothing to check"
        _write_recheck({"drifted": False, "reasons": [reason], "table": "", "metrics": {}})
        print(reason)
        return
    champion = find_version(client, f"models:/{model}/{number}")
    outcome = _rechecked(client, environment, champion, read_record(champion.address, champion.tags))
    _write_recheck(outcome)
    print(f"version {number} of {model} {_drift(outcome)}\n\n{outcome['table']}")


def sample(environment: Environment, address: str, prompt: str, out: Path, params: dict[str, Any]) -> None:
    """Draws one image by a registered version, whose files are checked first, and prints where it is.

    Raises:
        ConfigError: the prompt is empty, or `out` is no PNG file.
        RegistryError: there is no such version, or it is not what was registered.
    """
    if not prompt.strip():
        raise ConfigError("the prompt is empty; say what is to be drawn, in quotes")
    if out.suffix != ".png":
        raise ConfigError(f"--out {out} is no PNG file; give a name that ends in .png")
    client = connect_globally(environment.tracking_uri)
    use_threads(environment)
    version = find_version(client, address)
    with temporary_directory(environment.scratch_dir, "sample") as folder:
        package = download_version(version, folder)
        (image,) = draw(environment.tracking_uri, str(package.folder), [prompt], **params)
    atomic_write(out, image)
    print(f"{out} by version {version.number} of {version.model}")


def _crown(client: MlflowClient, uri: str, ledger: Ledger, judgement: Judgement) -> None:
    crown(client, uri, ledger, judgement.version, str(judgement.run_id))
    print(f"version {judgement.version} of {judgement.model} is champion")


def _is_applied(ledger: Ledger, judgement: Judgement) -> bool:
    """Tells whether the last change of the champion was by this decision."""
    last = ledger.entries[-1] if ledger.entries else None
    return last is not None and last.action == "promotion" and last.run_id == judgement.run_id


def _require_model(client: MlflowClient, model: str) -> None:
    names = sorted(found.name for found in client.search_registered_models())
    if model not in names:
        raise RegistryError(f"no model {model!r} is registered; registered models are {', '.join(names) or 'none'}")


def _rechecked(client: MlflowClient, environment: Environment, champion: Version, record: Record) -> dict[str, Any]:
    """Evaluates by a record, compares, and records the outcome as an MLflow run."""
    from sfgrpo.drift import drift
    from sfgrpo.evaluation import Protocol
    from sfgrpo.mlflow_tracking import MlflowTracker

    use_threads(environment)
    tracker = MlflowTracker(
        uri=environment.tracking_uri,
        experiment=experiment_of(champion.model),
        run_name=f"recheck of version {champion.number}",
    )
    with sigterm_as_exit(), ending(tracker):
        tracker.open()
        with temporary_directory(environment.scratch_dir, "recheck") as folder:
            prompts = _recorded_prompts(client, record, folder)
            training, held_out = (RewardConfig(**reward) for reward in record.rewards)
            rules = Rules(
                prompts=prompts, protocol=Protocol(**record.protocol), rewards=make_rewards(training, held_out)
            )
            (folder / "version").mkdir()
            package = download_version(champion, folder / "version")
            policy = load_package(package, environment)
            policy.load_adapter(package.adapter)
            metrics = evaluate(policy, rules).to_dict()
        per_prompt = rules.protocol.images_per_prompt
        num_images = {tag: per_prompt * count for tag, count in Counter(prompt.tag for prompt in prompts).items()}
        reasons, table = drift(record.metrics, metrics, num_images)
        tracker.log_params({"model": champion.model, "version": champion.number, "recorded_run": record.run_id})
        tracker.log_metrics({**metrics, "recheck/drifted": float(bool(reasons))}, 0)
        tracker.log_text(table, "recheck.md")
    return {"drifted": bool(reasons), "reasons": reasons, "table": table, "metrics": metrics}


def _recorded_prompts(client: MlflowClient, record: Record, folder: Path) -> list[Prompt]:
    path = folder / PROMPTS
    path.write_text(read_file(client, record.run_id, PROMPTS), encoding="utf-8")
    prompts = read_prompts(path)
    if (found := prompts_digest(prompts)) != record.prompts_sha256:
        raise IntegrityError(path, f"sha256 {record.prompts_sha256}", f"sha256 {found}")
    return prompts


def _write_recheck(outcome: dict[str, Any]) -> None:
    atomic_write(RECHECK, json.dumps(outcome, indent=2) + "\n")


def _drift(outcome: dict[str, Any]) -> str:
    return f"has drifted: {'; '.join(outcome['reasons'])}" if outcome["drifted"] else "has not drifted"
