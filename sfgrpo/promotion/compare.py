"""A candidate against the champion: both are downloaded and draw the same prompts from the same noise."""

from __future__ import annotations

import dataclasses
import datetime
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sfgrpo.config.loading import as_config_error
from sfgrpo.config.schema import PolicyConfig, PromotionConfig, RewardConfig
from sfgrpo.config.stages import PromoteStage
from sfgrpo.errors import SfgrpoError
from sfgrpo.factory import make_policy, make_reward, use_threads
from sfgrpo.paths import EVALUATION_PROMPTS, PROMOTION_REPORT
from sfgrpo.promotion.decision import (
    DECISION,
    PROMPTS,
    REPORT,
    SAMPLES,
    EvaluationRecord,
    PromotionDecision,
    tag_version,
)
from sfgrpo.promotion.diversity import diversity
from sfgrpo.promotion.gates import Baseline, Decision, ModelScores, decide
from sfgrpo.promotion.history import PromotionHistory, experiment_of
from sfgrpo.prompts import prompts_digest, read_prompts
from sfgrpo.registry.versions import Package, Version, download_version
from sfgrpo.runtime.environment import Environment
from sfgrpo.runtime.files import atomic_directory, temporary_directory
from sfgrpo.runtime.shutdown import sigterm_as_exit
from sfgrpo.tracking.base import Tracker, ending
from sfgrpo.types import Prompt

if TYPE_CHECKING:
    from mlflow import MlflowClient

    from sfgrpo.evaluation.evaluate import Evaluation, SamplingProtocol
    from sfgrpo.policies.sd3 import SD3Policy
    from sfgrpo.rewards import Reward
    from sfgrpo.runtime.timing import PhaseClock


GRID_ROWS_PER_TASK = 2
CANDIDATE = "candidate"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationSetup:
    """What models are judged by; the same for all that are compared."""

    prompts: Sequence[Prompt]
    protocol: SamplingProtocol
    rewards: Sequence[Reward]
    """The training reward and the held-out one."""
    shown: Sequence[int] = ()
    """Positions of the prompts whose images are kept."""


def judge(
    client: MlflowClient,
    config: PromoteStage,
    environment: Environment,
    candidate: Version,
    opponent: Version | None,
    ledger: PromotionHistory,
) -> PromotionDecision:
    """Compares a candidate with the champion, or with its own base model where `opponent` is None.

    The decision is left in files, in an MLflow run and on the version. No alias moves.

    Raises:
        RegistryError: a version is not what was registered.
        SfgrpoError: there are no evaluation prompts.
    """
    from sfgrpo.runtime.timing import PhaseClock
    from sfgrpo.tracking.mlflow_tracker import MlflowTracker

    rules = _rules(config)
    use_threads(environment)
    against = "base model" if opponent is None else f"version {opponent.number}"
    tracker = MlflowTracker(
        uri=environment.tracking_uri,
        experiment=experiment_of(candidate.model),
        run_name=f"version {candidate.number} against {against}",
    )
    clock = PhaseClock()
    with sigterm_as_exit(), ending(tracker):
        tracker.open()
        run_id = str(tracker.run_id)
        with temporary_directory(environment.scratch_dir, "promotion") as folder:
            evaluations = _evaluations(candidate, opponent, folder, environment, rules, clock)
        with clock("promotion_decide"):
            decision = _decided(config.promotion, rules, evaluations, opponent)
        judgement = PromotionDecision(
            model=candidate.model,
            version=candidate.number,
            promoted=decision.promoted,
            sentence=decision.sentence(),
            failed=decision.failed,
            opponent=decision.opponent,
            opponent_version=None if opponent is None else opponent.number,
            num_entries=len(ledger.entries),
            run_id=run_id,
            decided_at=now(),
            metrics=decision.to_dict() | {f"time/{phase}_s": seconds for phase, seconds in clock.seconds.items()},
        )
        record = EvaluationRecord(
            run_id=run_id,
            prompts_sha256=prompts_digest(rules.prompts),
            protocol=dataclasses.asdict(rules.protocol),
            rewards=tuple(dataclasses.asdict(reward) for reward in (config.reward, config.promotion.held_out)),
            metrics=evaluations[CANDIDATE].to_dict(),
        )
        report = _report(config, judgement, decision, evaluations)
        write_judgement(judgement, report, rules, evaluations)
        _record(tracker, config, judgement, record, report)
    tag_version(client, judgement, record)
    return judgement


