"""Diffusion-DPO (Wallace et al., CVPR 2024, 2311.12908): prefer one picture to another through denoising errors.

    e(x0) = mean over C, H, W of (target - prediction(x_t, t, prompt))^2          fp32
    r(x0) = -k (e_policy - e_reference)                                           implicit reward
    loss  = -log sigmoid(r(chosen) - r(rejected))                                 Eq. 14, or any loss of the core

One timestep and one noise per pair, shared by both sides (the authors' code and pseudo-code S9; the equation draws
them independently: `shared_noise: false`). Both sides go through the UNet in one forward.

Where this differs from the authors' code (SalesforceAIResearch/DiffusionDPO, train.py): errors of policy *and*
reference are reduced in fp32 under the same autocast, so that the first margin is exactly 0 (theirs rounds the
reference to fp16); timesteps where nothing of the picture is left are refused instead of trained with zero gradient.
The scale k is theirs by default: 0.5 * beta on mean errors.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from pydantic import Field
from torch import Tensor

from diffusion.comparison import Comparison, ComparisonOptions
from diffusion.parts import PairBatch, Parts, draw_timesteps
from diffusion.schedule import timestep_choices
from mmalign.method import Metrics, OneLoss

FEED = "pairs"


class Options(ComparisonOptions):
    """Keys of the recipe's `method` section."""

    shared_noise: bool = Field(True, description="the same noise on both sides of a pair")
    timesteps: tuple[int, ...] | None = Field(
        None, description="the only timesteps to train at, for few-step models; null: all"
    )


class DiffusionDPO(OneLoss):
    """See the module's docstring."""

    def __init__(self, options: Options, parts: Parts) -> None:
        self._choices = timestep_choices(
            parts.schedule, options.timesteps, shared_noise=options.shared_noise, space=options.error_space
        )
        self._shared_noise = options.shared_noise
        self._comparison = Comparison(options, parts)

    def describe(self) -> dict[str, str]:
        """Lines for the block printed at the start."""
        return self._comparison.describe()

    def losses(self, batch: PairBatch) -> Iterator[tuple[Tensor, Metrics]]:
        draws = batch.draws("noise")
        t = draw_timesteps(draws, self._choices).repeat(2)  # [2 * pairs]
        shape = batch.latents.shape[1:]
        noise = draws.normal(shape)
        noise = torch.cat([noise, noise if self._shared_noise else draws.normal(shape)])
        yield self._comparison.loss(batch, noise, t)


def build(options: Options, parts: Parts) -> DiffusionDPO:
    """The method, from its options and the trainer's parts."""
    return DiffusionDPO(options, parts)
