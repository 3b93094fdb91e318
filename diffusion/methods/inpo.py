"""InPO (DDIM-InPO; Lu et al., CVPR 2025, arXiv 2503.18454): Diffusion-DPO on the noise that a picture inverts to.

    x_t     = DDIM inversion of x0 by the reference, up to timestep t
    eps_inv = (x_t - sqrt(abar_t) x0) / sqrt(1 - abar_t)
    loss    = Diffusion-DPO's, at x_t, with eps_inv as the noise

Seen from any t the model is a generator of x0 in one step; what it is compared on are then (x0, x_t) that belong
together under the model, instead of x0 with unrelated noise. Both sides have noise of their own and share t.

By default t is drawn from the levels that the inversion lands on (1, 101, ..., 901), the reference inverts, nothing
random is added, and rows of a batch have timesteps of their own. The inversions of the data are then constants: they
are made once and kept beside the latents (`inversion: cached`), and a step costs what a step of Diffusion-DPO costs.
`inversion: online` makes them in every step, for data whose inversions would not fit on a disk.

Where this differs from the authors' code (JaydenLyh/InPO, train.py), which `compat: authors` follows:

- Theirs draws t from 0 to 999 and inverts up to the first level at or above it, but network and implied noise take t
  for the level. They agree in 1 % of the draws; at t = 50 the target is 1.49 eps - 0.14 x0.
- It inverts with the policy, in training mode, so that nothing can be kept and a step costs 2.3 to 2.6 as much.
- It tells the network timestep -99 in the first step, adds Gaussian noise (eta 0.1), independent for both sides, after
  every step, and takes the first pair's t for the whole batch: here a batch of more than one pair is refused.
- Its schedule tables are fp16: 1 - abar_0 is 15 % off. Here they are fp32, in `compat` too.
- The paper's error is that of x0, (1 - abar) / abar times that of eps; the code drops the factor, and so does the
  default here. `error_space: x0` has it.

SmPO (Lu et al., ICML 2025) is the same with `renoise: true`, `steps: 5` and `loss: {smoothed: 1.0}`, on pairs whose
labels have a probability (`data.pairing.spread`). With `compat: authors` its inversion has no Gaussian noise.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import torch
from jaxtyping import Float, Int64
from pydantic import Field, model_validator
from torch import Tensor, nn

from diffusion.comparison import Comparison, ComparisonOptions
from diffusion.inversion import inversion_grid, invert
from diffusion.inversions import Inversions, denoiser, is_split
from diffusion.parts import PairBatch, Parts
from diffusion.schedule import timestep_choices
from mmalign.errors import UserError
from mmalign.method import Metrics, OneLoss
from mmalign.reference import Cached

FEED = "pairs"
ETA = 0.1  # of the authors' noise on top of the inversion


class Options(ComparisonOptions):
    """Keys of the recipe's `method` section."""

    beta: float = Field(2000.0, gt=0, description="strength of the pull to the reference, in `convention`")
    steps: int = Field(10, ge=2, description="of the inversion; their landings are the timesteps to train at")
    renoise: bool = Field(False, description="average the noise over both ends of an inversion step, as SmPO does")
    inversion: Literal["cached", "online"] = Field(
        "cached", description="made once and kept in data.cache, or made in every step"
    )
    compat: Literal["authors"] | None = Field(
        None, description="authors: the released procedure, with its mismatched targets; one pair per forward"
    )

    @model_validator(mode="after")
    def _nothing_to_keep(self) -> Options:
        if self.compat and self.inversion == "cached" and "inversion" in self.model_fields_set:
            raise ValueError("with compat=authors the policy inverts, in every step: nothing can be cached")
        return self


