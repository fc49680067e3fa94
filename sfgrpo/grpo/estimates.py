"""The clean estimate of a state, and the grid on which a state is run to its end."""

from __future__ import annotations

from jaxtyping import Float, Float32
from torch import Tensor


def clean_estimate(
    x: Float[Tensor, "N C H W"], velocity: Float[Tensor, "N C H W"], sigma: Float[Tensor, " N"]
) -> Float32[Tensor, "N C H W"]:
    """Return x0_hat = x - sigma v, which is E[x0 | x_t] for the ideal velocity (Tweedie's formula)."""
    return x.float() - sigma.float().view(-1, 1, 1, 1) * velocity.float()


def substep_sigmas(sigmas_S: Float[Tensor, " S"], num_substeps: int) -> list[Float[Tensor, " nodes"]]:
    """Return, for every state but the image, the grid on which a short ODE runs from its sigma to 0.

    Entry k starts at sigmas_S[k], ends at 0 and has min(num_substeps, steps that remain) substeps. With one substep
    the ODE is the plain `clean_estimate`; with all that remain it is the rest of the schedule.

    The T' substeps of Stepwise-Flow-GRPO (arXiv:2603.28718) are published, their grid is not. Ours takes schedule
    nodes that are evenly spaced by index: the model only ever sees sigmas of the schedule, and the grid leans towards
    noise as much as the schedule does.
    """
    if num_substeps < 1:
        raise ValueError(f"num_substeps {num_substeps} gives no estimate; use at least 1, which is Tweedie's formula")
    num_steps = len(sigmas_S) - 1
    return [sigmas_S[_even_indices(state, num_steps, num_substeps)] for state in range(num_steps)]


def _even_indices(first: int, last: int, num_intervals: int) -> list[int]:
    """Spread node indices evenly from first to last, rounding half up; at most one interval per index."""
    num_intervals = min(num_intervals, last - first)
    return [first + (2 * i * (last - first) + num_intervals) // (2 * num_intervals) for i in range(num_intervals + 1)]