def champion_already(candidate: Version, ledger: PromotionHistory) -> PromotionDecision:
    """Words that there is nothing to decide, and writes it."""
    judgement = PromotionDecision(
        model=candidate.model,
        version=candidate.number,
        promoted=False,
        sentence=f"**Not promoted.** Version {candidate.number} of {candidate.model} is champion already.",
        failed=(),
        opponent="champion",
        opponent_version=candidate.number,
        num_entries=len(ledger.entries),
        run_id=None,
        decided_at=now(),
        metrics={},
    )
    write_judgement(judgement, f"{judgement.sentence}\n")
    return judgement


def write_judgement(
    judgement: PromotionDecision,
    report: str,
    rules: EvaluationSetup | None = None,
    evaluations: Mapping[str, Evaluation] | None = None,
) -> None:
    """Writes decision and report and, where something was drawn, a grid of samples."""
    from sfgrpo.tracking.sample_grid import sample_grid

    with atomic_directory(PROMOTION_REPORT) as partial:
        (partial / DECISION).write_text(judgement.to_json(), encoding="utf-8")
        (partial / REPORT).write_text(report, encoding="utf-8")
        if rules is not None and evaluations is not None:
            sample_grid(
                rules.prompts,
                {name: evaluation.images for name, evaluation in evaluations.items()},
                {name: evaluation.correct for name, evaluation in evaluations.items()},
                rules.shown,
            ).save(partial / SAMPLES)


def load_package(package: Package, environment: Environment) -> SD3Policy:
    """Loads the base pipeline of a version, with an adapter of the version's shape that does nothing yet."""
    from safetensors import safe_open

    settings = package.settings
    with safe_open(package.adapter / settings["adapter_file"], framework="pt") as file:
        lora = json.loads(file.metadata()["lora_adapter_metadata"])
    policy = PolicyConfig(
        pretrained=package.pretrained,
        revision=settings["revision"],
        dtype=settings["dtype"],
        resolution=settings["resolution"],
        max_sequence_length=settings["max_sequence_length"],
        lora_rank=lora["transformer.r"],
        lora_alpha=lora["transformer.lora_alpha"],
        lora_targets=tuple(sorted(lora["transformer.target_modules"])),
    )
    return make_policy(policy, 0, environment)


def evaluate(policy: SD3Policy, rules: EvaluationSetup) -> Evaluation:
    """Has a policy draw all prompts, and judges the images."""
    from sfgrpo.evaluation.evaluate import evaluate_policy
    from sfgrpo.rewards import build_reward

    verdict = build_reward("geneval_correct")
    return evaluate_policy(policy, rules.prompts, verdict, rules.rewards, rules.protocol, shown=rules.shown)


def make_rewards(training: RewardConfig, held_out: RewardConfig) -> tuple[Reward, Reward]:
    """Makes the two rewards that models are judged by."""
    from sfgrpo.rewards import build_reward

    with as_config_error("promotion.held_out"):
        held_out_reward = build_reward(held_out.name, pretrained=held_out.pretrained, revision=held_out.revision)
    return make_reward(training), held_out_reward


