"""Rewards of the states of a trajectory: short deterministic estimates of the clean image, decoded and scored."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import torch
from accelerate import Accelerator
from torch import Tensor

from sfgrpo.grpo.distributed import Partition, row_slices
from sfgrpo.grpo.estimates import clean_estimate, substep_sigmas
from sfgrpo.grpo.nonfinite import broken_images, without_broken_groups
from sfgrpo.policies.base import Policy
from sfgrpo.rewards.base import Reward, raw_rewards
from sfgrpo.runtime.timing import PhaseClock
from sfgrpo.types import Conditioning, Prompt, Trajectory


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class StateScorer:
    """Scorer of the states of trajectories: r_k = R(clean estimate of state k, prompt), and r_K of the image itself."""

    policy: Policy
    reward: Reward
    sigmas_S: Tensor
    states: Sequence[int]
    """States that are scored, ascending to K."""
    num_substeps: int
    """Euler substeps from a state to its estimate, fewer where fewer schedule steps remain."""
    guidance_scale: float
    micro_batch_size: int
    cut: Callable[[int, int], list[slice]] = row_slices
    """Cuts rows into micro-batches; may add empty ones, so that processes that share a model pass equally often."""

    @torch.no_grad()
    def score(
        self,
        trajectory: Trajectory,
        conditioning: Conditioning,
        prompts: Sequence[Prompt],
        group_first_rows: Sequence[int],
        clock: PhaseClock,
        on_pass: Callable[[], None] = lambda: None,
    ) -> Tensor:
        """Return the rewards [N, len(states)] of N images, NaN where the latents or velocities are not finite.

        A group shares state 0, so only the rows in `group_first_rows` are scored there; the others have NaN until
        `collect_rewards`. The phases of `clock` are estimates, decode and reward; `on_pass` follows every micro-batch
        of each, equally often in all processes.
        """
        images, last = range(len(prompts)), len(self.sigmas_S) - 1
        cells = [
            (row, column)
            for column, state in enumerate(self.states)
            if state < last
            for row in (group_first_rows if state == 0 else images)
        ]
        latents = trajectory.latents_NSCHW[:, -1]
        if self.states[0] < last:
            pairs = [(row, self.states[column]) for row, column in cells]
            rows_M, states_M = torch.tensor(pairs, dtype=torch.long, device=latents.device).reshape(-1, 2).unbind(dim=1)
            with clock("estimates"):
                estimates = self.estimate(trajectory, conditioning, rows_M, states_M, on_pass)
                latents = torch.cat([estimates, latents])
        cells += [(row, len(self.states) - 1) for row in images]
        rows, columns = map(list, zip(*cells, strict=True))
        rewards_NS = torch.full((len(prompts), len(self.states)), torch.nan)
        rewards_NS[rows, columns] = self._score_latents(latents, [prompts[row] for row in rows], clock, on_pass)
        return rewards_NS.masked_fill(broken_images(trajectory)[:, None], torch.nan)

    @torch.no_grad()
    def estimate(
        self,
        trajectory: Trajectory,
        conditioning: Conditioning,
        rows_M: Tensor,
        states_M: Tensor,
        on_pass: Callable[[], None] = lambda: None,
    ) -> Tensor:
        """Estimate the clean latents [M, C, H, W] of state `states_M` (below K) of image `rows_M`, in any mixture.

        An estimate is an Euler run to sigma 0. Its first velocity is the one the rollout computed there; with one
        substep nothing else is needed. States of different noise levels share batches: the transformer takes one time
        per sample.
        """
        grids = substep_sigmas(self.sigmas_S, self.num_substeps)
        lengths_M = torch.tensor([len(grid) - 1 for grid in grids], device=states_M.device)[states_M]
        sigmas_MT = torch.nn.utils.rnn.pad_sequence(grids, batch_first=True)[states_M]
        x = trajectory.latents_NSCHW[rows_M, states_M]
        velocity = trajectory.velocities_NKCHW[rows_M, states_M]
        for substep in range(max(len(grid) - 1 for grid in grids)):
            active = (lengths_M > substep).nonzero().flatten()
            if substep > 0:
                parts = [active[part] for part in self.cut(len(active), self.micro_batch_size)]
                if not parts:
                    break
                velocities = []
                for part in parts:
                    inputs = (x[part], sigmas_MT[part, substep], conditioning[rows_M[part]], self.guidance_scale)
                    velocities.append(self.policy.velocity(*inputs))
                    on_pass()
                velocity = torch.cat(velocities)
            # From sigma to 0 the Euler step is the clean estimate x - sigma v itself.
            drop = sigmas_MT[active, substep] - sigmas_MT[active, substep + 1]
            x[active] = clean_estimate(x[active], velocity, drop)
        return x

    def _score_latents(
        self, latents: Tensor, prompts: Sequence[Prompt], clock: PhaseClock, on_pass: Callable[[], None]
    ) -> Tensor:
        """Decode clean latents and reward the images, [N]; a reward may be NaN or infinite."""
        rewards = []
        for part in self.cut(len(latents), self.micro_batch_size):
            if own_prompts := prompts[part]:
                with clock("decode"):
                    images = self.policy.decode(latents[part])
                with clock("reward"):
                    rewards.append(raw_rewards(self.reward, images, own_prompts))
            on_pass()
        return torch.cat(rewards)


def collect_rewards(
    own_rewards_NS: Tensor, *, states: Sequence[int], group_size: int, partition: Partition, accelerator: Accelerator
) -> tuple[Tensor, Tensor]:
    """Gather the rewards of all processes and make them fit for `group_advantages`.

    `own_rewards_NS` are those of `StateScorer.score` for the images of this process. Every member of a group gets the
    reward of its shared start state, and a group with a reward that is not finite becomes constant.

    Returns:
        Rewards of all images of the update in their order, all finite, and which images had one that was not.
    """
    rewards_NS = partition.gather(own_rewards_NS, accelerator)
    # After the gathering: a group may span processes, and only one of them scored its start state.
    return without_broken_groups(share_start_rewards(rewards_NS, states, group_size), group_size)


def share_start_rewards(rewards_NS: Tensor, states: Sequence[int], group_size: int) -> Tensor:
    """Copy the reward of the start state from the first member of each group to the others."""
    if states[0] != 0:
        return rewards_NS
    start_N1 = rewards_NS[::group_size, :1].repeat_interleave(group_size, dim=0)
    return torch.cat([start_N1, rewards_NS[:, 1:]], dim=1)
