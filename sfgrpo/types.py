"""Containers shared by all layers: prompts, detections, conditioning, trajectories and rollout batches.

Dimension suffixes: `P` prompts, `G` images per prompt (the group), `N` = P*G, `K` denoising steps,
`S` = K+1 states, `C H W` latent channels, height and width. Index 0 along K and S is pure noise.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, TypeVar, get_args

if TYPE_CHECKING:
    from torch import Tensor, device


Tag = Literal["single_object", "two_object", "counting", "colors", "position", "color_attr"]
Relation = Literal["left of", "right of", "above", "below"]
TAGS: tuple[Tag, ...] = get_args(Tag)
RELATIONS: tuple[Relation, ...] = get_args(Relation)
Box = tuple[float, float, float, float]

SamplerName = Literal["flow_sde", "ddim_sde", "cps", "ode"]
"""Rules of one denoising step, `sfgrpo.grpo.sde.SAMPLERS`."""
Credit = Literal["joint", "per_step", "step_mean", "terminal"]
"""What a step is credited with, `sfgrpo.grpo.advantages.group_advantages`."""
StdScope = Literal["group", "global"]
"""Samples over which the standard deviation of the credits is taken."""
LrScheduler = Literal["constant", "linear"]
"""Course of the learning rate, `sfgrpo.training.learner.learning_rate_at`."""
KlForm = Literal["exact", "flow_grpo"]
"""Variance in the KL divergence, `sfgrpo.grpo.sde.gaussian_kl`."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Clause:
    """One object that a prompt asks for (include) or forbids (exclude)."""

    class_name: str
    count: int
    color: str | None = None
    position: tuple[Relation, int] | None = None
    """Relation of this object to the include clause of the given index."""

    def to_metadata(self) -> dict[str, Any]:
        """Return the item as GenEval writes it: absent keys instead of nulls."""
        metadata: dict[str, Any] = {"class": self.class_name, "count": self.count}
        if self.color is not None:
            metadata["color"] = self.color
        if self.position is not None:
            metadata["position"] = list(self.position)
        return metadata


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """A text prompt with GenEval's metadata of what a correct image shows."""

    text: str
    tag: Tag
    include: tuple[Clause, ...]
    exclude: tuple[Clause, ...] = ()

    def to_metadata(self) -> dict[str, Any]:
        """Return the line in GenEval's own key order."""
        metadata: dict[str, Any] = {"tag": self.tag, "include": [clause.to_metadata() for clause in self.include]}
        if self.exclude:
            metadata["exclude"] = [clause.to_metadata() for clause in self.exclude]
        return metadata | {"prompt": self.text}


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Detection:
    """One object that a detector found in an image."""

    class_name: str
    box: Box
    """Left, top, right, bottom in pixels; y grows downward."""
    score: float
    """Confidence in 0..1."""
    color: str | None = None
    """Nearest named colour; None if the detector gives none."""
    quality: float = 1.0
    """How well the object is drawn, in 0..1; 1 if the detector does not say. No verdict looks at it."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Conditioning:
    """The text conditioning of N prompts."""

    tokens: Tensor  # [N, L, D]
    pooled: Tensor  # [N, E]

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, rows: slice | Tensor | list[int]) -> Conditioning:
        return Conditioning(tokens=self.tokens[rows], pooled=self.pooled[rows])

    def to(self, device: device) -> Conditioning:
        """Return a copy on the device."""
        return Conditioning(tokens=self.tokens.to(device), pooled=self.pooled.to(device))


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Trajectory:
    """N denoising runs: their states, velocities and log-probs of the steps taken."""

    latents_NSCHW: Tensor
    velocities_NKCHW: Tensor
    log_probs_NK: Tensor
    """NaN for a deterministic step, which has no density and is never trained."""


Rows = TypeVar("Rows", Conditioning, Trajectory)


def joined(parts: Sequence[Rows]) -> Rows:
    """Concatenate the rows of several conditionings or trajectories."""
    from torch import cat

    kind = type(parts[0])
    names = [field.name for field in dataclasses.fields(kind)]
    return kind(**{name: cat([getattr(part, name) for part in parts]) for name in names})


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class RolloutBatch:
    """The rollout that a policy update learns from."""

    trajectory: Trajectory
    conditioning: Conditioning
    advantages_NK: Tensor
    constant_N: Tensor
    """True for images of a group of equal credits: no forward pass is spent on them."""
