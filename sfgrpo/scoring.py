"""Scores every state of a trajectory: short deterministic estimates of the clean image, decoded and rewarded."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sfgrpo.estimates import clean_estimate, substep_sigmas
from sfgrpo.policies.base import Policy
from sfgrpo.rewards.base import Reward, checked_rewards
from sfgrpo.rollout import row_slices
from sfgrpo.types import Conditioning, Prompt, Trajectory


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
) -> Tensor:
    """Estimates the clean latents [M, C, H, W] of state `states_M` (below K) of image `rows_M`, in any mixture.

    A state's estimate is an Euler run to sigma 0 in `num_substeps` substeps, or fewer where fewer schedule steps
    remain. Its first velocity is the one the rollout computed there; with one substep nothing else is needed.
    States of different noise levels share batches, since the transformer takes one time per sample.
    """
    grids = substep_sigmas(sigmas_S, num_substeps)
    lengths = torch.tensor([len(grid) - 1 for grid in grids], device=sigmas_S.device)[states_M]
    sigmas = torch.nn.utils.rnn.pad_sequence(grids, batch_first=True)[states_M]
    x = trajectory.latents_NSCHW[rows_M, states_M]
    velocity = trajectory.velocities_NKCHW[rows_M, states_M]
    for substep in range(int(lengths.max())):
        active = (lengths > substep).nonzero().flatten()
        if substep > 0:
            velocity = torch.cat(
                [
                    policy.velocity(
                        x[active[part]],
                        sigmas[active[part], substep],
                        conditioning[rows_M[active[part]]],
                        guidance_scale,
                    )
                    for part in row_slices(len(active), micro_batch_size)
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
    *,
    group_size: int,
    num_substeps: int,
    guidance_scale: float,
    micro_batch_size: int,
) -> Tensor:
    """Rewards of every state, [N, S]: r_k = R(clean estimate of state k, prompt), and r_K of the image itself.

    State 0 is shared by a group, so its reward is computed once per group and repeated.
    """
    num_images, num_states = trajectory.latents_NSCHW.shape[:2]
    pairs = [
        (row, state) for state in range(num_states - 1) for row in range(0, num_images, group_size if state == 0 else 1)
    ]
    rows_M, states_M = torch.tensor(pairs, device=sigmas_S.device).unbind(dim=1)
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
    )
    rewards_NS = torch.empty(num_images, num_states)
    rewards_NS[rows_M.cpu(), states_M.cpu()] = score_latents(
        policy, estimates, [prompts[row] for row in rows_M.tolist()], reward, micro_batch_size
    )
    rewards_NS[:, 0] = rewards_NS[::group_size, 0].repeat_interleave(group_size)
    rewards_NS[:, -1] = score_latents(policy, trajectory.latents_NSCHW[:, -1], prompts, reward, micro_batch_size)
    return rewards_NS


@torch.no_grad()
def score_latents(
    policy: Policy, latents: Tensor, prompts: Sequence[Prompt], reward: Reward, micro_batch_size: int
) -> Tensor:
    """Decodes clean latents and rewards the images, [N]."""
    return torch.cat(
        [
            checked_rewards(reward, policy.decode(latents[part]), prompts[part])
            for part in row_slices(len(latents), micro_batch_size)
        ]
    )
