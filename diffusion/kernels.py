"""Step kernels: the Gaussian steps of a stochastic sampler, with exact means, deviations and log-ratios.

Noise and clean latents are both linear in the state and the network's answer, whether that is the noise or v. So a
step of every sampler here is linear too, and a kernel is three numbers per step, worked out once in float64:

    x_{k+1} ~ N(p_k x_k + q_k prediction_k, std_k^2)            x_0 = initial_scale * N(0, 1), x_steps = clean latents

With a = sqrt(abar_t), s = sqrt(1 - abar_t), abar' the level a step goes to and x0, eps as the network predicts them:

    ddim              mean = sqrt(abar') x0 + sqrt(1 - abar' - std^2) eps       Song et al. 2010.02502, Eq. 12 and 16
                      std^2 = eta^2 (1 - abar') / (1 - abar_t) (1 - abar_t / abar')
    ddpm              the posterior q(x' | x_t, x0), "fixed small" variance     Ho et al. 2006.11239, Eq. 7
    euler_ancestral   in units where the noise has deviation sigma = s / a (variance exploding); SDXL-Turbo:
                      mean = x + (sigma_down - sigma) eps, std = sigma_up       k-diffusion
                      sigma_up^2 = sigma'^2 (sigma^2 - sigma'^2) / sigma^2, sigma_down^2 = sigma'^2 - sigma_up^2
    lcm               mean = sqrt(abar') (c_out x0 + c_skip x), std^2 = 1 - abar'; the last step is c_out x0 + c_skip x
                      Luo et al. 2310.04378; DMD2 (2405.14867) re-noises the same way

Timesteps and steps are those of the diffusers scheduler of that name, made from the pipeline's scheduler by
`from_config`, including these:

    ddim goes num_train_timesteps // steps timesteps down, whatever the next timestep is (spacing `linspace` and a
    number of steps that does not divide 1000 make a difference). Where that is below 0, abar' is 1, or abar_0 if the
    scheduler says set_alpha_to_one: false, as all of Stable Diffusion's do. The authors of DDPO and D3PO clamp to
    abar_0 always: the same for set_alpha_to_one: false (the last step is random, std 0.0206 for SD at t = 1), else
    not (the last step has no noise).
    ddpm ends at abar' = 1 always, so its last step has no noise.
    lcm keeps the boundary conditions c_skip = 0.25 / (c^2 t^2 + 0.25), c_out = c t / sqrt(c^2 t^2 + 0.25), with c the
    scheduler's timestep_scaling. At DMD2's timesteps, those of original_inference_steps: 4, they differ from 0 and 1
    by less than 1e-7.

Log-densities are means over C, H, W, the unit in which the clips of DDPO, D3PO, PSO and PRDP are published; times the
number of elements they are the true ones.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import diffusers
import torch
from jaxtyping import Float, Float64, Int64
from torch import Tensor

from diffusion.schedule import ZERO_SNR, NoiseSchedule, PredictionType
from mmalign.errors import UserError, nearest

SCHEDULERS = {
    "ddim": "DDIMScheduler",
    "ddpm": "DDPMScheduler",
    "euler_ancestral": "EulerAncestralDiscreteScheduler",
    "lcm": "LCMScheduler",
}
NOT_FOLLOWED = (
    "thresholding",
    "clip_sample",
    "use_karras_sigmas",
    "use_exponential_sigmas",
    "use_beta_sigmas",
    "use_lu_lambdas",
    "use_flow_sigmas",
)
SMALL_VARIANCES = ("fixed_small", "fixed_small_log")  # one variance, written in two ways
LEAST_SIGNAL = 2.0**-24  # what diffusers' Euler takes for an abar of 0
SIGMA_DATA = 0.5  # of the boundary conditions of consistency models

PLACE = "rollout.kernel"


@dataclass(frozen=True, slots=True, kw_only=True)
class Kernel:
    """A chain of Gaussian steps; see the module's docstring. The rows of a batch may be at different steps.

    Attributes:
        timesteps: what the network is told, from noise to clean.
        initial_scale: deviation of the state that the chain starts from.
        trained: steps 0 to trained - 1 are random; one after them has deviation 0 and no density.
        input_scale: the network sees input_scale * x.
        from_state: p, the mean's part of the state.
        from_prediction: q, the mean's part of the prediction.
        deviation: std.
    """

    timesteps: Int64[Tensor, " steps"]
    initial_scale: float
    trained: int
    input_scale: Float64[Tensor, " steps"]
    from_state: Float64[Tensor, " steps"]
    from_prediction: Float64[Tensor, " steps"]
    deviation: Float64[Tensor, " steps"]

    def __len__(self) -> int:
        return len(self.timesteps)

    def to(self, device: torch.device | str) -> Kernel:
        """The same kernel with its tables on a device."""
        return replace(
            self,
            timesteps=self.timesteps.to(device),
            input_scale=self.input_scale.to(device),
            from_state=self.from_state.to(device),
            from_prediction=self.from_prediction.to(device),
            deviation=self.deviation.to(device),
        )

    def model_input(self, x: Float[Tensor, "rows ..."], step: Int64[Tensor, " rows"]) -> Float[Tensor, "rows ..."]:
        """What the network sees of the state: x, or x / sqrt(sigma^2 + 1) for Euler; fp32 at least."""
        return _rows(self.input_scale, step, x) * x

    def transition(
        self,
        x: Float[Tensor, "rows ..."],
        prediction: Float[Tensor, "rows ..."],
        step: Int64[Tensor, " rows"],
    ) -> tuple[Float[Tensor, "rows ..."], Float[Tensor, " rows"]]:
        """Mean and deviation of the state after a step, fp32 at least; differentiable in x and the prediction.

        Args:
            x: the state at `step`.
            prediction: the network's answer to `model_input(x, step)` at `timesteps[step]`, in its native space.
        """
        mean = _rows(self.from_state, step, x) * x + _rows(self.from_prediction, step, x) * prediction
        return mean, self.deviation[step].to(mean.dtype)


def _rows(table: Tensor, step: Tensor, like: Tensor) -> Tensor:
    """A table's value at the step of each row, shaped to multiply `like` [rows, ...], fp32 at least."""
    values = table[step].to(torch.promote_types(like.dtype, torch.float32))
    return values.view(-1, *(1,) * (like.dim() - 1))