class InPO(OneLoss):
    """See the module's docstring."""

    def __init__(self, options: Options, parts: Parts) -> None:
        self._options, self._parts = options, parts
        self._comparison = Comparison(options, parts)
        self._grid = inversion_grid(parts.schedule, options.steps, released=options.compat == "authors")
        self._kept: Inversions | None = None
        if options.compat:
            if isinstance(parts.reference, Cached):
                raise UserError(
                    "with compat=authors the policy makes the noise, so that reference errors never repeat",
                    place="reference.cache",
                    fix="Set reference.cache=null",
                )
            return
        self._choices = timestep_choices(
            parts.schedule,
            self._grid.landings.tolist(),
            shared_noise=False,
            space=options.error_space,
            place=f"method.steps={options.steps}",
        )
        if options.inversion == "cached":
            self._kept = Inversions(parts, self._grid, renoise=options.renoise)

    def describe(self) -> dict[str, str]:
        """Lines for the block printed at the start."""
        landings, per_step = self._grid.landings, 2 if self._options.renoise else 1
        levels = f"{len(landings)} levels from t = {landings[0]} to {landings[-1]}"
        if self._options.compat:
            drawn = torch.arange(len(self._parts.schedule))[:, None]
            mean = (self._grid.told.cpu() < drawn).sum(1).double().mean().item()
            how = f"{levels}, by the policy as the authors released it: {per_step * mean:.1f} more UNet forwards a row"
        elif self._kept:
            how = f"{levels}, by the reference, kept: {self._kept.describe()}"
        else:
            how = f"{levels}, by the reference: {per_step * (len(landings) + 1) / 2:.1f} more UNet forwards a row"
        return {**self._comparison.describe(), "inversion": how}

    def losses(self, batch: PairBatch) -> Iterator[tuple[Tensor, Metrics]]:
        noise, t = self.released(batch) if self._options.compat else self.on_grid(batch)
        yield self._comparison.loss(batch, noise, t)

    def on_grid(self, batch: PairBatch) -> tuple[Float[Tensor, "rows c h w"], Int64[Tensor, " rows"]]:
        """(implied noise, timestep) of each row, with timesteps that the inversion lands on."""
        parts, device = self._parts, batch.latents.device
        steps = batch.draws("noise", "cpu").integers(len(self._grid)).repeat(2)  # on the CPU: no device is waited for
        t = self._choices[steps].to(device)
        if self._kept is not None:
            if batch.origin is None:
                raise ValueError("the batch does not say which rows it holds")
            return self._kept.noise(batch.origin, steps).to(device), t

        def inverted(module: nn.Module) -> Tensor:
            return invert(
                denoiser(parts.predict, module, batch.conditioning),
                batch.latents,
                self._grid,
                steps + 1,
                renoise=self._options.renoise,
                whole=is_split(module),
            )

        return parts.schedule.implied_noise(parts.reference.run(inverted), batch.latents, t), t

    def released(self, batch: PairBatch) -> tuple[Float[Tensor, "rows c h w"], Int64[Tensor, " rows"]]:
        """The same as the authors released it.

        Raises:
            UserError: more than one pair.
        """
        parts, grid, renoise = self._parts, self._grid, self._options.renoise
        if len(batch.keys) != 1:
            raise UserError(
                "compat=authors takes one timestep for a whole forward, which is right for a single pair",
                place="loop.batch_size",
                fix="Set loop.batch_size=1 and raise loop.accumulation instead",
            )
        draws, shape = batch.draws("noise"), batch.latents.shape[1:]
        t = draws.integers(len(parts.schedule)).repeat(2)
        x = invert(
            denoiser(parts.predict, parts.module, batch.conditioning),
            batch.latents,
            grid,
            (grid.told[None] < t[:, None]).sum(1),
            renoise=renoise,
            eta=0.0 if renoise else ETA,
            noise=lambda: torch.cat([draws.normal(shape), draws.normal(shape)]),
            whole=is_split(parts.module),
        )
        return parts.schedule.implied_noise(x, batch.latents, t), t


def build(options: Options, parts: Parts) -> InPO:
    """The method, from its options and the trainer's parts."""
    return InPO(options, parts)
