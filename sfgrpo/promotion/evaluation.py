"""How a registered version is evaluated, in a promotion and in a recheck alike."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sfgrpo.config.schema import PolicyConfig, RewardConfig
from sfgrpo.errors import MismatchError
from sfgrpo.evaluation.identity import EvaluationIdentity, drawing_protocol, reward_identity
from sfgrpo.factory import base_of, make_policy, make_reward
from sfgrpo.geneval.scorer import asks_for_a_number
from sfgrpo.promotion.history import experiment_of
from sfgrpo.prompts import prompts_digest
from sfgrpo.registry.package import Package, download_version
from sfgrpo.registry.versions import Version
from sfgrpo.runtime.environment import Environment
from sfgrpo.tracking.base import Tracker, ending
from sfgrpo.types import Prompt

if TYPE_CHECKING:
    from sfgrpo.evaluation.agreement import Agreement
    from sfgrpo.evaluation.evaluate import Evaluation, SamplingProtocol
    from sfgrpo.policies.adapter import Adapter, Base
    from sfgrpo.policies.sd3 import SD3Policy
    from sfgrpo.rewards import Reward

VERDICT = "geneval_correct"
"""Reward that says whether an image is correct."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationSetup:
    """Prompts, sampling and rewards; the same for all models that are compared."""

    prompts: Sequence[Prompt]
    protocol: SamplingProtocol
    rewards: Sequence[Reward]
    """The training reward and the held-out one."""
    reward_configs: Sequence[RewardConfig]
    """Parameters of the same rewards."""
    shown: Sequence[int] = ()
    """Positions of the prompts whose images are kept."""
    agreement_images: int = 0
    """Images of each prompt that asks for a number by which the agreement is measured; 0 measures none."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class JudgedVersion:
    """A version whose downloaded files are those that it names."""

    package: Package
    adapter: Adapter
    base: Base
    policy: PolicyConfig

    def identity(self, setup: EvaluationSetup) -> EvaluationIdentity:
        """Return what an evaluation of the version by a setup is of."""
        return EvaluationIdentity(
            adapter_sha256=self.adapter.sha256,
            base_revision=self.base.revision,
            prompts_sha256=prompts_digest(setup.prompts),
            protocol=drawing_protocol(setup.protocol, self.policy),
            rewards=[reward_identity(reward) for reward in setup.reward_configs],
        )

    def require_subject_of(self, evaluated: Mapping[str, Any], source: str) -> None:
        """Raise `MismatchError` if an evaluation, by the digests that it names, was of other files.

        Those of earlier releases name none.
        """
        for name, found in (("adapter_sha256", self.adapter.sha256), ("base_revision", self.base.revision)):
            if evaluated.get(name, found) != found:
                version = self.package.version
                raise MismatchError(
                    f"{source} is of {name} {evaluated[name]}, and {version.address} has {found}; compare again by "
                    f"`python -m sfgrpo promote --model {version.model} --version {version.number}`"
                )


@contextlib.contextmanager
def tracked_run(environment: Environment, model: str, name: str) -> Iterator[Tracker]:
    """Open an MLflow run among the decisions on a model, and end it with the block."""
    from sfgrpo.tracking.mlflow_tracker import MlflowTracker

    tracker = MlflowTracker(uri=environment.tracking_uri, experiment=experiment_of(model), run_name=name)
    with ending(tracker):
        tracker.open()
        yield tracker


def make_rewards(training: RewardConfig, held_out: RewardConfig) -> tuple[Reward, Reward]:
    """Make the training reward and the held-out one."""
    return make_reward(training), make_reward(held_out, "promotion.held_out")


def download_judged(version: Version, folder: Path) -> JudgedVersion:
    """Download a version, and check that its files are those that its tags and its adapter name.

    Raises:
        RegistryError: The files are not what was registered.
        AdapterError: The adapter is damaged, changes nothing, or is of another base model.
        MismatchError: A tag names another adapter or base model.
    """
    from sfgrpo.policies.adapter import read_effective_adapter, require_base

    package = download_version(version, folder)
    adapter = read_effective_adapter(package.adapter, f"register an intact adapter instead of {version.address}")
    settings = package.settings
    policy = PolicyConfig(
        pretrained=package.pretrained,
        revision=settings["revision"],
        dtype=settings["dtype"],
        resolution=settings["resolution"],
        max_sequence_length=settings["max_sequence_length"],
        lora_rank=adapter.rank,
        lora_alpha=adapter.alpha,
        lora_targets=adapter.targets,
    )
    base = base_of(policy)
    require_base(adapter, base)
    judged = JudgedVersion(package=package, adapter=adapter, base=base, policy=policy)
    # Versions of earlier releases have no tag for the base model.
    for tag, found in (("adapter_sha256", adapter.sha256), ("base_revision", base.revision)):
        if (named := version.tags.get(tag, found)) != found:
            raise MismatchError(
                f"{version.address} has the tag {tag} {named}, and its files are of {found}; register its adapter again"
            )
    return judged


def load_policy(judged: JudgedVersion, environment: Environment) -> SD3Policy:
    """Load the base pipeline of a version, with an adapter of the version's shape that has no effect yet."""
    return make_policy(judged.policy, 0, environment)


def evaluate(policy: SD3Policy, setup: EvaluationSetup) -> Evaluation:
    """Draw all prompts with a policy and score the images."""
    from sfgrpo.evaluation.evaluate import evaluate_policy

    return evaluate_policy(policy, setup.prompts, setup.rewards, setup.protocol, shown=setup.shown)


def measure_agreement(policy: SD3Policy, setup: EvaluationSetup) -> Agreement | None:
    """Draw images of the prompts that ask for a number, and have an independent counter confirm the verdicts.

    None if there is no such prompt, or no counter for this detector.
    """
    from sfgrpo.evaluation.evaluate import evaluate_policy
    from sfgrpo.rewards import confirmation_of

    prompts = [prompt for prompt in setup.prompts if asks_for_a_number(prompt)]
    if not prompts or not setup.agreement_images or confirmation_of(VERDICT) is None:
        return None
    protocol = dataclasses.replace(setup.protocol, images_per_prompt=setup.agreement_images)
    return evaluate_policy(policy, prompts, (), protocol).agreement
