"""Scores every state of a trajectory: short deterministic estimates of the clean image, decoded and rewarded."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from sfgrpo.grpo.estimates import clean_estimate, substep_sigmas
from sfgrpo.grpo.rollout import row_slices
from sfgrpo.policies.base import Policy
from sfgrpo.rewards.base import Reward, raw_rewards
from sfgrpo.runtime.timing import PhaseClock
from sfgrpo.types import Conditioning, Prompt, Trajectory

Cut = Callable[[int, int], list[slice]]
"""Cuts a number of rows into slices of at most a micro-batch size, as `row_slices` does."""


@torch.no_grad()
def estimate_states(
    policy: Policy,
    trajectory: Trajectory,
    conditioning: Conditioning,
    sigmas_S: Tensor,
    rows_M: Tensor,
    states_M: Tensor,
    *,
    num_substeps: int,
    guidance_scale: float,
    micro_batch_size: int,
    cut: Cut = row_slices,
) -> Tensor:
    """Estimates the clean latents [M, C, H, W] of state `states_M` (below K) of image `rows_M`, in any mixture.

    A state's estimate is an Euler run to sigma 0 in `num_substeps` substeps, or fewer where fewer schedule steps
    remain. Its first velocity is the one the rollout computed there; with one substep nothing else is needed.
    States of different noise levels share batches, since the transformer takes one time per sample. `cut` may add
    empty slices, so that processes which share a model do the same number of passes.
    """
    grids = substep_sigmas(sigmas_S, num_substeps)
    lengths = torch.tensor([len(grid) - 1 for grid in grids], device=sigmas_S.device)[states_M]
    sigmas = torch.nn.utils.rnn.pad_sequence(grids, batch_first=True)[states_M]
    x = trajectory.latents_NSCHW[rows_M, states_M]
    velocity = trajectory.velocities_NKCHW[rows_M, states_M]
    for substep in range(max(len(grid) - 1 for grid in grids)):
        active = (lengths > substep).nonzero().flatten()
        if substep > 0:
            parts = cut(len(active), micro_batch_size)
            if not parts:
                break
            velocity = torch.cat(
                [
                    policy.velocity(
                        x[active[part]],
                        sigmas[active[part], substep],
                        conditioning[rows_M[active[part]]],
                        guidance_scale,
                    )
                    for part in parts
                ]
            )
        # From sigma to 0 the Euler step is the clean estimate x - sigma v itself.
        drop = sigmas[active, substep] - sigmas[active, substep + 1]
        x[active] = clean_estimate(x[active], velocity, drop)
    return x


@torch.no_grad()
def score_states(
    policy: Policy,
    trajectory: Trajectory,
    conditioning: Conditioning,
    prompts: Sequence[Prompt],
    reward: Reward,
    sigmas_S: Tensor,
    states: Sequence[int],
    *,
    group_first_rows: Sequence[int],
    num_substeps: int,
    guidance_scale: float,
    micro_batch_size: int,
    clock: PhaseClock,
    cut: Cut = row_slices,
) -> Tensor:
    """Rewards of the named states, ascending to K: r_k = R(clean estimate of state k, prompt), and r_K of the image.

    State 0 is shared by a group, so only the rows in `group_first_rows` are scored there, and the others have NaN: see
    `share_start_rewards`. Gives [N, len(states)]; the phases of `clock` are estimates, decode and reward.
    """
    num_images, last = len(prompts), len(sigmas_S) - 1
    columns = {state: column for column, state in enumerate(states)}
    pairs = [
        (row, state)
        for state in states
        if state < last
        for row in (group_first_rows if state == 0 else range(num_images))
    ]
    latents, rows = trajectory.latents_NSCHW[:, -1], list(range(num_images))
    if states[0] < last:
        rows_M, states_M = torch.tensor(pairs, dtype=torch.long, device=sigmas_S.device).reshape(-1, 2).unbind(dim=1)
        with clock("estimates"):
            estimates = estimate_states(
                policy,
                trajectory,
                conditioning,
                sigmas_S,
                rows_M,
                states_M,
                num_substeps=num_substeps,
                guidance_scale=guidance_scale,
                micro_batch_size=micro_batch_size,
                cut=cut,
            )
        latents, rows = torch.cat([estimates, latents]), [*rows_M.tolist(), *rows]
    pairs += [(row, last) for row in range(num_images)]
    rewards_NS = torch.full((num_images, len(states)), float("nan"))
    rewards_NS[rows, [columns[state] for _, state in pairs]] = score_latents(
        policy, latents, [prompts[row] for row in rows], reward, micro_batch_size, clock
    )
    return rewards_NS


def share_start_rewards(rewards_NS: Tensor, states: Sequence[int], group_size: int) -> Tensor:
    """Gives every member of a group the reward of the start state, which was computed for the first member."""
    if states[0] != 0:
        return rewards_NS
    start_N1 = rewards_NS[::group_size, :1].repeat_interleave(group_size, dim=0)
    return torch.cat([start_N1, rewards_NS[:, 1:]], dim=1)


@torch.no_grad()
def score_latents(
    policy: Policy,
    latents: Tensor,
    prompts: Sequence[Prompt],
    reward: Reward,
    micro_batch_size: int,
    clock: PhaseClock,
) -> Tensor:
    """Decodes clean latents and rewards the images, [N]; a reward may be NaN or infinite."""
    rewards = []
    for part in row_slices(len(latents), micro_batch_size):
        with clock("decode"):
            images = policy.decode(latents[part])
        with clock("reward"):
            rewards.append(raw_rewards(reward, images, prompts[part]))
    return torch.cat(rewards)