def now() -> str:
    """Gives the time, UTC, as ISO 8601 to the second."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def _rules(config: PromoteStage) -> EvaluationSetup:
    from sfgrpo.evaluation.evaluate import protocol_of
    from sfgrpo.tracking.sample_grid import pick_rows

    if not EVALUATION_PROMPTS.exists():
        raise SfgrpoError(f"{EVALUATION_PROMPTS} does not exist; write it by `python -m sfgrpo prompts`")
    prompts = read_prompts(EVALUATION_PROMPTS)
    return EvaluationSetup(
        prompts=prompts,
        protocol=dataclasses.replace(protocol_of(config.evaluation), seed=config.promotion.seed),
        rewards=make_rewards(config.reward, config.promotion.held_out),
        shown=pick_rows(prompts, GRID_ROWS_PER_TASK),
    )


def _evaluations(
    candidate: Version,
    opponent: Version | None,
    folder: Path,
    environment: Environment,
    rules: EvaluationSetup,
    clock: PhaseClock,
) -> dict[str, Evaluation]:
    """Has both draw, the opponent first; no two pipelines are in memory at a time."""
    # Both are downloaded and checked before either draws: what will be refused is refused within seconds.
    with clock("promotion_download"):
        ours = _downloaded(candidate, folder / "candidate")
        theirs = None if opponent is None else _downloaded(opponent, folder / "champion")
    evaluations: dict[str, Evaluation] = {}
    if theirs is not None:
        with clock("promotion_load"):
            policy = load_package(theirs, environment)
            policy.load_adapter(theirs.adapter)
        with clock("promotion_draw"):
            evaluations["champion"] = evaluate(policy, rules)
        del policy
    with clock("promotion_load"):
        policy = load_package(ours, environment)
    if theirs is None:
        with clock("promotion_draw"):
            evaluations["base model"] = evaluate(policy, rules)
    policy.load_adapter(ours.adapter)
    with clock("promotion_draw"):
        evaluations[CANDIDATE] = evaluate(policy, rules)
    return evaluations


def _downloaded(version: Version, folder: Path) -> Package:
    folder.mkdir()
    return download_version(version, folder)


def _decided(
    config: PromotionConfig, rules: EvaluationSetup, evaluations: Mapping[str, Evaluation], opponent: Version | None
) -> Decision:
    against: Baseline = "base model" if opponent is None else "champion"
    return decide(
        _evidence(evaluations[CANDIDATE], rules),
        _evidence(evaluations[against], rules),
        against=against,
        min_gain=config.min_gain,
        min_diversity_ratio=config.min_diversity_ratio,
        error_rate=config.error_rate,
        num_resamples=config.num_resamples,
        seed=config.seed,
    )


def _evidence(evaluation: Evaluation, rules: EvaluationSetup) -> ModelScores:
    training, held_out = rules.rewards
    return ModelScores(
        prompts=rules.prompts,
        noise_seed=rules.protocol.seed,
        correct_PG=evaluation.correct,
        held_out_PG=evaluation.rewards_PG[held_out.name],
        training_PG=evaluation.rewards_PG[training.name],
        diversity_P=diversity(evaluation.thumbnails_PGHWC),
    )


def _report(
    config: PromoteStage, judgement: PromotionDecision, decision: Decision, evaluations: Mapping[str, Evaluation]
) -> str:
    """Words the decision for people."""
    from sfgrpo.geneval.table import markdown_table

    opponent = "its base model" if judgement.opponent_version is None else f"version {judgement.opponent_version}"
    table = markdown_table({name: evaluation.table for name, evaluation in evaluations.items()})
    return (
        f"# {judgement.model}: version {judgement.version} against {opponent}\n\n"
        f"{decision.markdown()}\n"
        f"{table}\n"
        f"The candidate was selected on these prompts, too, but on other noise: here seed {config.promotion.seed}, "
        f"there {config.evaluation.seed}. What it may owe to the choice of prompts is in its favour.\n\n"
        f"Samples of both: {SAMPLES}. MLflow run: {judgement.run_id}. Decided {judgement.decided_at}.\n"
    )


def _record(
    tracker: Tracker, config: PromoteStage, judgement: PromotionDecision, record: EvaluationRecord, report: str
) -> None:
    params: dict[str, Any] = {
        "model": judgement.model,
        "version": judgement.version,
        "opponent": judgement.opponent_version or judgement.opponent,
        "reward": dataclasses.asdict(config.reward),
        "promotion": dataclasses.asdict(config.promotion),
        "protocol": record.protocol,
        "prompts_sha256": record.prompts_sha256,
    }
    tracker.log_params(params)
    tracker.log_metrics(judgement.metrics, 0)
    tracker.log_text(judgement.to_json(), DECISION)
    tracker.log_text(report, REPORT)
    tracker.log_text(EVALUATION_PROMPTS.read_text(encoding="utf-8"), PROMPTS)
    tracker.log_image(PROMOTION_REPORT / SAMPLES, "samples", 0)
    tracker.set_tags({"promotion/decision": "promoted" if judgement.promoted else "not promoted"})
