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
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from diffusion.parts import (
    PairBatch,
    Parts,
    draw_timesteps,
    mean_over_pairs,
    pair_metrics,
)
from diffusion.schedule import timestep_choices
from mmalign.config import Settings
from mmalign.losses import PairTerms, equivalents, implicit_rewards, logit_scale, weighted_sum
from mmalign.method import Metrics, OneLoss


class Options(Settings):
    """Keys of the recipe's `method` section."""

    beta: float = Field(5000.0, gt=0, description="strength of the pull to the reference, in `convention`")
    convention: Literal["mean_half", "mean", "sum"] = Field(
        "mean_half", description="mean_half: the authors' code; mean: diffusers' SD1.5 script; sum: papers"
    )
    loss: dict[str, float | dict[str, float]] = Field(
        {"sigmoid": 1.0}, description="losses of the core and their weights"
    )
    error_space: Literal["native", "epsilon", "x0", "v"] = Field(
        "native", description="what is compared; native is what the model predicts"
    )
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
        self._options, self._parts = options, parts
        self._scale = logit_scale(options.beta, options.convention, parts.elements)
        self._pair_loss = weighted_sum(options.loss, place="method.loss")

    def describe(self) -> dict[str, str]:
        """Lines for the block printed at the start."""
        same = ", ".join(f"{name} {beta:g}" for name, beta in equivalents(self._scale, self._parts.elements).items())
        return {"logit scale": f"{self._scale:g} on mean errors (beta: {same})"}

    def losses(self, batch: PairBatch) -> Iterator[tuple[Tensor, Metrics]]:
        parts, options = self._parts, self._options
        draws = batch.draws("noise")
        t = draw_timesteps(draws, self._choices).repeat(2)  # [2 * pairs]
        shape = batch.latents.shape[1:]
        noise = draws.normal(shape)
        noise = torch.cat([noise, noise if options.shared_noise else draws.normal(shape)])
        noisy = parts.schedule.add_noise(batch.latents, noise, t)
        target = parts.schedule.target(batch.latents, noise, t)

        def errors(module: nn.Module) -> Tensor:  # [2 * pairs]
            prediction = parts.predict(module, noisy, t, batch.conditioning)
            return parts.schedule.errors(prediction, target, t, space=options.error_space)

        reference = parts.reference.score(batch.row_keys, errors)  # first: no graph is alive while adapters are off
        policy = errors(parts.module)
        rewards = implicit_rewards(policy, reference, self._scale)
        chosen, rejected = rewards.chunk(2)
        terms = PairTerms(
            margin=chosen - rejected,
            scale=self._scale,
            confidence=batch.confidence,
            gap=batch.gap,
            chosen_errors=policy.chunk(2)[0],
        )
        loss = mean_over_pairs(self._pair_loss(terms), batch.weights)
        yield loss, pair_metrics(rewards, policy, reference)


def build(options: Options, parts: Parts) -> DiffusionDPO:
    """The method, from its options and the trainer's parts."""
    return DiffusionDPO(options, parts)
