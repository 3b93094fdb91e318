"""DDIM inversion on models that are known exactly, and against diffusers' own schedulers."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from diffusers import DDIMInverseScheduler, DDIMScheduler
from tiny_models import SCHEDULE
from torch import Tensor

from diffusion.inversion import Denoise, Grid, climb, deviation, inversion_grid, invert
from diffusion.schedule import NoiseSchedule
from mmalign.errors import UserError

SD = {**SCHEDULE, "clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1}
SIGMA = 0.7  # deviation of the pictures that the known model draws


def schedule(prediction_type: str = "epsilon", **changes: Any) -> NoiseSchedule:
    """That of Stable Diffusion, in float64."""
    found = NoiseSchedule.from_scheduler(DDIMScheduler(**{**SD, "prediction_type": prediction_type, **changes}))
    return replace(found, alphas_cumprod=found.alphas_cumprod.double())


def pictures(rows: int = 4) -> Tensor:
    return SIGMA * torch.randn(rows, 2, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def gaussian(given: NoiseSchedule) -> Denoise:
    """The perfect network for pictures that are Gaussian noise of deviation SIGMA: linear in x.

    E[eps | x_t] = s x_t / (a^2 SIGMA^2 + s^2)            E[v | x_t] = a E[eps | x_t] - s E[x0 | x_t]
    """

    def answer(x: Tensor, t: Tensor, rows: Tensor) -> Tensor:
        abar = given.alphas_cumprod[t.clamp(min=0)].view(-1, 1, 1)
        a, s = abar.sqrt(), (1 - abar).sqrt()
        total = abar * SIGMA**2 + 1 - abar
        eps, x0 = s * x / total, a * SIGMA**2 * x / total
        return eps if given.prediction_type == "epsilon" else a * eps - s * x0

    return answer


def landed(denoise: Denoise, x0: Tensor, grid: Grid, **options: Any) -> list[Tensor]:
    return list(climb(denoise, x0, grid, **options))


# ------------------------------------------------------------------------------------------------ the levels


@pytest.mark.parametrize(("steps", "expected"), [(10, range(1, 1000, 100)), (5, range(1, 1000, 200)), (2, (1, 501))])
def test_landings_are_the_levels_of_the_sampler(steps: int, expected: Any) -> None:
    given = schedule()
    grid = inversion_grid(given, steps)
    assert grid.landings.tolist() == list(expected)
    sampler = DDIMScheduler(**SD)
    sampler.set_timesteps(steps)
    assert grid.landings.tolist() == sampler.timesteps.tolist()[::-1]
    assert torch.equal(grid.after, given.alphas_cumprod[grid.landings])
    assert torch.equal(grid.before.alphas_cumprod[1:], grid.after[:-1])
    assert grid.told.tolist() == [0, *expected[:-1]]


def test_any_number_of_steps_stays_within_the_schedule() -> None:
    given = schedule()
    for steps in (2, 3, 7, 30, 333, 499, 500):
        grid = inversion_grid(given, steps)
        assert len(grid) == steps and grid.landings[0] == 1 and grid.landings[-1] < 1000
        assert (grid.landings.diff() == 1000 // steps).all() and (grid.after < grid.before.alphas_cumprod).all()
    for steps in (-1, 0, 1, 501, 1000):
        with pytest.raises(UserError, match=rf"{steps} inversion steps.*method\.steps.*2 to 500"):
            inversion_grid(given, steps)


@pytest.mark.parametrize(("to_one", "start"), [(True, 1.0), (False, 0.99915)])
def test_the_first_step_starts_where_the_sampler_ends(to_one: bool, start: float) -> None:
    given = schedule(set_alpha_to_one=to_one)
    assert inversion_grid(given, 10).before.alphas_cumprod[0].item() == pytest.approx(start, abs=1e-7)
    released = inversion_grid(given, 10, released=True)
    assert released.before.alphas_cumprod[0] == given.alphas_cumprod[0]
    assert released.told.tolist() == [-99, *range(1, 900, 100)]


# -------------------------------------------------------------------------------------------- against diffusers


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("to_one", [True, False])
@pytest.mark.parametrize("steps", [10, 7])
def test_steps_are_those_of_the_inverse_scheduler(prediction_type: str, to_one: bool, steps: int) -> None:
    """Whatever the network answers: today's scheduler asks it at the end of a step, which is the one difference."""
    settings = {**SD, "prediction_type": prediction_type, "set_alpha_to_one": to_one}
    theirs = DDIMInverseScheduler(**settings)
    theirs.set_timesteps(steps)
    given = schedule(**{"prediction_type": prediction_type, "set_alpha_to_one": to_one})
    grid = inversion_grid(given, steps)
    assert grid.landings.tolist() == theirs.timesteps.tolist()

    def answer(x: Tensor, t: Tensor, rows: Tensor) -> Tensor:
        return 0.1 + 0.5 * torch.tanh(x)

    x = pictures()
    for t, ours in zip(theirs.timesteps, landed(answer, x, grid), strict=True):
        x = theirs.step(answer(x, t, t), t, x).prev_sample
        torch.testing.assert_close(ours, x, rtol=1e-5, atol=1e-5)  # their tables are fp32


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_sampling_goes_back_to_the_picture(prediction_type: str) -> None:
    given = schedule(prediction_type)
    denoise, x0 = gaussian(given), pictures()

    def there_and_back(steps: int, renoise: bool) -> float:
        sampler = DDIMScheduler(**SD, prediction_type=prediction_type)
        sampler.set_timesteps(steps)
        x = landed(denoise, x0, inversion_grid(given, steps), renoise=renoise)[-1]
        for t in sampler.timesteps:
            x = sampler.step(denoise(x, t.expand(len(x)), t), t, x).prev_sample
        return ((x - x0).norm() / x0.norm()).item()

    plain = [there_and_back(steps, False) for steps in (10, 40, 160)]
    assert plain[0] < 0.3 and plain[1] < plain[0] / 2 and plain[2] < plain[1] / 2
    for steps, error in zip((10, 40, 160), plain, strict=True):
        assert there_and_back(steps, True) < error


