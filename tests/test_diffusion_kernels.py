"""Step kernels: published vectors, diffusers' own schedulers step by step, densities, and what is refused."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EDMEulerScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    LCMScheduler,
    PNDMScheduler,
)
from torch import Tensor

from diffusion.kernels import Kernel, half_squares, log_prob, log_ratio, make_kernel
from diffusion.schedule import NoiseSchedule
from mmalign.errors import UserError

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # their Euler and numpy

SD: dict[str, Any] = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
PLAIN: dict[str, Any] = {**SD, "clip_sample": False}
# As the pipelines ship them: SD 1.5's steps with DDIM, SDXL-Turbo's, LCM's.
SD_DDIM: dict[str, Any] = {**PLAIN, "set_alpha_to_one": False, "steps_offset": 1}
TURBO: dict[str, Any] = {**SD, "timestep_spacing": "trailing", "steps_offset": 1}
LCM: dict[str, Any] = {**PLAIN, "set_alpha_to_one": False, "steps_offset": 1}
FOUR_STEP: dict[str, Any] = {**LCM, "original_inference_steps": 4}
DMD2 = [999, 749, 499, 249]
SHAPE = (2, 3, 4, 4)


def exact(prediction_type: Any = "epsilon") -> NoiseSchedule:
    """Stable Diffusion's schedule in float64."""
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    return NoiseSchedule(
        alphas_cumprod=torch.cumprod(1 - betas, 0), prediction_type=prediction_type, final_alpha_cumprod=1.0
    )


def f64(*values: float) -> Tensor:
    return torch.tensor([values], dtype=torch.float64)  # one row


