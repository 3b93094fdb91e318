"""DDIM inversion: the way back from a picture to the noise that the model would have drawn it from.

A step goes from the level abar = a, at x, to the noisier level b, with what the network answers at x:

    eps = the noise that prediction(x, told timestep, prompt) stands for
    x'  = sqrt(b / a) (x - sqrt(1 - a) eps) + sqrt(1 - b) eps                Song et al. 2010.02502, Eq. 13, upwards

The levels are those of the model's own sampler with `steps` steps (spacing "leading", offset 1): of 10 steps over 1000
timesteps 1, 101, ..., 901. A sampler's last step ends at the clean level, `final_alpha_cumprod`; so the first one here
begins there. Landing on level t leaves

    eps_inv = (x_t - sqrt(abar_t) x0) / sqrt(1 - abar_t)                     the implied noise

ReNoise averaging (SmPO; Garibi et al. 2403.14602): eps is asked once more at x', with the same told timestep, and the
mean of both makes the step: two answers a step, and a way back that comes closer to where it started.

Everything is at least fp32 and has no graph. No model is known here: `denoise` answers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from diffusion.schedule import NoiseSchedule
from mmalign.errors import UserError

Denoise = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(x [n, ...], told timesteps [n], which rows of the batch they are [n]) -> prediction [n, ...]."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Grid:
    """The levels that an inversion goes through, one entry per step.

    Attributes:
        told: the timestep that the network is told.
        landings: the timestep that a step lands on.
        before: the levels that steps start from: index k is the start of step k.
        after: abar of the landings.
    """

    told: Int64[Tensor, " steps"]
    landings: Int64[Tensor, " steps"]
    before: NoiseSchedule
    after: Float[Tensor, " steps"]

    def __len__(self) -> int:
        return len(self.landings)


def inversion_grid(schedule: NoiseSchedule, steps: int, *, released: bool = False) -> Grid:
    """The grid of a number of steps.

    Args:
        schedule: of the model.
        released: as InPO's authors run it, on diffusers 0.20: the first step tells the network a timestep below 0
            (-99 for 10 steps), which it was never trained with, and starts from abar_0 whatever the sampler ends at.
            Otherwise it is told 0.

    Raises:
        UserError: fewer than 2 steps, or more than half the timesteps.
    """
    trained = len(schedule)
    if not 2 <= steps <= trained // 2:
        raise UserError(
            f"{steps} inversion steps do not fit {trained} timesteps",
            place="method.steps",
            fix=f"Give a number from 2 to {trained // 2}",
        )
    spacing = trained // steps
    table = schedule.alphas_cumprod
    landings = 1 + spacing * torch.arange(steps, device=table.device)
    starts = landings - spacing
    levels = table[starts.clamp(min=0)].clone()
    levels[0] = table[0] if released else schedule.final_alpha_cumprod
    return Grid(
        told=starts if released else starts.clamp(min=0),
        landings=landings,
        before=replace(schedule, alphas_cumprod=levels),
        after=table[landings],
    )


@torch.no_grad()
def ascend(
    denoise: Denoise,
    x: Float[Tensor, "rows ..."],
    rows: Int64[Tensor, " rows"],
    grid: Grid,
    step: int,
    *,
    renoise: bool = False,
) -> Float[Tensor, "rows ..."]:
    """One step of some rows.

    Args:
        denoise: answers.
        x: at the start of the step.
        rows: of the batch: what `denoise` is told about them.
        step: index into the grid.
        renoise: average the noise with what it is at the end of the step.
    """
    number = torch.full_like(rows, step)
    told = grid.told[number]
    before, after = grid.before.alphas_cumprod[step].to(x.dtype), grid.after[step].to(x.dtype)

    def answer(where: Tensor) -> Tensor:
        return grid.before.predicted_noise(denoise(where, told, rows), where, number)

    def moved(noise: Tensor) -> Tensor:
        return (after / before).sqrt() * (x - (1 - before).sqrt() * noise) + (1 - after).sqrt() * noise

    noise = answer(x)
    return moved((noise + answer(moved(noise))) / 2) if renoise else moved(noise)


def climb(
    denoise: Denoise, x0: Float[Tensor, "rows ..."], grid: Grid, *, renoise: bool = False
) -> Iterator[Float[Tensor, "rows ..."]]:
    """x at every landing of the grid, of all rows."""
    x, rows = at_least_fp32(x0), torch.arange(len(x0), device=x0.device)
    for step in range(len(grid)):
        x = ascend(denoise, x, rows, grid, step, renoise=renoise)
        yield x


def invert(
    denoise: Denoise,
    x0: Float[Tensor, "rows ..."],
    grid: Grid,
    counts: Int64[Tensor, " rows"],
    *,
    renoise: bool = False,
    eta: float = 0.0,
    noise: Callable[[], Tensor] | None = None,
    whole: bool = False,
) -> Float[Tensor, "rows ..."]:
    """x after a number of steps of each row's own. Rows that have landed stay where they are and cost nothing.

    Args:
        denoise: answers, for the rows that still move.
        x0: clean latents.
        counts: steps of each row; read on the CPU once.
        renoise: see the module.
        eta: after each step Gaussian noise is added, of eta times the deviation of a DDPM step between its levels:
            sqrt((1 - a) / (1 - b) (1 - b / a)).
        noise: draws standard normal numbers for all rows, once per step; needed where eta is not 0.
        whole: make as many forwards as the grid has steps whatever the counts are: modules whose weights are split
            over processes need the same number of them everywhere.
    """
    x, wanted = at_least_fp32(x0), counts.tolist()
    for step in range(len(grid) if whole else max(wanted)):
        moving = [row for row, count in enumerate(wanted) if count > step]
        rows = torch.tensor(moving or [0], device=x.device)
        moved = ascend(denoise, x[rows], rows, grid, step, renoise=renoise)
        if eta and noise is not None:
            moved = moved + eta * deviation(grid, step).to(x.dtype) * noise()[rows]
        if moving:
            x = x.index_copy(0, rows, moved)
    return x


def deviation(grid: Grid, step: int) -> Float[Tensor, ""]:
    """Deviation of the DDPM posterior between the levels of a step, for noise on top of the inversion."""
    before, after = grid.before.alphas_cumprod[step], grid.after[step]
    return ((1 - before) / (1 - after) * (1 - after / before)).sqrt()


def at_least_fp32(x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """In fp32, or as it is if that is more: half precision has 3 digits, and near t = 0 the noise is 3 % of x."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
