"""Plain fine-tuning on the chosen pictures: the usual denoising loss. The companion every preference result needs.

    loss = mean over C, H, W of (target - prediction(x_t, t, prompt))^2 on the chosen side of each pair

It sees the same pairs in the same order with the same noise as Diffusion-DPO does, and ignores the rejected side.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from pydantic import Field
from torch import Tensor

from diffusion.parts import PairBatch, Parts, draw_timesteps
from diffusion.schedule import timestep_choices
from mmalign.config import Settings
from mmalign.losses import mean_over_pairs
from mmalign.method import Metrics, OneLoss

FEED = "pairs"
FORWARDS = 1.5  # of the chosen side alone, without a reference


class Options(Settings):
    """Keys of the recipe's `method` section."""

    error_space: Literal["native", "epsilon", "x0", "v"] = Field(
        "native", description="what is compared; native is what the model predicts"
    )
    timesteps: tuple[int, ...] | None = Field(None, description="the only timesteps to train at; null: all")


class FineTuning(OneLoss):
    """See the module's docstring."""

    def __init__(self, options: Options, parts: Parts) -> None:
        self._choices = timestep_choices(
            parts.schedule, options.timesteps, shared_noise=False, space=options.error_space
        )
        self._options, self._parts = options, parts

    def losses(self, batch: PairBatch) -> Iterator[tuple[Tensor, Metrics]]:
        parts, options = self._parts, self._options
        pairs = len(batch.keys)
        latents = batch.latents[:pairs]
        draws = batch.draws("noise")
        t = draw_timesteps(draws, self._choices)
        noise = draws.normal(latents.shape[1:])
        noisy = parts.schedule.add_noise(latents, noise, t)
        target = parts.schedule.target(latents, noise, t)
        prediction = parts.predict(parts.module, noisy, t, batch.conditioning.select(slice(0, pairs)))
        errors = parts.schedule.errors(prediction, target, t, space=options.error_space)
        yield mean_over_pairs(errors, batch.weights), {"errors/chosen": errors.detach().mean()}


def build(options: Options, parts: Parts) -> FineTuning:
    """The method, from its options and the trainer's parts."""
    return FineTuning(options, parts)
