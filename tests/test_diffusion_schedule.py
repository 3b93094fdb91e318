"""The noise schedule: published vectors, exact conversions, and the step that teaches nothing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    PNDMScheduler,
)

from diffusion.schedule import NoiseSchedule, rescale_zero_terminal_snr, timestep_choices
from mmalign.errors import UserError

SD: dict[str, Any] = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def exact_table() -> torch.Tensor:
    """Stable Diffusion's abar in float64."""
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    return torch.cumprod(1 - betas, 0)


def exact(prediction_type: Any = "epsilon", table: torch.Tensor | None = None) -> NoiseSchedule:
    table = exact_table() if table is None else table
    return NoiseSchedule(alphas_cumprod=table, prediction_type=prediction_type, final_alpha_cumprod=1.0)


def some(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_published_vector_of_add_noise() -> None:
    x0 = torch.tensor([[0.8, -0.4]], dtype=torch.float64)
    noise = torch.tensor([[1.0, 0.5]], dtype=torch.float64)
    expected = torch.tensor([[1.271225221, 0.2150737687]], dtype=torch.float64)
    noised = exact().add_noise(x0, noise, torch.tensor([500]))
    torch.testing.assert_close(noised, expected, rtol=1e-8, atol=1e-9)


def test_published_table_with_zero_terminal_snr() -> None:
    steps = [249, 499, 749, 999]
    before = torch.tensor([0.6754324137, 0.2776696505, 0.0566234916, 0.0046600985], dtype=torch.float64)
    after = torch.tensor([0.6541890065, 0.2423591666, 0.0331714828, 0.0], dtype=torch.float64)
    torch.testing.assert_close(exact_table()[steps], before, rtol=1e-8, atol=1e-10)
    rescaled = rescale_zero_terminal_snr(exact_table())
    torch.testing.assert_close(rescaled[steps], after, rtol=1e-8, atol=1e-10)
    assert rescaled[999] == 0
    torch.testing.assert_close(rescaled[0], exact_table()[0])
    torch.testing.assert_close(rescale_zero_terminal_snr(rescaled), rescaled)


def test_table_of_diffusers_is_taken_over_and_can_be_rescaled() -> None:
    plain = NoiseSchedule.from_scheduler(DDIMScheduler(**SD))
    assert plain.alphas_cumprod.dtype == torch.float32 and len(plain) == 1000
    torch.testing.assert_close(plain.alphas_cumprod.double(), exact_table(), rtol=2e-5, atol=0)
    zero = NoiseSchedule.from_scheduler(DDIMScheduler(**SD), zero_terminal_snr=True)
    own = NoiseSchedule.from_scheduler(DDIMScheduler(**SD, rescale_betas_zero_snr=True))
    torch.testing.assert_close(zero.alphas_cumprod, own.alphas_cumprod, rtol=1e-3, atol=1e-6)
    assert zero.final_alpha_cumprod == 1.0
    below = NoiseSchedule.from_scheduler(DDIMScheduler(**SD, set_alpha_to_one=False))
    assert below.final_alpha_cumprod == pytest.approx(0.99915)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_noising_and_targets_equal_diffusers(prediction_type: str) -> None:
    scheduler = DDPMScheduler(**SD, prediction_type=prediction_type)
    schedule = NoiseSchedule.from_scheduler(scheduler)
    x0, noise = some(1, 4, 3, 5, 5).float(), some(2, 4, 3, 5, 5).float()
    t = torch.tensor([0, 17, 500, 999])
    torch.testing.assert_close(schedule.add_noise(x0, noise, t), scheduler.add_noise(x0, noise, t))
    expected = noise if prediction_type == "epsilon" else scheduler.get_velocity(x0, noise, t)
    torch.testing.assert_close(schedule.target(x0, noise, t), expected)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_perfect_prediction_gives_back_noise_and_picture(prediction_type: str) -> None:
    schedule = exact(prediction_type)
    x0, noise, t = some(1, 3, 2, 4, 4), some(2, 3, 2, 4, 4), torch.tensor([3, 400, 999])
    x_t, perfect = schedule.add_noise(x0, noise, t), schedule.target(x0, noise, t)
    torch.testing.assert_close(schedule.predicted_noise(perfect, x_t, t), noise)
    torch.testing.assert_close(schedule.predicted_x0(perfect, x_t, t), x0)
    velocity = exact("v_prediction").target(x0, noise, t)
    torch.testing.assert_close(schedule.predicted_velocity(perfect, x_t, t), velocity)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_errors_in_every_space_equal_errors_of_converted_predictions(prediction_type: str) -> None:
    schedule = exact(prediction_type)
    x0, noise, t = some(1, 3, 2, 4, 4), some(2, 3, 2, 4, 4), torch.tensor([3, 400, 999])
    x_t, target = schedule.add_noise(x0, noise, t), schedule.target(x0, noise, t)
    pred = target + 0.1 * some(3, 3, 2, 4, 4)

    def mean_square(difference: torch.Tensor) -> torch.Tensor:
        return difference.square().mean((1, 2, 3))

    velocity = exact("v_prediction").target(x0, noise, t)
    expected = {
        "native": mean_square(pred - target),
        "epsilon": mean_square(schedule.predicted_noise(pred, x_t, t) - noise),
        "x0": mean_square(schedule.predicted_x0(pred, x_t, t) - x0),
        "v": mean_square(schedule.predicted_velocity(pred, x_t, t) - velocity),
    }
    for space, value in expected.items():
        torch.testing.assert_close(schedule.errors(pred, target, t, space=space), value)  # type: ignore[arg-type]  # str


def test_half_precision_is_left_before_anything_is_computed() -> None:
    schedule = NoiseSchedule.from_scheduler(DDIMScheduler(**SD))
    x0, noise, t = some(1, 2, 4, 8, 8).half(), some(2, 2, 4, 8, 8).half(), torch.tensor([10, 900])
    assert schedule.add_noise(x0, noise, t).dtype == torch.float32
    assert schedule.target(x0, noise, t).dtype == torch.float32
    pred = (noise + 0.01).half()
    errors = schedule.errors(pred, noise, t)
    assert errors.dtype == torch.float32
    expected = (pred.float() - noise.float()).square().mean((1, 2, 3))
    torch.testing.assert_close(errors, expected, rtol=0, atol=0)


def test_snr() -> None:
    t = torch.tensor([0, 999])
    torch.testing.assert_close(exact().snr(t), exact_table()[t] / (1 - exact_table()[t]))


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # diffusers' Euler and numpy
@pytest.mark.parametrize("kind", [PNDMScheduler, EulerDiscreteScheduler, EulerAncestralDiscreteScheduler])
def test_schedulers_that_pipelines_ship(kind: Any) -> None:
    torch.testing.assert_close(
        NoiseSchedule.from_scheduler(kind(**SD)).alphas_cumprod.double(), exact_table(), rtol=2e-5, atol=0
    )


def test_prediction_type_of_scheduler_and_override() -> None:
    scheduler = DPMSolverMultistepScheduler(**SD, prediction_type="v_prediction")
    assert NoiseSchedule.from_scheduler(scheduler).prediction_type == "v_prediction"
    assert NoiseSchedule.from_scheduler(scheduler, prediction_type="epsilon").prediction_type == "epsilon"


def test_unsupported_schedulers_are_user_errors() -> None:
    with pytest.raises(UserError, match="FlowMatchEulerDiscreteScheduler has no alphas_cumprod"):
        NoiseSchedule.from_scheduler(FlowMatchEulerDiscreteScheduler())
    with pytest.raises(UserError, match="prediction type 'sample'"):
        NoiseSchedule.from_scheduler(DDIMScheduler(**SD, prediction_type="sample"))


def test_timesteps_that_exist() -> None:
    assert timestep_choices(exact(), None, shared_noise=True).tolist() == list(range(1000))
    assert timestep_choices(exact(), [5, 1], shared_noise=True).tolist() == [5, 1]
    for wrong in (-1, 1000):
        with pytest.raises(UserError, match=rf"timestep {wrong} does not exist.*from 0 to 999"):
            timestep_choices(exact(), [3, wrong], shared_noise=True)
    with pytest.raises(UserError, match="no timesteps"):
        timestep_choices(exact(), [], shared_noise=True)


def test_step_without_signal_is_left_out_exactly_where_it_teaches_nothing() -> None:
    table = rescale_zero_terminal_snr(exact_table())
    noise_net, v_net = exact("epsilon", table), exact("v_prediction", table)
    assert timestep_choices(noise_net, None, shared_noise=True).tolist() == list(range(999))
    assert timestep_choices(noise_net, [249, 499, 749], shared_noise=True).tolist() == [249, 499, 749]
    with pytest.raises(UserError, match=r"timestep 999 keeps nothing.*no gradient"):
        timestep_choices(noise_net, [249, 499, 749, 999], shared_noise=True)
    assert len(timestep_choices(noise_net, None, shared_noise=False)) == 1000
    with pytest.raises(UserError, match="errors in x0 do not exist"):
        timestep_choices(noise_net, [999], shared_noise=False, space="x0")
    assert len(timestep_choices(v_net, None, shared_noise=True)) == 1000
    assert len(timestep_choices(v_net, None, shared_noise=True, space="epsilon")) == 999


@pytest.mark.parametrize(("prediction_type", "silent"), [("epsilon", True), ("v_prediction", False)])
def test_no_signal_and_shared_noise_mean_no_gradient_in_epsilon_alone(prediction_type: str, silent: bool) -> None:
    schedule = exact(prediction_type, rescale_zero_terminal_snr(exact_table()))
    t, noise = torch.tensor([999]), some(3, 1, 2, 4, 4)
    weight = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)

    def error(x0: torch.Tensor) -> torch.Tensor:
        pred = weight * schedule.add_noise(x0, noise, t)
        return schedule.errors(pred, schedule.target(x0, noise, t), t)

    (error(some(1, 1, 2, 4, 4)) - error(some(2, 1, 2, 4, 4))).backward()
    assert weight.grad is not None and (weight.grad.item() == 0) == silent
