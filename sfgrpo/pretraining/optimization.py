"""What the pretraining loops share: Muon beside AdamW, a step of both, and the log of the losses."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor, nn

from sfgrpo.config.pretrain_schema import PretrainRewardConfig, TransformerConfig

logger = logging.getLogger(__name__)

Optimizers = Mapping[str, tuple[torch.optim.Optimizer, float]]
"""Optimisers by name, each with its peak learning rate."""


def make_optimizers(
    parameters: Mapping[str, nn.Parameter],
    is_matrix: Callable[[str], bool],
    config: TransformerConfig | PretrainRewardConfig,
) -> Optimizers:
    """Return Muon for the two-dimensional weights that `is_matrix` picks by name, and AdamW for all others."""
    matrices = {name: value for name, value in parameters.items() if value.ndim == 2 and is_matrix(name)}
    others = [value for name, value in parameters.items() if name not in matrices]
    rate, muon_rate = config.learning_rate, config.muon_learning_rate
    adamw = torch.optim.AdamW(others, lr=rate, betas=(0.9, 0.95), weight_decay=0.01)
    muon = torch.optim.Muon(matrices.values(), lr=muon_rate, weight_decay=0.01, adjust_lr_fn="match_rms_adamw")
    return {"adamw": (adamw, rate), "muon": (muon, muon_rate)}


def take_step(optimizers: Optimizers, parameters: Iterable[Tensor], rate_factor: float) -> None:
    """Clip the gradient to norm 1, step at `rate_factor` times the peak learning rates, and clear the gradient."""
    nn.utils.clip_grad_norm_(parameters, 1.0)
    for optimizer, rate in optimizers.values():
        optimizer.param_groups[0]["lr"] = rate * rate_factor
        optimizer.step()
        optimizer.zero_grad()


def run_and_log(name: str, steps: Iterable[tuple[int, float]], num_steps: int, every_num_steps: int) -> None:
    """Run a training, given as its (step, loss) pairs, to its end; log the mean loss every so many steps."""
    losses: list[float] = []
    for step, loss in steps:
        losses.append(loss)
        if step % every_num_steps == 0 and step:
            logger.info("%s step %d/%d loss %.4f", name, step, num_steps, sum(losses) / len(losses))
            losses.clear()