def test_many_steps_follow_the_flow_of_the_known_model() -> None:
    """Along it x_t / sqrt(a^2 SIGMA^2 + s^2) is constant."""
    given = schedule(set_alpha_to_one=True)
    grid = inversion_grid(given, 500)
    x0 = pictures()
    for x, abar in zip(landed(gaussian(given), x0, grid, renoise=True), grid.after, strict=True):
        expected = x0 / SIGMA * (abar * SIGMA**2 + 1 - abar).sqrt()
        torch.testing.assert_close(x, expected, rtol=0.02, atol=0)


def test_a_network_that_always_answers_the_same_is_inverted_exactly() -> None:
    given = schedule(set_alpha_to_one=True)
    x0, noise = pictures(), torch.randn(4, 2, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    grid = inversion_grid(given, 10)
    for t, x in zip(grid.landings, landed(lambda x, t, rows: noise, x0, grid), strict=True):
        torch.testing.assert_close(x, given.add_noise(x0, noise, t.expand(4)), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(given.implied_noise(x, x0, t.expand(4)), noise, rtol=1e-10, atol=1e-10)


def test_renoise_averages_the_noise_at_both_ends() -> None:
    given = schedule()
    grid = inversion_grid(given, 5)
    asked: list[tuple[Tensor, list[int]]] = []

    def answer(x: Tensor, t: Tensor, rows: Tensor) -> Tensor:
        asked.append((x, t.tolist()))
        return torch.sin(x)

    x = pictures()
    (first, second, *_) = landed(answer, x, grid, renoise=True)
    a, b = (float(level) for level in (grid.after[0], grid.after[1]))

    def moved(noise: Tensor) -> Tensor:
        return b**0.5 * (first - (1 - a) ** 0.5 * noise) / a**0.5 + (1 - b) ** 0.5 * noise

    tentative = moved(torch.sin(first))
    torch.testing.assert_close(asked[3][0], tentative, rtol=1e-12, atol=1e-12)
    assert asked[2][1] == asked[3][1] == [1] * 4  # the same timestep for both
    torch.testing.assert_close(second, moved((torch.sin(first) + torch.sin(tentative)) / 2), rtol=1e-12, atol=1e-12)


# ---------------------------------------------------------------------------------------------- rows of a batch


@pytest.mark.parametrize("renoise", [False, True])
def test_rows_of_a_batch_go_as_far_as_each_should(renoise: bool) -> None:
    given = schedule()
    grid, x0, denoise = inversion_grid(given, 10), pictures(5), gaussian(given)
    counts = torch.tensor([3, 10, 1, 0, 3])
    asked: list[list[int]] = []

    def watched(x: Tensor, t: Tensor, rows: Tensor) -> Tensor:
        assert len(t) == len(rows) == len(x)
        asked.append(rows.tolist())
        return denoise(x, t, rows)

    together = invert(watched, x0, grid, counts, renoise=renoise)
    path = [x0, *landed(denoise, x0, grid, renoise=renoise)]
    for row, count in enumerate(counts.tolist()):
        alone = invert(denoise, x0[row : row + 1], grid, counts[row : row + 1], renoise=renoise)
        assert torch.equal(together[row], alone[0])
        assert torch.equal(together[row], path[count][row])
    per_step = [[0, 1, 2, 4], [0, 1, 4], [0, 1, 4], *[[1]] * 7]
    assert asked == [rows for rows in per_step for _ in range(1 + renoise)]  # landed rows cost nothing


def test_split_modules_are_asked_equally_often_everywhere() -> None:
    given = schedule()
    grid, x0, denoise = inversion_grid(given, 10), pictures(2), gaussian(given)
    asked: list[int] = []

    def watched(x: Tensor, t: Tensor, rows: Tensor) -> Tensor:
        asked.append(int(t[0]))
        return denoise(x, t, rows)

    counts = torch.tensor([2, 4])
    assert torch.equal(invert(watched, x0, grid, counts, whole=True), invert(denoise, x0, grid, counts))
    assert asked == grid.told.tolist()


def test_the_landing_is_where_the_implied_noise_leads() -> None:
    given = schedule()
    grid, x0 = inversion_grid(given, 10), pictures(6)
    counts = torch.tensor([1, 2, 4, 6, 9, 10])
    x = invert(gaussian(given), x0, grid, counts)
    t = grid.landings[counts - 1]
    torch.testing.assert_close(given.add_noise(x0, given.implied_noise(x, x0, t), t), x, rtol=1e-12, atol=1e-12)


def test_between_landings_the_target_has_some_of_the_picture_in_it() -> None:
    """The released procedure's: numbers of the specification, eps_inv = f eps + g x0 at t for x that landed on L."""
    given = schedule()
    x0, noise = pictures(1), torch.ones(1, 2, 3, dtype=torch.float64)
    for t, landing, f, g in ((50, 101, 1.487, -0.139), (120, 201, 1.374, -0.179), (450, 501, 1.054, -0.080)):
        x = given.add_noise(x0, noise, torch.tensor([landing]))
        torch.testing.assert_close(
            given.implied_noise(x, x0, torch.tensor([t])), f * noise + g * x0, rtol=0, atol=1.5e-3
        )


# --------------------------------------------------------------------------------------------- noise and precision


def test_noise_on_top_has_the_deviation_of_the_sampler() -> None:
    given = schedule()
    grid = inversion_grid(given, 10, released=True)
    sampler = DDIMScheduler(**SD)
    for step, start in enumerate(grid.told.tolist()):
        assert deviation(grid, step).item() == pytest.approx(
            sampler._get_variance(start + 100, start).sqrt().item(), rel=1e-4
        )
    x0, ones = pictures(3), torch.ones(3, 2, 3, dtype=torch.float64)
    counts = torch.tensor([1, 2, 0])
    noisy = invert(lambda x, t, rows: torch.zeros_like(x), x0, grid, counts, eta=0.1, noise=lambda: ones)
    a = [given.alphas_cumprod[0], *grid.after]
    first = 0.1 * deviation(grid, 0)
    torch.testing.assert_close(noisy[0], (a[1] / a[0]).sqrt() * x0[0] + first, rtol=1e-12, atol=1e-12)
    expected = (a[2] / a[0]).sqrt() * x0[1] + (a[2] / a[1]).sqrt() * first + 0.1 * deviation(grid, 1)
    torch.testing.assert_close(noisy[1], expected, rtol=1e-12, atol=1e-12)
    assert torch.equal(noisy[2], x0[2])


def test_half_precision_and_graphs_stay_outside() -> None:
    given = NoiseSchedule.from_scheduler(DDIMScheduler(**SD))
    grid = inversion_grid(given, 10)
    assert grid.after.dtype == torch.float32
    weight = torch.tensor(0.5, requires_grad=True)
    x0 = pictures().bfloat16()
    x = invert(lambda x, t, rows: (weight * x).bfloat16(), x0, grid, torch.full((4,), 10))
    assert x.dtype == torch.float32 and not x.requires_grad
    for each in climb(lambda x, t, rows: weight * x, x0, grid):
        assert each.dtype == torch.float32 and not each.requires_grad


def test_a_schedule_that_ends_without_signal_can_be_landed_on() -> None:
    scheduler = DDIMScheduler(**SD, prediction_type="v_prediction")
    given = NoiseSchedule.from_scheduler(scheduler, zero_terminal_snr=True)
    given = replace(given, alphas_cumprod=given.alphas_cumprod.double())
    grid = inversion_grid(given, 500)
    assert grid.landings[-1] == 999 and grid.after[-1] < 1e-12
    x0 = pictures()
    last = landed(gaussian(given), x0, grid)[-1]
    torch.testing.assert_close(last, x0 / SIGMA, rtol=0.05, atol=0)  # pure noise, of deviation 1
    torch.testing.assert_close(given.implied_noise(last, x0, torch.full((4,), 999)), last)