# ---------------------------------------------------------------------------------------- densities of a step


def half_squares(
    x_next: Float[Tensor, "rows ..."], mean: Float[Tensor, "rows ..."], std: Float[Tensor, " rows"]
) -> Float64[Tensor, " rows"]:
    """Mean over elements of (x' - mean)^2 / (2 std^2), added up in float64; -log p but for a constant of the step.

    A difference of two of them is a log-ratio: with half squares of 1/2 and differences of 1e-4, fp32 sums would leave
    three digits.

    Args:
        x_next: the state after the step, a constant.
        std: positive, so of the steps below `Kernel.trained`.
    """
    squares = (x_next - mean).square().flatten(1).mean(1, dtype=torch.float64)
    return squares / (2 * std.double().square())


def log_prob(
    x_next: Float[Tensor, "rows ..."], mean: Float[Tensor, "rows ..."], std: Float[Tensor, " rows"]
) -> Float64[Tensor, " rows"]:
    """log N(x'; mean, std^2), mean over elements. Arguments as for `half_squares`."""
    return -half_squares(x_next, mean, std) - std.double().log() - 0.5 * math.log(2 * math.pi)


def log_ratio(
    x_next: Float[Tensor, "rows ..."],
    mean: Float[Tensor, "rows ..."],
    reference_mean: Float[Tensor, "rows ..."],
    std: Float[Tensor, " rows"],
) -> Float64[Tensor, " rows"]:
    """log N(x'; mean, std^2) - log N(x'; reference_mean, std^2), mean over elements, exactly 0 for equal means.

        [(x' - mean_ref)^2 - (x' - mean)^2] / (2 std^2) = (mean - mean_ref) (2 x' - mean - mean_ref) / (2 std^2)

    The right-hand side has no difference of two large numbers. Arguments as for `half_squares`.
    """
    product = (mean - reference_mean) * ((x_next - mean) + (x_next - reference_mean))
    return product.flatten(1).mean(1, dtype=torch.float64) / (2 * std.double().square())


# ------------------------------------------------------------------------------------------------ the kernels


