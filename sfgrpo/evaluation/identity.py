"""What an evaluation is of, by digests: two evaluations compare, and a report fits a policy, only by these."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sfgrpo.config.schema import PolicyConfig, RewardConfig
from sfgrpo.runtime.manifest import model_digest

if TYPE_CHECKING:
    from sfgrpo.evaluation.evaluate import SamplingProtocol

EVALUATED = "evaluated"
"""Key of a report: what it is of."""
SHORT = 12
"""Digits of a digest that a person reads."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationIdentity:
    """What was evaluated, on what, and how."""

    adapter_sha256: str
    base_revision: str
    """Of `Base`."""
    prompts_sha256: str
    protocol: Mapping[str, Any]
    """How images are drawn: of `drawing_protocol`."""
    rewards: Sequence[Mapping[str, Any]]
    """Of `reward_identity`."""

    @property
    def protocol_sha256(self) -> str:
        """Digest of protocol and rewards."""
        return _digest({"protocol": dict(self.protocol), "rewards": [dict(reward) for reward in self.rewards]})

    @property
    def sha256(self) -> str:
        """Digest of everything."""
        return _digest(dataclasses.asdict(self))

    def to_dict(self) -> dict[str, Any]:
        """Return JSON values, which `from_dict` reads."""
        return {**dataclasses.asdict(self), "protocol_sha256": self.protocol_sha256}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> EvaluationIdentity:
        """Read what `to_dict` returned; raise `ValueError` if it is not that."""
        try:
            identity = cls(**{field.name: values[field.name] for field in dataclasses.fields(cls)})
            intact = identity.protocol_sha256 == values["protocol_sha256"]
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"no identity of an evaluation: {error}") from error
        if not intact:
            raise ValueError("the protocol is not that of its digest")
        return identity

    def tags(self) -> dict[str, str]:
        """Return the tags of a version with this evaluation."""
        return {
            "adapter_sha256": self.adapter_sha256,
            "base_revision": self.base_revision,
            "evaluation_prompts_sha256": self.prompts_sha256,
            "evaluation_protocol_sha256": self.protocol_sha256,
            "evaluation_sha256": self.sha256,
        }

    def sentence(self) -> str:
        """Return the digests for a person."""
        base = self.base_revision.removeprefix("sha256:")
        return (
            f"Adapter {self.adapter_sha256[:SHORT]}, base {base[:SHORT]}, prompts {self.prompts_sha256[:SHORT]}, "
            f"protocol {self.protocol_sha256[:SHORT]}."
        )

    def differences(self, other: EvaluationIdentity) -> Iterator[str]:
        """Yield what differs from another evaluation, ours first."""
        ours, theirs = (_flat(identity) for identity in (self, other))
        for name in {**ours, **theirs}:
            if ours.get(name) != theirs.get(name):
                yield f"{name} {ours.get(name)} instead of {theirs.get(name)}"


def drawing_protocol(protocol: SamplingProtocol, policy: PolicyConfig) -> dict[str, Any]:
    """Return all that shapes an image except the weights; micro-batches change nothing but rounding."""
    sampling = {name: value for name, value in dataclasses.asdict(protocol).items() if name != "micro_batch_size"}
    settings = {name: getattr(policy, name) for name in ("dtype", "resolution", "max_sequence_length")}
    return sampling | settings


def reward_identity(reward: RewardConfig) -> dict[str, Any]:
    """Return what identifies a reward: its parameters and, where its model is a folder, the digest of that."""
    fields = dataclasses.asdict(reward)
    if reward.pretrained is not None and (folder := Path(reward.pretrained)).is_dir():
        fields["sha256"] = model_digest(folder)
    return fields


def _flat(identity: EvaluationIdentity) -> dict[str, Any]:
    values = dataclasses.asdict(identity)
    protocol, rewards = values.pop("protocol"), values.pop("rewards")
    return {**values, **protocol, "rewards": json.dumps(rewards, sort_keys=True)}


def _digest(values: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()
