"""Compare a registered version with the champion, or with its own base model while there is no champion."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING

from sfgrpo.config.stages import PromoteStage
from sfgrpo.errors import MismatchError
from sfgrpo.factory import make_text_encoders, use_threads
from sfgrpo.paths import (
    EVALUATION_PROMPTS,
    PROMOTION_DECISION,
    PROMOTION_REPORT,
    PROMOTION_TEXT,
    TRAINING_PROMPTS,
    VALIDATION_PROMPTS,
)
from sfgrpo.promotion.decision import DECISION_TAG, PROMPTS, Baseline, EvaluationRecord, PromotionDecision, tag_version
from sfgrpo.promotion.diversity import diversity
from sfgrpo.promotion.evaluation import (
    EvaluationSetup,
    download_judged,
    evaluate,
    load_policy,
    make_rewards,
    measure_agreement,
    tracked_run,
)
from sfgrpo.promotion.gates import Comparison, ModelScores, compare_scores
from sfgrpo.promotion.history import PromotionHistory
from sfgrpo.promotion.report import SAMPLES, decision_sentence, promotion_report
from sfgrpo.prompt_checks import check_prompts
from sfgrpo.prompts import prompts_digest, read_prompt_file, read_prompts, to_lines
from sfgrpo.registry.package import Package
from sfgrpo.registry.versions import Version
from sfgrpo.runtime.environment import Environment
from sfgrpo.runtime.files import atomic_directory, temporary_directory
from sfgrpo.runtime.manifest import sha256_of_text
from sfgrpo.tracking.base import Tracker

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from PIL import Image

    from sfgrpo.evaluation.agreement import Agreement
    from sfgrpo.evaluation.evaluate import Evaluation
    from sfgrpo.evaluation.identity import EvaluationIdentity
    from sfgrpo.runtime.timing import PhaseClock


CANDIDATE = "candidate"


def compare_versions(
    client: MlflowClient,
    config: PromoteStage,
    environment: Environment,
    candidate: Version,
    champion: Version | None,
    history: PromotionHistory,
) -> PromotionDecision:
    """Decide whether a candidate replaces the champion or, where `champion` is None, beats its own base model.

    The decision is written to files, to an MLflow run and to tags of the version. No alias moves.

    Raises:
        RegistryError: A version is not what was registered.
        ConfigError: There are no evaluation prompts.
    """
    from sfgrpo.runtime.timing import PhaseClock
    from sfgrpo.tracking.sample_grid import sample_grid

    setup = _read_setup(config)
    _require_prompts_of(candidate, setup)
    use_threads(environment)
    baseline = "base model" if champion is None else f"version {champion.number}"
    clock = PhaseClock()
    with tracked_run(environment, candidate.model, f"version {candidate.number} against {baseline}") as tracker:
        run_id = str(tracker.run_id)
        evaluations, agreements, identities = _evaluate_both(candidate, champion, environment, setup, clock)
        with clock("promotion_decide"):
            baseline_scores, candidate_scores = (
                _scores(evaluation, agreements[name], setup) for name, evaluation in evaluations.items()
            )
            comparison = compare_scores(setup.prompts, candidate_scores, baseline_scores, config.promotion)
        decision = _decide(comparison, candidate, champion, history, identities, run_id)
        seconds = {f"time/{phase}_s": value for phase, value in clock.seconds.items()}
        decision = dataclasses.replace(decision, metrics={**decision.metrics, **seconds})
        record = _record(config, setup, run_id, evaluations[CANDIDATE], identities[CANDIDATE])
        tables = {name: evaluation.table for name, evaluation in evaluations.items()}
        report = promotion_report(config, decision, comparison, tables)
        samples = {name: evaluation.samples for name, evaluation in evaluations.items()}
        write_decision(decision, report, sample_grid(setup.prompts, samples, setup.shown))
        _log(tracker, config, decision, record, report)
        tracker.log_text(to_lines(setup.prompts), PROMPTS)
    tag_version(client, decision, record)
    return decision


def keep_champion(champion: Version, history: PromotionHistory) -> PromotionDecision:
    """Write the decision that a candidate is champion already, so that there is nothing to compare."""
    decision = PromotionDecision(
        model=champion.model,
        version=champion.number,
        promoted=False,
        sentence=f"**Not promoted.** Version {champion.number} of {champion.model} is champion already.",
        failed=(),
        baseline="champion",
        baseline_version=champion.number,
        num_entries=len(history.entries),
        run_id=None,
        metrics={},
    )
    write_decision(decision, f"{decision.sentence}\n")
    return decision


def write_decision(decision: PromotionDecision, report: str, samples: Image.Image | None = None) -> None:
    """Write decision, report and, where images were drawn, samples of them."""
    with atomic_directory(PROMOTION_REPORT) as partial:
        (partial / PROMOTION_DECISION.name).write_text(decision.to_json(), encoding="utf-8")
        (partial / PROMOTION_TEXT.name).write_text(report, encoding="utf-8")
        if samples is not None:
            samples.save(partial / SAMPLES)


def _read_setup(config: PromoteStage) -> EvaluationSetup:
    from sfgrpo.evaluation.evaluate import protocol_of
    from sfgrpo.tracking.sample_grid import pick_rows

    prompts = read_prompts(EVALUATION_PROMPTS)
    return EvaluationSetup(
        prompts=prompts,
        protocol=dataclasses.replace(protocol_of(config.evaluation), seed=config.promotion.seed),
        rewards=make_rewards(config.reward, config.promotion.held_out),
        reward_configs=(config.reward, config.promotion.held_out),
        shown=pick_rows(prompts, seed=config.promotion.seed),
        agreement_images=config.promotion.agreement_images,
    )


def _require_prompts_of(candidate: Version, setup: EvaluationSetup) -> None:
    """Refuse other prompts than those kept out of a candidate's training: it may have been trained on some of them.

    Versions of earlier releases do not name theirs.
    """
    found = prompts_digest(setup.prompts)
    if (named := candidate.tags.get("evaluation_prompts_sha256", found)) != found:
        raise MismatchError(
            f"{EVALUATION_PROMPTS} has the digest {found}, and the training of {candidate.address} kept out the "
            f"prompts {named} and may have used others; write those by `python -m sfgrpo prompts` with its parameters"
        )


def _evaluate_both(
    candidate: Version, champion: Version | None, environment: Environment, setup: EvaluationSetup, clock: PhaseClock
) -> tuple[dict[str, Evaluation], dict[str, Agreement | None], dict[str, EvaluationIdentity]]:
    """Evaluate the baseline, then the candidate, and return of what; no two pipelines are in memory at a time."""
    evaluations: dict[str, Evaluation] = {}
    agreements: dict[str, Agreement | None] = {}
    name = "base model" if champion is None else "champion"
    with temporary_directory(environment.scratch_dir, "promotion") as folder:
        # Both are downloaded and verified before either draws, so that a refusal comes within seconds.
        with clock("promotion_download"):
            ours = download_judged(candidate, folder / "candidate")
            theirs = None if champion is None else download_judged(champion, folder / "champion")
        _check_prompts(setup, *(judged.package for judged in (ours, theirs) if judged is not None))
        with clock("promotion_load"):
            policy = load_policy(theirs or ours, environment)
            if theirs is not None:
                policy.load_adapter(theirs.package.adapter)
        with clock("promotion_draw"):
            evaluations[name], agreements[name] = evaluate(policy, setup), measure_agreement(policy, setup)
        if theirs is not None:
            del policy
            with clock("promotion_load"):
                policy = load_policy(ours, environment)
        policy.load_adapter(ours.package.adapter)
        with clock("promotion_draw"):
            evaluations[CANDIDATE], agreements[CANDIDATE] = evaluate(policy, setup), measure_agreement(policy, setup)
        identity = ours.identity(setup)
        without = dataclasses.replace(identity, adapter_sha256="none")
        return evaluations, agreements, {name: theirs.identity(setup) if theirs else without, CANDIDATE: identity}


def _check_prompts(setup: EvaluationSetup, *packages: Package) -> None:
    """Refuse prompts that a version cannot read, that cannot be judged or counted, or that a training uses here."""
    from sfgrpo.rewards import build_reward

    judges = (build_reward("geneval_correct"), *setup.rewards)
    evaluation = read_prompt_file(EVALUATION_PROMPTS)
    training, validation = (
        read_prompt_file(path) if path.exists() else None for path in (TRAINING_PROMPTS, VALIDATION_PROMPTS)
    )
    for package in packages:
        encoders = make_text_encoders(
            package.pretrained, package.settings["revision"], package.settings["max_sequence_length"]
        )
        check_prompts(evaluation, judges, validation=validation, training=training, encoders=encoders)


def _scores(evaluation: Evaluation, agreement: Agreement | None, setup: EvaluationSetup) -> ModelScores:
    training, held_out = setup.rewards
    return ModelScores(
        correct_PG=evaluation.correct,
        held_out_PG=evaluation.rewards_PG[held_out.name],
        training_PG=evaluation.rewards_PG[training.name],
        diversity_P=diversity(evaluation.thumbnails_PGHWC),
        agreement=agreement,
    )


def _decide(
    comparison: Comparison,
    candidate: Version,
    champion: Version | None,
    history: PromotionHistory,
    identities: Mapping[str, EvaluationIdentity],
    run_id: str,
) -> PromotionDecision:
    baseline: Baseline = "base model" if champion is None else "champion"
    return PromotionDecision(
        model=candidate.model,
        version=candidate.number,
        promoted=not comparison.failed,
        sentence=decision_sentence(comparison, baseline),
        failed=comparison.failed,
        baseline=baseline,
        baseline_version=None if champion is None else champion.number,
        num_entries=len(history.entries),
        run_id=run_id,
        metrics=comparison.to_dict(),
        evaluated={name: identity.to_dict() for name, identity in identities.items()},
    )


def _record(
    config: PromoteStage,
    setup: EvaluationSetup,
    run_id: str,
    evaluation: Evaluation,
    identity: EvaluationIdentity,
) -> EvaluationRecord:
    return EvaluationRecord(
        run_id=run_id,
        adapter_sha256=identity.adapter_sha256,
        base_revision=identity.base_revision,
        prompts_sha256=identity.prompts_sha256,
        protocol=dataclasses.asdict(setup.protocol),
        rewards=tuple(dataclasses.asdict(reward) for reward in (config.reward, config.promotion.held_out)),
        metrics=evaluation.to_dict(),
    )


def _log(
    tracker: Tracker, config: PromoteStage, decision: PromotionDecision, record: EvaluationRecord, report: str
) -> None:
    tracker.log_params(
        {
            "model": decision.model,
            "version": decision.version,
            "baseline": decision.baseline_version or decision.baseline,
            "reward": dataclasses.asdict(config.reward),
            "promotion": dataclasses.asdict(config.promotion),
            "protocol": record.protocol,
            "prompts_sha256": record.prompts_sha256,
            "adapter_sha256": record.adapter_sha256,
            "base_revision": record.base_revision,
        }
    )
    tracker.log_metrics(decision.metrics, 0)
    tracker.log_text(decision.to_json(), PROMOTION_DECISION.name)
    tracker.log_text(report, PROMOTION_TEXT.name)
    tracker.log_image(PROMOTION_REPORT / SAMPLES, "samples", 0)
    tracker.set_tags(
        {
            "promotion/decision": "promoted" if decision.promoted else "not promoted",
            DECISION_TAG: sha256_of_text(decision.to_json()),
        }
    )