def some(seed: int, *shape: int) -> Tensor:
    return torch.randn(*(shape or SHAPE), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def at(step: int, rows: int = 1) -> Tensor:
    return torch.full((rows,), step, dtype=torch.int64)


def close(actual: Tensor, expected: Tensor | float, tolerance: float = 1e-6) -> None:
    expected = torch.as_tensor(expected, dtype=actual.dtype)
    torch.testing.assert_close(actual, expected.expand_as(actual), rtol=tolerance, atol=tolerance)


# ------------------------------------------------------------------------------------------ published vectors


def test_t15_a_ddim_step_with_its_log_density() -> None:
    kernel = make_kernel("ddim", exact(), DDIMScheduler(**SD_DDIM), 20)
    step = at(kernel.timesteps.tolist().index(501))
    x, eps, after = f64(0.5, -1, 0.25, 2), f64(0.1, -0.2, 0.3, 0.9), f64(0.45, -0.9, 0.2, 1.8)
    mean, std = kernel.transition(x, eps, step)
    close(mean, f64(0.5336045375, -1.0672090749, 0.1995978483, 2.0000093091), 1e-9)
    close(std, 0.4293211493, 1e-9)
    close(log_prob(after, mean, std), -0.1242198198, 1e-9)


def test_t15_the_last_step_is_random_where_the_chain_ends_at_the_first_level() -> None:
    kernel = make_kernel("ddim", exact(), DDIMScheduler(**SD_DDIM), 20)
    assert kernel.timesteps[-1] == 1 and kernel.trained == len(kernel) == 20
    close(kernel.deviation[-1:], 0.0206483202, 1e-9)
    # Where it ends at the clean latents instead, it is not.
    clean = make_kernel("ddim", exact(), DDIMScheduler(**{**SD_DDIM, "set_alpha_to_one": True}), 20)
    assert clean.deviation[-1] == 0 and clean.trained == 19


def test_published_levels_of_turbo_and_dmd2() -> None:
    turbo = make_kernel("euler_ancestral", exact(), EulerAncestralDiscreteScheduler(**TURBO), 4)
    assert turbo.timesteps.tolist() == DMD2 and turbo.trained == 3
    sigma = (turbo.input_scale**-2 - 1).sqrt()
    close(sigma, torch.tensor([14.6146, 4.0817, 1.6129, 0.6932], dtype=torch.float64), 5e-5)
    assert turbo.initial_scale == pytest.approx(14.6146, abs=5e-5)
    dmd2 = make_kernel("lcm", exact(), LCMScheduler(**FOUR_STEP), 4)
    assert dmd2.timesteps.tolist() == DMD2 and dmd2.trained == 3 and dmd2.initial_scale == 1
    close(dmd2.deviation[:1], 0.97128, 5e-6)
    assert dmd2.deviation[-1] == 0
    # Their code has no boundary conditions: x0 is the mean of the last step, sqrt(abar') x0 that of the others.
    x, eps = some(1), some(2)
    x0 = exact().predicted_x0(eps, x, at(249, 2))
    close(dmd2.transition(x, eps, at(3, 2))[0], x0, 1e-6)


# ----------------------------------------------------------------------------------------- diffusers, step by step


def timesteps_of(scheduler: Any, steps: int) -> list[int]:
    scheduler.set_timesteps(steps)
    return [int(t) for t in scheduler.timesteps]


@pytest.mark.parametrize("steps", [1, 4, 7, 20, 50])
@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("name", ["ddim", "ddpm", "euler_ancestral"])
def test_timesteps_are_those_of_diffusers(name: str, offset: int, spacing: Any, steps: int) -> None:
    options = {"timestep_spacing": spacing, "steps_offset": offset}
    kind: Any = {"ddim": DDIMScheduler, "ddpm": DDPMScheduler, "euler_ancestral": EulerAncestralDiscreteScheduler}[name]
    own = PNDMScheduler(**SD, **options, set_alpha_to_one=False)
    schedule = NoiseSchedule.from_scheduler(own)
    matching = kind(**SD, **options)
    matching.set_timesteps(steps)
    fractional = bool((matching.timesteps % 1 != 0).any())
    one_deterministic_step = steps == 1 and (name != "ddim" or spacing == "linspace" or offset == 0)
    one_deterministic_step &= not (name == "ddim" and spacing == "trailing")
    if fractional or one_deterministic_step:
        with pytest.raises(UserError, match="stop at timesteps" if fractional else "nothing to train on"):
            make_kernel(name, schedule, own, steps)
        return
    assert make_kernel(name, schedule, own, steps).timesteps.tolist() == [int(t) for t in matching.timesteps]


def test_few_step_timesteps_of_lcm() -> None:
    schedule = exact()
    for steps, expected in [(4, [999, 759, 499, 259]), (8, [999, 879, 759, 639, 499, 379, 259, 139])]:
        assert make_kernel("lcm", schedule, LCMScheduler(**LCM), steps).timesteps.tolist() == expected
        assert timesteps_of(LCMScheduler(**LCM), steps) == expected
    distilled = LCMScheduler(**FOUR_STEP)
    assert make_kernel("lcm", schedule, distilled, 4).timesteps.tolist() == DMD2 == timesteps_of(distilled, 4)
    assert make_kernel("lcm", schedule, distilled, 2).timesteps.tolist() == [999, 499] == timesteps_of(distilled, 2)


def follow(kernel: Kernel, scheduler: Any, seed: int, tolerance: float, **step_options: Any) -> None:
    """Walk down a chain with a scheduler set to its timesteps; every step equals mean + std * the same noise."""
    x = some(seed) * kernel.initial_scale
    assert float(scheduler.init_noise_sigma) == pytest.approx(kernel.initial_scale)
    rows = len(x)
    for number, t in enumerate(scheduler.timesteps):
        step = at(number, rows)
        assert kernel.timesteps[number] == t
        prediction = some(100 + number)
        seen = scheduler.scale_model_input(x, t)
        torch.testing.assert_close(kernel.model_input(x, step), seen.double(), rtol=tolerance, atol=tolerance)
        generator = torch.Generator().manual_seed(number)
        now = int(t) if isinstance(scheduler, LCMScheduler) else t  # a tensor would round its c_skip and c_out to fp32
        theirs = scheduler.step(prediction, now, x, generator=generator, **step_options).prev_sample
        noise = torch.randn(*SHAPE, generator=torch.Generator().manual_seed(number), dtype=prediction.dtype)
        mean, std = kernel.transition(x, prediction, step)
        assert (std > 0).all() == (number < kernel.trained)
        ours = mean + std.view(-1, 1, 1, 1) * noise
        size = max(1.0, float(theirs.abs().max()))
        torch.testing.assert_close(ours / size, theirs.double() / size, rtol=0, atol=tolerance)
        x = theirs.double()


def in_float64(scheduler: Any) -> Any:
    """A scheduler with its tables in float64: what it then computes is exact."""
    scheduler.alphas_cumprod = scheduler.alphas_cumprod.double()
    if hasattr(scheduler, "final_alpha_cumprod"):
        scheduler.final_alpha_cumprod = scheduler.final_alpha_cumprod.double()
    return scheduler


@pytest.mark.parametrize("eta", [0.5, 1.0])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize(
    "options",
    [
        {"set_alpha_to_one": False, "steps_offset": 1},
        {"set_alpha_to_one": True, "steps_offset": 1},
        {"set_alpha_to_one": False},
        {"timestep_spacing": "trailing", "set_alpha_to_one": False},
        {"timestep_spacing": "linspace"},
    ],
)
def test_ddim_follows_diffusers(options: dict[str, Any], prediction_type: Any, eta: float) -> None:
    scheduler = DDIMScheduler(**PLAIN, **options, prediction_type=prediction_type)
    schedule = NoiseSchedule.from_scheduler(scheduler)
    for steps in (10, 7):
        kernel = make_kernel("ddim", schedule, scheduler, steps, eta)
        twin = in_float64(DDIMScheduler.from_config(scheduler.config))
        twin.set_timesteps(steps)
        follow(kernel, twin, 1, 1e-9, eta=eta)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
def test_ddpm_follows_diffusers(spacing: Any, prediction_type: Any) -> None:
    options = {"timestep_spacing": spacing, "steps_offset": 1, "prediction_type": prediction_type}
    scheduler = DDPMScheduler(**PLAIN, **options, variance_type="fixed_small")
    schedule = NoiseSchedule.from_scheduler(scheduler)
    for steps in (10, 7):
        kernel = make_kernel("ddpm", schedule, scheduler, steps)
        assert kernel.trained == steps - 1
        twin = in_float64(DDPMScheduler.from_config(scheduler.config))
        twin.set_timesteps(steps)
        follow(kernel, twin, 2, 1e-9)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("spacing", ["leading", "trailing"])
def test_euler_ancestral_follows_diffusers(spacing: Any, prediction_type: Any) -> None:
    """Turbo's configuration among them. diffusers steps in fp32 here, so the agreement is fp32's."""
    options = {**SD, "timestep_spacing": spacing, "prediction_type": prediction_type}
    scheduler = EulerAncestralDiscreteScheduler(**options)
    schedule = NoiseSchedule.from_scheduler(scheduler)
    for steps in (4, 9):
        kernel = make_kernel("euler_ancestral", schedule, scheduler, steps)
        assert kernel.trained == steps - 1
        twin = EulerAncestralDiscreteScheduler.from_config(scheduler.config)
        twin.set_timesteps(steps)
        follow(kernel, twin, 3, 5e-6)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("scaling", [10.0, 0.02])  # the second makes the boundary conditions visible
def test_lcm_follows_diffusers(scaling: float, prediction_type: Any) -> None:
    scheduler = LCMScheduler(**LCM, prediction_type=prediction_type, timestep_scaling=scaling)
    schedule = NoiseSchedule.from_scheduler(scheduler)
    for steps in (4, 8):
        twin = in_float64(LCMScheduler.from_config(scheduler.config))
        twin.set_timesteps(steps)
        follow(make_kernel("lcm", schedule, scheduler, steps), twin, 4, 1e-9)
    # DMD2's timesteps, as its authors give them to this scheduler
    distilled = LCMScheduler.from_config(scheduler.config, original_inference_steps=4)
    explicit = in_float64(LCMScheduler.from_config(scheduler.config))
    explicit.set_timesteps(timesteps=DMD2)
    follow(make_kernel("lcm", schedule, distilled, 4), explicit, 5, 1e-9)


@pytest.mark.parametrize("name", ["ddim", "ddpm", "euler_ancestral"])
def test_networks_that_predict_v_follow_diffusers_from_pure_noise(name: str) -> None:
    """A schedule rescaled to end without signal: the first step starts at abar 0."""
    options = {**SD, "prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    kind: Any = {"ddim": DDIMScheduler, "ddpm": DDPMScheduler, "euler_ancestral": EulerAncestralDiscreteScheduler}[name]
    scheduler = kind(**options, **({} if name == "euler_ancestral" else {"clip_sample": False}))
    kernel = make_kernel(name, NoiseSchedule.from_scheduler(scheduler), scheduler, 10)
    assert kernel.timesteps[0] == 999 and all(
        table.isfinite().all() for table in (kernel.from_state, kernel.from_prediction, kernel.deviation)
    )
    twin = kind.from_config(scheduler.config)
    if name != "euler_ancestral":
        in_float64(twin)
    twin.set_timesteps(10)
    follow(kernel, twin, 6, 5e-6 if name == "euler_ancestral" else 1e-9, **({"eta": 1.0} if name == "ddim" else {}))


@pytest.mark.parametrize("name", ["ddim", "ddpm", "euler_ancestral"])
def test_the_configuration_of_another_scheduler_is_taken_over(name: str) -> None:
    """Pipelines ship with samplers that have no kernel: the matching one is made from their configuration."""
    shipped = PNDMScheduler(**SD, steps_offset=1, set_alpha_to_one=False, timestep_spacing="leading")
    kernel = make_kernel(name, NoiseSchedule.from_scheduler(shipped), shipped, 50)
    assert kernel.timesteps.tolist() == list(range(981, 0, -20))
    assert kernel.trained == (50 if name == "ddim" else 49)


# ----------------------------------------------------------------------------------------------- properties


def every_kernel(schedule: NoiseSchedule) -> dict[str, Kernel]:
    shipped = DDIMScheduler(**SD_DDIM)
    return {
        "ddim": make_kernel("ddim", schedule, shipped, 10, 0.7),
        "ddpm": make_kernel("ddpm", schedule, shipped, 10),
        "euler_ancestral": make_kernel("euler_ancestral", schedule, EulerAncestralDiscreteScheduler(**TURBO), 4),
        "lcm": make_kernel("lcm", schedule, LCMScheduler(**FOUR_STEP), 4),
    }


NAMES = ["ddim", "ddpm", "euler_ancestral", "lcm"]


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("name", NAMES)
def test_marginals_stay_exact_when_all_pictures_are_the_same(name: str, prediction_type: Any) -> None:
    """With a single picture the best network is known: from q(x_t) every kernel then leads to q of the next level."""
    schedule = exact(prediction_type)
    kernel, picture = every_kernel(schedule)[name], 0.7
    for number in range(len(kernel)):
        t = kernel.timesteps[number : number + 1]
        a, s = schedule.alphas_cumprod[t].sqrt(), (1 - schedule.alphas_cumprod[t]).sqrt()
        stretch = 1 / kernel.input_scale[number]  # the chain's state in units of the network's input

        def after(noise: Tensor, t: Tensor = t, state: Tensor = stretch, number: int = number) -> Tensor:
            """The step's mean from the picture with that noise, through the perfect network."""
            clean = torch.full_like(noise, picture)
            x = state * schedule.add_noise(clean, noise, t)
            return kernel.transition(x, schedule.target(clean, noise, t), at(number))[0]

        offset = after(f64(0.0))
        slope = after(f64(1.0)) - offset
        variance = slope.square() + kernel.deviation[number] ** 2
        if number + 1 < len(kernel):
            # ddim and ddpm of this configuration, like the others, step to the next timestep of the list
            next_abar = schedule.alphas_cumprod[kernel.timesteps[number + 1]]
            unit = 1 / kernel.input_scale[number + 1]
        else:
            next_abar = torch.tensor(1.0) if name != "ddim" else schedule.alphas_cumprod[0]
            unit = torch.tensor(1.0)
        close(offset.flatten(), float(unit * next_abar.sqrt() * picture), 1e-6)
        close(variance.flatten(), float(unit**2 * (1 - next_abar)), 1e-6)
        assert a > 0 and s > 0


def test_ddpm_is_ddim_at_eta_one_until_the_last_step() -> None:
    shipped = DDIMScheduler(**SD_DDIM)
    ddim, ddpm = make_kernel("ddim", exact(), shipped, 10), make_kernel("ddpm", exact(), shipped, 10)
    for table in ("timesteps", "from_state", "from_prediction", "deviation"):
        assert torch.equal(getattr(ddim, table)[:-1], getattr(ddpm, table)[:-1])
    assert ddpm.deviation[-1] == 0 < ddim.deviation[-1]


def test_eta_scales_the_deviation() -> None:
    shipped = DDIMScheduler(**SD_DDIM)
    full, half = (make_kernel("ddim", exact(), shipped, 10, eta) for eta in (1.0, 0.5))
    torch.testing.assert_close(half.deviation, full.deviation / 2)


@pytest.mark.parametrize("name", NAMES)
def test_rows_may_be_at_different_steps(name: str) -> None:
    kernel = every_kernel(exact())[name]
    x, prediction, steps = some(1, 4, 2, 3, 3), some(2, 4, 2, 3, 3), torch.tensor([2, 0, 3, 0])
    seen, (mean, std) = kernel.model_input(x, steps), kernel.transition(x, prediction, steps)
    for row, number in enumerate(steps.tolist()):
        alone = slice(row, row + 1)
        one_mean, one_std = kernel.transition(x[alone], prediction[alone], at(number))
        assert torch.equal(mean[alone], one_mean) and torch.equal(std[alone], one_std)
        assert torch.equal(seen[alone], kernel.model_input(x[alone], at(number)))
    assert std[0] != std[1] == std[3]


@pytest.mark.parametrize("name", NAMES)
def test_half_precision_is_left_before_anything_is_computed(name: str) -> None:
    kernel = every_kernel(exact())[name]
    x, prediction = some(1), some(2).half()
    mean, std = kernel.transition(x.half(), prediction, at(0, 2))
    assert mean.dtype == std.dtype == torch.float32 and kernel.model_input(x.half(), at(0, 2)).dtype == torch.float32
    wide, _ = kernel.transition(x.half().double(), prediction.double(), at(0, 2))
    torch.testing.assert_close(mean.double(), wide, rtol=1e-5, atol=1e-5)
    # An answer in half precision beside an fp32 state is widened too.
    assert kernel.transition(x.float(), prediction, at(0, 2))[0].dtype == torch.float32


def test_tables_move_together() -> None:
    moved = every_kernel(exact())["ddim"].to("meta")
    tables = (moved.timesteps, moved.input_scale, moved.from_state, moved.from_prediction, moved.deviation)
    assert {table.device.type for table in tables} == {"meta"} and moved.trained == 10


# ----------------------------------------------------------------------------------------------- densities


def gaussians() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return some(1), some(1) + 0.1 * some(2), some(1) - 0.1 * some(3), torch.tensor([0.3, 1.7], dtype=torch.float64)


def test_log_density_is_the_normal_distributions() -> None:
    x, mean, _, std = gaussians()
    normal = torch.distributions.Normal(mean, std.view(-1, 1, 1, 1))
    close(log_prob(x, mean, std), normal.log_prob(x).flatten(1).mean(1), 1e-12)


def test_log_ratio_is_the_difference_of_log_densities_and_of_half_squares() -> None:
    x, mean, reference, std = gaussians()
    expected = log_prob(x, mean, std) - log_prob(x, reference, std)
    assert expected.abs().min() > 1e-5
    close(log_ratio(x, mean, reference, std), expected, 1e-12)
    close(half_squares(x, reference, std) - half_squares(x, mean, std), expected, 1e-12)
    close(log_ratio(x, reference, mean, std), -expected, 1e-12)


def test_log_ratio_by_hand() -> None:
    """x' = 1, mean 0.5, reference 2, std 0.5: [(1 - 2)^2 - (1 - 0.5)^2] / 0.5 = 1.5; a second element adds 0."""
    x, mean, reference = f64(1, 4), f64(0.5, 4), f64(2, 4)
    close(log_ratio(x, mean, reference, torch.tensor([0.5], dtype=torch.float64)), 0.75, 1e-12)
    close(half_squares(x, mean, torch.tensor([0.5], dtype=torch.float64)), 0.25, 1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equal_means_have_log_ratio_exactly_zero(dtype: torch.dtype) -> None:
    x, mean, _, std = (value.to(dtype) for value in gaussians())
    assert torch.equal(log_ratio(x, mean, mean.clone(), std), torch.zeros(2, dtype=torch.float64))


def test_fp32_states_leave_a_small_log_ratio_its_digits() -> None:
    """Means 1e-4 std apart, over as many elements as SD 1.5 has."""
    x, direction = some(1, 1, 4, 64, 64).float(), some(2, 1, 4, 64, 64).float()
    std, mean = torch.tensor([0.05]), x + 0.05 * some(3, 1, 4, 64, 64).float()
    moved = mean + 5e-6 * direction
    expected = log_ratio(x.double(), moved.double(), mean.double(), std.double())
    actual = log_ratio(x, moved, mean, std)
    assert 1e-8 < expected.abs() < 1e-4
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=0)


def test_autograd_agrees_with_finite_differences() -> None:
    kernel, x, after = every_kernel(exact())["euler_ancestral"], some(1, 2, 3), some(2, 2, 3)
    steps = torch.tensor([0, 2])
    reference, _ = kernel.transition(x, some(4, 2, 3), steps)

    def ratio(prediction: Tensor) -> Tensor:
        mean, std = kernel.transition(x, prediction, steps)
        return log_ratio(after, mean, reference, std)

    def density(prediction: Tensor) -> Tensor:
        return log_prob(after, *kernel.transition(x, prediction, steps))

    for function in (ratio, density):
        assert torch.autograd.gradcheck(function, some(3, 2, 3).requires_grad_())
    # The reference is a constant: ratio and density have the same gradient.
    prediction = some(3, 2, 3).requires_grad_()
    first, second = (torch.autograd.grad(function(prediction).sum(), prediction)[0] for function in (ratio, density))
    torch.testing.assert_close(first, second)


def test_while_sampling_half_squares_are_those_of_the_noise() -> None:
    kernel, noise = every_kernel(exact())["ddpm"], some(3)
    mean, std = kernel.transition(some(1), some(2), torch.tensor([4, 7]))
    after = mean + std.view(-1, 1, 1, 1) * noise
    close(half_squares(after, mean, std), noise.square().flatten(1).mean(1) / 2, 1e-9)
    assert half_squares(after.float(), mean.float(), std.float()).dtype == torch.float64
    constant = std.log() + 0.5 * math.log(2 * math.pi)
    close(log_prob(after, mean, std), -(noise.square().flatten(1).mean(1) / 2 + constant), 1e-9)


# ------------------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("name", "shipped", "arguments", "message"),
    [
        pytest.param(
            "eulr_ancestral",
            (DDIMScheduler, SD_DDIM),
            {},
            r"^unknown kernel 'eulr_ancestral' \(rollout\.kernel\)\. Did you mean 'euler_ancestral'\?$",
            id="name",
        ),
        pytest.param(
            "ddim",
            (FlowMatchEulerDiscreteScheduler, {}),
            {},
            r"ddim cannot follow a FlowMatchEuler.*flow matching",
            id="flow",
        ),
        pytest.param("ddim", (EDMEulerScheduler, {}), {}, r"ddim cannot follow a EDMEulerScheduler.*EDM", id="edm"),
        pytest.param(
            "ddim", (DDIMScheduler, SD), {}, r"DDIMScheduler, has clip_sample: true.*scheduler_config", id="clipping"
        ),
        pytest.param(
            "ddim", (DDIMScheduler, {**PLAIN, "thresholding": True}), {}, "has thresholding: true", id="thresholding"
        ),
        pytest.param(
            "euler_ancestral",
            (EulerDiscreteScheduler, {**SD, "use_karras_sigmas": True}),
            {},
            r"has use_karras_sigmas: true, which no kernel follows \(rollout\.kernel\)\. Set use_karras",
            id="karras",
        ),
        pytest.param(
            "ddim",
            (DPMSolverMultistepScheduler, {**SD, "use_lu_lambdas": True}),
            {},
            "has use_lu_lambdas: true",
            id="lu",
        ),
        pytest.param(
            "ddpm",
            (DDPMScheduler, {**PLAIN, "variance_type": "fixed_large"}),
            {},
            r"variance_type: fixed_large, and the kernel ddpm draws with fixed_small \(rollout\.kernel\)",
            id="variance",
        ),
        pytest.param(
            "ddim",
            (DDIMScheduler, {**PLAIN, "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}),
            {"zero": True},
            r"timestep 999 keeps nothing of the picture.*\(rollout\.kernel\)\. Use a scheduler without rescale_betas",
            id="no signal",
        ),
        pytest.param(
            "ddim",
            (DDIMScheduler, SD_DDIM),
            {"zero": True},
            r"other noise levels than the model's sampler has.*Leave out model\.zero_terminal_snr",
            id="other levels",
        ),
        pytest.param(
            "lcm",
            (EulerDiscreteScheduler, SD),
            {},
            r"are unknown: its scheduler is a EulerDiscreteScheduler \(rollout\.kernel\).*distilled_steps.*DMD2: 4\)$",
            id="unknown timesteps",
        ),
        pytest.param(
            "lcm",
            (LCMScheduler, {**LCM, "original_inference_steps": 4}),
            {"steps": 8},
            r"8 steps \(rollout\.steps\)\. With the kernel lcm, a LCMScheduler knows timesteps for 1 to 4$",
            id="more than distilled",
        ),
        pytest.param("ddim", (DDIMScheduler, SD_DDIM), {"steps": 0}, r"^0 steps \(rollout\.steps\)", id="none"),
        pytest.param(
            "ddim", (DDIMScheduler, SD_DDIM), {"steps": 1001}, r"knows timesteps for 1 to 1000", id="too many"
        ),
        pytest.param(
            "ddim",
            (DDIMScheduler, SD_DDIM),
            {"steps": 1000},
            r"1000 steps of the kernel ddim stop at timesteps 1000, 999, \.\.\., 2, 1 \(rollout\.steps\)",
            id="beyond the last",
        ),
        pytest.param(
            "euler_ancestral",
            (EulerAncestralDiscreteScheduler, {**SD, "timestep_spacing": "linspace"}),
            {"steps": 3},
            r"stop at timesteps 999, 499\.5, 0 \(rollout\.steps\).*timestep_spacing: trailing",
            id="fractional",
        ),
        pytest.param(
            "euler_ancestral",
            (EulerAncestralDiscreteScheduler, TURBO),
            {"steps": 1},
            r"no step of the kernel euler_ancestral is random with 1 in all.*\(rollout\.steps\)\. Take at least 2",
            id="one step",
        ),
        pytest.param(
            "ddim", (DDIMScheduler, SD_DDIM), {"eta": 0.0}, r"eta is 0 for the kernel ddim \(rollout\.eta\)", id="eta 0"
        ),
        pytest.param("ddim", (DDIMScheduler, SD_DDIM), {"eta": 1.5}, r"eta is 1\.5", id="eta 1.5"),
        pytest.param("ddim", (DDIMScheduler, SD_DDIM), {"eta": math.nan}, r"eta is nan", id="eta nan"),
        pytest.param(
            "ddpm",
            (DDIMScheduler, SD_DDIM),
            {"eta": 0.5},
            r"eta is 0\.5 for the kernel ddpm.*Leave it out",
            id="eta elsewhere",
        ),
    ],
)
def test_what_a_kernel_cannot_do_is_one_line(
    name: str, shipped: tuple[Any, dict[str, Any]], arguments: dict[str, Any], message: str
) -> None:
    kind, options = shipped
    scheduler = kind(**options)
    source = scheduler if isinstance(getattr(scheduler, "alphas_cumprod", None), Tensor) else DDIMScheduler(**SD)
    settings = {"steps": 4, **arguments}
    schedule = NoiseSchedule.from_scheduler(source, zero_terminal_snr=settings.pop("zero", False))
    with pytest.raises(UserError, match=message) as error:
        make_kernel(name, schedule, scheduler, **settings)
    assert "\n" not in str(error.value)