def make_kernel(name: str, schedule: NoiseSchedule, scheduler: Any, steps: int, eta: float = 1.0) -> Kernel:
    """A kernel that steps as diffusers' scheduler of that name does, on the CPU.

    Args:
        name: ddim, ddpm, euler_ancestral or lcm.
        schedule: noise levels and what the network predicts.
        scheduler: of the pipeline; spacing, offset and the end of the chain are taken from its configuration.
        steps: of the chain.
        eta: ddim's share of ddpm's noise, above 0; 1 for every other kernel.

    Raises:
        UserError: an unknown kernel, a scheduler that it does not follow, or steps it cannot take.
    """
    if name not in SCHEDULERS:
        raise UserError(f"unknown kernel '{name}'", place=PLACE, fix=nearest(name, SCHEDULERS))
    _check_scheduler(name, scheduler)
    _check_levels(schedule, scheduler)
    if not 0 < eta <= 1 or (name != "ddim" and eta != 1):
        allowed = "It goes from above 0, where steps are random, to 1" if name == "ddim" else "Leave it out"
        raise UserError(f"eta is {eta:g} for the kernel {name}", place="rollout.eta", fix=allowed)

    with warnings.catch_warnings():  # diffusers' Euler and numpy 2
        warnings.filterwarnings("ignore", "__array__ implementation", DeprecationWarning)
        sampler = getattr(diffusers, SCHEDULERS[name]).from_config(scheduler.config)
        times = _timesteps(name, scheduler, sampler, steps, len(schedule))
    levels = schedule.alphas_cumprod.detach().cpu().double()
    if schedule.prediction_type == "epsilon" and levels[times].min() <= ZERO_SNR:
        raise UserError(
            f"timestep {int(times[levels[times].argmin()])} keeps nothing of the picture (SNR 0), so that predicted "
            "noise does not say where a step goes",
            place=PLACE,
            fix="Use a scheduler without rescale_betas_zero_snr, or a model that predicts v",
        )
    input_scale, from_state, from_prediction, deviation = _STEPS[name](
        levels, times, schedule.prediction_type, sampler.config, eta
    )
    trained = int((deviation > 0).sum())  # only the last step can be without noise
    if not trained:
        raise UserError(
            f"no step of the kernel {name} is random with {steps} in all: nothing to train on",
            place="rollout.steps",
            fix="Take at least 2",
        )
    return Kernel(
        timesteps=times,
        initial_scale=float(sampler.init_noise_sigma),
        trained=trained,
        input_scale=input_scale,
        from_state=from_state,
        from_prediction=from_prediction,
        deviation=deviation,
    )


Tables: TypeAlias = tuple[Tensor, Tensor, Tensor, Tensor]  # input scale, p, q, std; [steps] each
Line: TypeAlias = tuple[Tensor, Tensor]  # what multiplies the network's input, and its prediction


def _clean_and_noise(abar: Tensor, kind: PredictionType) -> tuple[Line, Line]:
    """x0 and eps as linear forms of the network's input (of unit variance) and its prediction."""
    a, s = abar.sqrt(), (1 - abar).sqrt()
    if kind == "epsilon":
        return (1 / a, -s / a), (torch.zeros_like(a), torch.ones_like(a))
    return (a, -s), (s, a)


def _ddim(levels: Tensor, times: Tensor, kind: PredictionType, config: Any, eta: float) -> Tables:
    below = times - len(levels) // len(times)
    end = torch.ones_like(levels[0]) if config.set_alpha_to_one else levels[0]
    return _posterior(levels[times], torch.where(below >= 0, levels[below.clamp(min=0)], end), kind, eta)


def _ddpm(levels: Tensor, times: Tensor, kind: PredictionType, config: Any, eta: float) -> Tables:
    # The posterior of DDPM is DDIM at eta 1; only where a step goes differs.
    return _posterior(levels[times], torch.cat([levels[times[1:]], torch.ones_like(levels[:1])]), kind, eta)


def _posterior(abar: Tensor, after: Tensor, kind: PredictionType, eta: float) -> Tables:
    clean, noise = _clean_and_noise(abar, kind)
    deviation = eta * ((1 - after) / (1 - abar) * (1 - abar / after)).sqrt()
    kept = (1 - after - deviation.square()).clamp(min=0).sqrt()  # rounding may leave -1e-17 for 0
    state, prediction = (after.sqrt() * x0 + kept * eps for x0, eps in zip(clean, noise, strict=True))
    return torch.ones_like(abar), state, prediction, deviation


def _euler_ancestral(levels: Tensor, times: Tensor, kind: PredictionType, config: Any, eta: float) -> Tables:
    abar = levels[times].clamp(min=LEAST_SIGNAL)
    scale = abar.sqrt()  # 1 / sqrt(sigma^2 + 1)
    sigma = ((1 - abar) / abar).sqrt()
    after = torch.cat([sigma[1:], torch.zeros_like(sigma[:1])])
    up = after * (sigma.square() - after.square()).sqrt() / sigma
    stride = after.square() / sigma - sigma  # sigma_down - sigma, with sigma_down^2 = after^4 / sigma^2
    _, noise = _clean_and_noise(abar, kind)
    return scale, 1 + stride * noise[0] * scale, stride * noise[1], up


