"""The noise schedule of a diffusion model: noising, prediction types, and errors in one space or another.

With abar_t the cumulated signal power, a = sqrt(abar_t) and s = sqrt(1 - abar_t):

    x_t = a x0 + s eps          v = a eps - s x0
    eps = a v + s x_t           x0 = a x_t - s v

Everything is pure and at least fp32: half-precision errors times a logit scale of 2500 are noise of a nat.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeAlias, cast, get_args

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from mmalign.errors import UserError, nearest

PredictionType: TypeAlias = Literal["epsilon", "v_prediction"]
ErrorSpace: TypeAlias = Literal["native", "epsilon", "x0", "v"]

ZERO_SNR = 1e-7  # at or below it nothing of the image is left; some schedulers write 2^-24 for 0


def rescale_zero_terminal_snr(alphas_cumprod: Float[Tensor, " steps"]) -> Float[Tensor, " steps"]:
    """Shift and stretch sqrt(abar) so that the last step keeps no signal and the first is unchanged.

    Lin et al. 2023 (arXiv 2305.08891), algorithm 1. A schedule that ends at 0 already stays as it is.
    """
    root = alphas_cumprod.double().sqrt()
    root = (root - root[-1]) * (root[0] / (root[0] - root[-1]))
    return root.square().to(alphas_cumprod.dtype)


@dataclass(frozen=True, slots=True, kw_only=True)
class NoiseSchedule:
    """Signal power per timestep, and what the network predicts.

    Args:
        alphas_cumprod: abar_t, one per training timestep, falling.
        prediction_type: the network's native target: the noise, or v.
        final_alpha_cumprod: abar of the clean end of a sampling chain, for steps that go below timestep 0.
    """

    alphas_cumprod: Float[Tensor, " steps"]
    prediction_type: PredictionType
    final_alpha_cumprod: float

    @classmethod
    def from_scheduler(
        cls, scheduler: Any, *, zero_terminal_snr: bool = False, prediction_type: str | None = None
    ) -> NoiseSchedule:
        """The schedule of a diffusers scheduler.

        Args:
            scheduler: any that has `alphas_cumprod` (DDIM, DDPM, PNDM, Euler, DPM-Solver, LCM, ...).
            zero_terminal_snr: train on the rescaled schedule, as SDXL-Turbo was distilled.
            prediction_type: overrides the scheduler's.

        Raises:
            UserError: a flow-matching or EDM scheduler, or a network that predicts x0.
        """
        name = type(scheduler).__name__
        table = getattr(scheduler, "alphas_cumprod", None)
        if not isinstance(table, Tensor):
            raise UserError(
                f"the scheduler {name} has no alphas_cumprod: not a variance-preserving diffusion schedule",
                place="model.path",
                fix="Use a Stable Diffusion 1.x, 2.x or SDXL model",
            )
        kind = prediction_type or str(scheduler.config.get("prediction_type", "epsilon"))
        if kind not in get_args(PredictionType):
            raise UserError(
                f"prediction type '{kind}' of {name} is not supported",
                place="model.prediction_type",
                fix=nearest(kind, get_args(PredictionType)),
            )
        table = table.detach().cpu().float()
        if zero_terminal_snr:
            table = rescale_zero_terminal_snr(table)
        final = getattr(scheduler, "final_alpha_cumprod", None)
        return cls(
            alphas_cumprod=table,
            prediction_type=cast(PredictionType, kind),
            final_alpha_cumprod=float(table[0] if final is None else final),
        )

    def __len__(self) -> int:
        return len(self.alphas_cumprod)

    def to(self, device: torch.device | str) -> NoiseSchedule:
        """The same schedule with its table on a device."""
        return replace(self, alphas_cumprod=self.alphas_cumprod.to(device))

    def add_noise(
        self,
        latents: Float[Tensor, "batch ..."],
        noise: Float[Tensor, "batch ..."],
        t: Int64[Tensor, " batch"],
    ) -> Float[Tensor, "batch ..."]:
        """x_t = a x0 + s eps."""
        a, s = self._factors(latents, t)
        return a * latents + s * noise

    def implied_noise(
        self,
        x_t: Float[Tensor, "batch ..."],
        latents: Float[Tensor, "batch ..."],
        t: Int64[Tensor, " batch"],
    ) -> Float[Tensor, "batch ..."]:
        """The noise with which `add_noise` takes the clean latents to x_t: eps = (x_t - a x0) / s."""
        a, s = self._factors(x_t, t)
        return (x_t - a * latents) / s

    def target(
        self,
        latents: Float[Tensor, "batch ..."],
        noise: Float[Tensor, "batch ..."],
        t: Int64[Tensor, " batch"],
    ) -> Float[Tensor, "batch ..."]:
        """What a perfect network would answer: eps, or v = a eps - s x0."""
        a, s = self._factors(latents, t)
        return noise.to(a.dtype) if self.prediction_type == "epsilon" else a * noise - s * latents

    def predicted_noise(
        self, pred: Float[Tensor, "batch ..."], x_t: Float[Tensor, "batch ..."], t: Int64[Tensor, " batch"]
    ) -> Float[Tensor, "batch ..."]:
        """eps that a prediction stands for."""
        a, s = self._factors(pred, t)
        return pred.to(a.dtype) if self.prediction_type == "epsilon" else a * pred + s * x_t

    def predicted_x0(
        self, pred: Float[Tensor, "batch ..."], x_t: Float[Tensor, "batch ..."], t: Int64[Tensor, " batch"]
    ) -> Float[Tensor, "batch ..."]:
        """The clean latents that a prediction stands for; not finite where SNR is 0 and eps is predicted."""
        a, s = self._factors(pred, t)
        return (x_t - s * pred) / a if self.prediction_type == "epsilon" else a * x_t - s * pred

    def predicted_velocity(
        self, pred: Float[Tensor, "batch ..."], x_t: Float[Tensor, "batch ..."], t: Int64[Tensor, " batch"]
    ) -> Float[Tensor, "batch ..."]:
        """v that a prediction stands for; not finite where SNR is 0 and eps is predicted."""
        a, s = self._factors(pred, t)
        return (pred - s * x_t) / a if self.prediction_type == "epsilon" else pred.to(a.dtype)

    def snr(self, t: Int64[Tensor, " batch"]) -> Float[Tensor, " batch"]:
        """Signal-to-noise ratio abar / (1 - abar)."""
        abar = self.alphas_cumprod[t]
        return abar / (1 - abar)

    def errors(
        self,
        pred: Float[Tensor, "batch ..."],
        target: Float[Tensor, "batch ..."],
        t: Int64[Tensor, " batch"],
        *,
        space: ErrorSpace = "native",
    ) -> Float[Tensor, " batch"]:
        """Mean squared error of each item, over all its elements, measured in a space.

        The squared errors of one network are proportional to each other at a timestep:
        e_eps = abar e_v, e_x0 = (1 - abar) e_v, so that e_x0 = (1 - abar) / abar e_eps.

        Args:
            pred: the network's answer, of any dtype; the difference is taken in fp32.
            target: `self.target(...)`.
            space: native is the space that the network predicts in. From eps to x0 or v, an SNR of 0 gives
                infinity: `timestep_choices` refuses it.
        """
        dtype = torch.promote_types(pred.dtype, torch.float32)
        native = (pred.to(dtype) - target.to(dtype)).square().flatten(1).mean(1)
        own: ErrorSpace = "epsilon" if self.prediction_type == "epsilon" else "v"
        if space in ("native", own):
            return native
        abar = self.alphas_cumprod.to(dtype)[t]
        in_v = native / abar if own == "epsilon" else native
        return in_v * {"epsilon": abar, "x0": 1 - abar, "v": torch.ones_like(abar)}[space]

    def _factors(self, like: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """(a, s) of each item, shaped to multiply `like` [batch, ...], fp32 at least."""
        dtype = torch.promote_types(like.dtype, torch.float32)
        abar = self.alphas_cumprod.to(dtype)[t].view(-1, *(1,) * (like.dim() - 1))
        return abar.sqrt(), (1 - abar).sqrt()


def timestep_choices(
    schedule: NoiseSchedule,
    requested: Sequence[int] | None,
    *,
    shared_noise: bool,
    space: ErrorSpace = "native",
    place: str = "method.timesteps",
) -> Int64[Tensor, " choices"]:
    """The timesteps that training draws from, on the CPU.

    Where SNR is 0 the noised picture is the noise alone. With the same noise on both sides and errors
    measured in eps, both sides then have the same error and the gradient is exactly 0; from a network that
    predicts eps, errors in x0 and v do not exist there. A network that predicts v does learn at SNR 0.

    Args:
        requested: timesteps of a recipe (SDXL-Turbo: 249, 499, 749); None for all that can teach something.
        shared_noise: both sides of a pair get the same noise.
        space: of the errors.
        place: configuration key that says which timesteps, for messages.

    Raises:
        UserError: a requested timestep does not exist or cannot teach anything.
    """
    predicts_noise = schedule.prediction_type == "epsilon"
    in_noise = space == "epsilon" or (space == "native" and predicts_noise)
    no_signal = schedule.snr(torch.arange(len(schedule), device=schedule.alphas_cumprod.device)) <= ZERO_SNR
    silent = no_signal.cpu() & (shared_noise if in_noise else predicts_noise)
    if requested is None:
        return (~silent).nonzero().flatten()
    if not requested:
        raise UserError("no timesteps to train on", place=place, fix="Give at least one, or null for all")
    for t in requested:
        if not 0 <= t < len(schedule):
            last = len(schedule) - 1
            raise UserError(f"timestep {t} does not exist", place=place, fix=f"They go from 0 to {last}")
        if silent[t]:
            effect = "a pair with shared noise has no gradient" if in_noise else f"errors in {space} do not exist"
            raise UserError(
                f"timestep {t} keeps nothing of the picture (SNR 0): {effect} there",
                place=place,
                fix="Leave it out",
            )
    return torch.tensor(list(requested), dtype=torch.int64)