def _lcm(levels: Tensor, times: Tensor, kind: PredictionType, config: Any, eta: float) -> Tables:
    clean, _ = _clean_and_noise(levels[times], kind)
    scaled = config.timestep_scaling * times.double()
    root = (scaled.square() + SIGMA_DATA**2).sqrt()
    out, skip = scaled / root, (SIGMA_DATA / root).square()
    after = torch.cat([levels[times[1:]], torch.ones_like(levels[:1])])
    signal = after.sqrt()
    return torch.ones_like(out), signal * (out * clean[0] + skip), signal * out * clean[1], (1 - after).sqrt()


_STEPS: Mapping[str, Callable[[Tensor, Tensor, PredictionType, Any, float], Tables]] = {
    "ddim": _ddim,
    "ddpm": _ddpm,
    "euler_ancestral": _euler_ancestral,
    "lcm": _lcm,
}


# --------------------------------------------------------------------------------------------- what is refused


def _check_scheduler(name: str, scheduler: Any) -> None:
    kind = type(scheduler).__name__
    if not isinstance(getattr(scheduler, "alphas_cumprod", None), Tensor):
        raise UserError(
            f"the kernel {name} cannot follow a {kind}: flow matching and EDM have other noise levels",
            place=PLACE,
            fix="Use a Stable Diffusion 1.x, 2.x or SDXL model",
        )
    for option in NOT_FOLLOWED:
        if scheduler.config.get(option):
            raise UserError(
                f"the model's scheduler, a {kind}, has {option}: true, which no kernel follows",
                place=PLACE,
                fix=f"Set {option} to false in its scheduler_config.json",
            )
    variance = scheduler.config.get("variance_type")
    if name == "ddpm" and variance not in (None, *SMALL_VARIANCES):
        raise UserError(
            f"the model's scheduler has variance_type: {variance}, and the kernel ddpm draws with fixed_small",
            place=PLACE,
            fix="Set variance_type to fixed_small in its scheduler_config.json, or take another kernel",
        )


def _check_levels(schedule: NoiseSchedule, scheduler: Any) -> None:
    """The chain is the sampler's; a training schedule with other noise levels would be a different model's."""
    ours, theirs = (table.detach().cpu().double() for table in (schedule.alphas_cumprod, scheduler.alphas_cumprod))
    if ours.shape != theirs.shape or not torch.allclose(ours, theirs, rtol=1e-3, atol=1e-6):
        raise UserError(
            "training is set to other noise levels than the model's sampler has",
            place=PLACE,
            fix="Leave out model.zero_terminal_snr: rollouts keep to the sampler's",
        )


def _timesteps(name: str, scheduler: Any, sampler: Any, steps: int, count: int) -> Int64[Tensor, " steps"]:
    """Timesteps of the chain, falling; `sampler` is set to them."""
    kind = type(scheduler).__name__
    if name == "lcm" and not isinstance(scheduler, diffusers.LCMScheduler):
        raise UserError(
            f"the timesteps that the model was distilled at are unknown: its scheduler is a {kind}",
            place=PLACE,
            fix="Set model.scheduler to lcm, and model.distilled_steps where they are few (DMD2: 4)",
        )
    most = min(sampler.config.original_inference_steps, count) if name == "lcm" else count
    if not 1 <= steps <= most:
        fix = f"With the kernel {name}, a {kind} knows timesteps for 1 to {most}"
        raise UserError(f"{steps} steps", place="rollout.steps", fix=fix)
    sampler.set_timesteps(steps)
    found: Tensor = sampler.timesteps.cpu().double()
    whole = found.long()
    if (whole != found).any() or whole.min() < 0 or whole.max() >= count or (whole.diff() >= 0).any():
        raise UserError(
            f"{steps} steps of the kernel {name} stop at timesteps {_listed(found)}",
            place="rollout.steps",
            fix="Take another number, or a scheduler with timestep_spacing: trailing",
        )
    return whole


def _listed(values: Tensor) -> str:
    shown = [f"{value:g}" for value in values.tolist()]
    return ", ".join([*shown[:2], "...", *shown[-2:]] if len(shown) > 5 else shown)
