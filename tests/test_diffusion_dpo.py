"""Diffusion-DPO against its formula written out with diffusers' own scheduler, one picture at a time."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from diffusers import DDPMScheduler
from tiny_worlds import Spy, World, make_worlds, parts
from torch import Tensor, nn

from diffusion import adapters
from diffusion.cache import prepare
from diffusion.methods import dpo, sft
from diffusion.parts import PairBatch, Parts, draw_timesteps
from diffusion.schedule import timestep_choices
from diffusion.settings import LatentSettings
from mmalign.errors import UserError
from mmalign.losses import mean_over_pairs
from mmalign.reference import FrozenCopy

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

BETA = 5000.0


@pytest.fixture(scope="module")
def worlds(tmp_path_factory: pytest.TempPathFactory) -> dict[str, World]:
    return make_worlds(tmp_path_factory.mktemp("worlds"))


@pytest.fixture(params=["sd", "sdxl", "v"])
def world(request: pytest.FixtureRequest, worlds: dict[str, World]) -> World:
    return worlds[request.param]


@pytest.fixture
def sd(worlds: dict[str, World]) -> World:
    return worlds["sd"]


def loss_of(given: Parts, batch: PairBatch, **options: Any) -> tuple[Tensor, dict[str, Tensor]]:
    method = dpo.build(dpo.Options(**options), given)
    ((loss, metrics),) = list(method.losses(batch))
    return loss, dict(metrics)


def draws_of(given: Parts, batch: PairBatch) -> tuple[Tensor, Tensor]:
    """(timestep, noise) per pair as the method draws them."""
    draws = batch.draws("noise")
    t = draw_timesteps(draws, timestep_choices(given.schedule, None, shared_noise=True))
    return t, draws.normal(batch.latents.shape[1:])


# ------------------------------------------------------------------------------------------------ the formula


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_loss_as_published_one_picture_at_a_time(world: World, kind: str) -> None:
    """Policy and reference in forwards of their own, one row each; ours runs both sides in one forward."""
    given, batch = parts(world, kind, perturbed=0.02), world.batch()
    loss, metrics = loss_of(given, batch, beta=BETA)

    scheduler = DDPMScheduler.from_config(world.model.pipeline.scheduler.config)
    pairs = len(batch.keys)
    t, noise = draws_of(given, batch)
    errors = {}
    for side in (0, 1):
        for pair in range(pairs):
            row = slice(side * pairs + pair, side * pairs + pair + 1)
            x0, eps, when = batch.latents[row], noise[pair : pair + 1], t[pair : pair + 1]
            noisy = scheduler.add_noise(x0, eps, when)
            target = scheduler.get_velocity(x0, eps, when) if scheduler.config.prediction_type != "epsilon" else eps
            with torch.no_grad():
                for name, unet in (("policy", given.module), ("reference", world.model.unet)):
                    prediction = world.model.predict(unet, noisy, when, batch.conditioning.select(row))
                    errors[name, side, pair] = (prediction - target).square().mean().item()
    margins = [
        -0.5
        * BETA
        * (
            (errors["policy", 0, pair] - errors["reference", 0, pair])
            - (errors["policy", 1, pair] - errors["reference", 1, pair])
        )
        for pair in range(pairs)
    ]
    expected = sum(math.log1p(math.exp(-margin)) for margin in margins) / pairs
    assert abs(expected - math.log(2)) > 0.02  # far enough from the start to mean something
    assert loss.item() == pytest.approx(expected, rel=2e-3)
    assert metrics["rewards/margins"].item() == pytest.approx(sum(margins) / pairs, abs=5e-3)
    assert metrics["rewards/accuracies"].item() == pytest.approx(sum(margin > 0 for margin in margins) / pairs)
    for side, name in ((0, "chosen"), (1, "rejected")):
        policy = sum(errors["policy", side, pair] for pair in range(pairs)) / pairs
        reference = sum(errors["reference", side, pair] for pair in range(pairs)) / pairs
        assert metrics[f"errors/{name}"].item() == pytest.approx(policy, rel=1e-6)
        assert metrics[f"errors/ref_{name}"].item() == pytest.approx(reference, rel=1e-6)


def test_one_fused_forward_equals_separate_forwards(world: World) -> None:
    given, batch = parts(world, perturbed=0.02), world.batch()
    loss_of(given, batch)
    spy = given.predict
    assert isinstance(spy, Spy)
    assert [len(x_t) for _, x_t, _, _ in spy.asked] == [10, 10]  # one for the reference, one for the policy
    unet, x_t, t, conditioning = spy.asked[1]
    together = world.model.predict(unet, x_t, t, conditioning)
    for half in (slice(0, 5), slice(5, 10)):
        alone = world.model.predict(unet, x_t[half], t[half], conditioning.select(half))
        # other batch sizes choose other kernels, which round in another order
        torch.testing.assert_close(together[half], alone, rtol=1e-5, atol=1e-6)


def test_adapters_off_equal_a_frozen_copy_bit_for_bit(world: World) -> None:
    given, batch = parts(world, perturbed=0.02), world.batch()
    copied = FrozenCopy(adapters.frozen_copy(world.model.unet), contextlib.nullcontext)
    loss, metrics = loss_of(given, batch)
    other, others = loss_of(replace(given, reference=copied), batch)
    assert torch.equal(loss, other)
    assert all(torch.equal(metrics[name], others[name]) for name in metrics)


@pytest.mark.parametrize("kind", ["lora", "full"])
@pytest.mark.parametrize("half", [False, True])
def test_margins_are_exactly_zero_before_the_first_step(world: World, kind: str, half: bool) -> None:
    loss, metrics = loss_of(parts(world, kind, half=half), world.batch())
    assert metrics["rewards/margins_abs"].item() == 0
    assert loss.item() == pytest.approx(math.log(2), abs=1e-7)
    assert loss.dtype == torch.float32


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_a_step_prefers_the_chosen_side(world: World, kind: str) -> None:
    given, batch = parts(world, kind), world.batch()
    trained = [p for p in given.module.parameters() if p.requires_grad]
    before = [p.detach().clone() for p in given.module.parameters() if not p.requires_grad]
    loss, _ = loss_of(given, batch)
    loss.backward()
    gradients = [p.grad for p in trained if p.grad is not None]
    assert gradients and all(gradient.isfinite().all() for gradient in gradients)
    with torch.no_grad():
        norm = math.sqrt(sum(float(gradient.square().sum()) for gradient in gradients))
        for parameter in trained:
            if parameter.grad is not None:
                parameter.sub_(1e-4 / norm * parameter.grad)
    after, metrics = loss_of(given, batch)
    assert after < loss
    assert metrics["rewards/margins"] > 0
    frozen = [p for p in given.module.parameters() if not p.requires_grad]
    assert all(p.grad is None and torch.equal(p, was) for p, was in zip(frozen, before, strict=True))


def test_opposite_labels_have_opposite_margins(world: World) -> None:
    given = parts(world, perturbed=0.02)
    flipped = prepare(world.model, [pair.flip() for pair in world.pairs], LatentSettings(cache=None))
    _, metrics = loss_of(given, world.batch())
    loss, others = loss_of(given, world.batch(data=flipped))
    assert abs(metrics["rewards/margins"].item()) > 0.1
    torch.testing.assert_close(others["rewards/margins"], -metrics["rewards/margins"], rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(others["rewards/chosen"], metrics["rewards/rejected"], rtol=1e-3, atol=1e-3)
    assert others["rewards/accuracies"].item() == pytest.approx(1 - metrics["rewards/accuracies"].item())
    # the position of a side says nothing: swapping both sides and label is the same pair
    swapped = prepare(world.model, [pair.swap() for pair in world.pairs], LatentSettings(cache=None))
    same, _ = loss_of(given, world.batch(data=swapped))
    assert torch.equal(same, loss_of(given, world.batch())[0])
    assert loss != same


def test_a_pair_counts_the_same_alone_and_in_any_batch(sd: World) -> None:
    given = parts(sd, perturbed=0.02)
    _, together = loss_of(given, sd.batch([0, 1, 2, 3]))
    alone = [loss_of(given, sd.batch([item]))[1] for item in (3, 1, 0, 2)]
    for name, value in together.items():
        mean = sum(metrics[name] for metrics in alone) / 4
        torch.testing.assert_close(value, mean, rtol=1e-4, atol=1e-3)


def test_every_visit_draws_anew_and_the_same_again(sd: World) -> None:
    given = parts(sd, perturbed=0.02)
    first, second = (loss_of(given, sd.batch(visit=visit))[0] for visit in (0, 1))
    assert first != second
    assert torch.equal(first, loss_of(given, sd.batch(visit=0))[0])


# ------------------------------------------------------------------------------------------------- options


def asked(given: Parts) -> tuple[Tensor, Tensor]:
    assert isinstance(given.predict, Spy)
    _, x_t, t, _ = given.predict.asked[-1]
    return x_t, t


def noise_of(given: Parts, batch: PairBatch) -> tuple[Tensor, Tensor]:
    """The noise on the chosen and on the rejected rows of the last forward."""
    x_t, t = asked(given)
    abar = given.schedule.alphas_cumprod[t].view(-1, 1, 1, 1)
    chosen, rejected = ((x_t - abar.sqrt() * batch.latents) / (1 - abar).sqrt()).chunk(2)
    return chosen, rejected


def test_both_sides_share_timestep_and_noise_unless_told_otherwise(sd: World) -> None:
    given, batch = parts(sd), sd.batch()
    loss_of(given, batch)
    _, t = asked(given)
    assert torch.equal(*t.chunk(2))
    assert len(t.unique()) > 1
    torch.testing.assert_close(*noise_of(given, batch), rtol=0, atol=1e-3)
    loss_of(given, batch, shared_noise=False)
    assert torch.equal(*asked(given)[1].chunk(2))
    chosen, rejected = noise_of(given, batch)
    assert (chosen - rejected).abs().mean() > 0.5


def test_only_the_timesteps_of_a_few_step_model(sd: World) -> None:
    given = parts(sd)
    seen = set()
    for visit in range(8):
        loss_of(given, sd.batch(visit=visit), timesteps=(249, 499, 749))
        seen |= set(asked(given)[1].tolist())
    assert seen == {249, 499, 749}


def test_the_timestep_without_signal_is_left_out_or_refused(worlds: dict[str, World]) -> None:
    world = worlds["zero-snr"]
    given = parts(world)
    last = len(given.schedule) - 1
    assert last not in timestep_choices(given.schedule, None, shared_noise=True)
    for visit in range(30):
        loss, _ = loss_of(given, world.batch(visit=visit))
        assert last not in asked(given)[1] and loss.isfinite()
    with pytest.raises(UserError, match=rf"timestep {last} keeps nothing of the picture \(SNR 0\)"):
        dpo.build(dpo.Options(timesteps=(249, last)), given)
    with pytest.raises(UserError, match="timestep 1000 does not exist"):
        dpo.build(dpo.Options(timesteps=(1000,)), given)


def test_one_scale_under_every_convention(sd: World) -> None:
    given, batch = parts(sd, perturbed=0.02), sd.batch()
    half, _ = loss_of(given, batch, beta=5000.0)
    mean, _ = loss_of(given, batch, beta=2500.0, convention="mean")
    total, _ = loss_of(given, batch, beta=2500.0 / sd.data.elements, convention="sum")
    assert torch.equal(half, mean)
    torch.testing.assert_close(half, total)
    said = dpo.build(dpo.Options(beta=5000.0), given).describe()["logit scale"]
    assert said.startswith("2500 on mean errors") and "mean_half 5000" in said


def test_errors_measured_in_another_space(sd: World) -> None:
    given, batch = parts(sd, perturbed=0.02), sd.batch()
    native, in_noise, in_x0 = (
        loss_of(given, batch, timesteps=(500,), error_space=space)[1] for space in ("native", "epsilon", "x0")
    )
    assert torch.equal(native["rewards/margins"], in_noise["rewards/margins"])
    snr = given.schedule.snr(torch.tensor([500]))
    torch.testing.assert_close(in_x0["errors/chosen"], native["errors/chosen"] / snr[0])


def test_other_losses_of_the_core(sd: World) -> None:
    given, batch = parts(sd, perturbed=0.02), sd.batch([0])
    assert batch.confidence is not None
    unsure = replace(batch, confidence=torch.tensor([0.8]))
    plain, metrics = loss_of(given, batch)
    margin = metrics["rewards/margins"]
    soft, _ = loss_of(given, unsure, loss={"soft": 1.0})
    expected = -0.8 * nn.functional.logsigmoid(margin) - 0.2 * nn.functional.logsigmoid(-margin)
    torch.testing.assert_close(soft.detach(), expected)
    both, _ = loss_of(given, batch, loss={"sigmoid": 1.0, "sft": 10.0})
    torch.testing.assert_close(both - plain, 10 * metrics["errors/chosen"])
    with pytest.raises(UserError, match=r"method\.loss.*Did you mean 'sigmoid'"):
        dpo.build(dpo.Options(loss={"sigmoidd": 1.0}), given)


def test_weights_of_pairs_multiply_their_losses(sd: World) -> None:
    given, batch = parts(sd, perturbed=0.02), sd.batch([0, 1])

    def weighted(*weights: float) -> Tensor:
        return loss_of(given, replace(batch, weights=torch.tensor(weights)))[0]

    assert abs(weighted(2.0, 0.0) - weighted(0.0, 2.0)) > 0.01
    torch.testing.assert_close(weighted(0.5, 1.5), 0.25 * weighted(2.0, 0.0) + 0.75 * weighted(0.0, 2.0))
    assert torch.equal(weighted(1.0, 1.0), loss_of(given, batch)[0])
    assert mean_over_pairs(torch.tensor([1.0, 3.0]), None) == 2


# --------------------------------------------------------------------------------------------- plain fine-tuning


def gradients(loss: Tensor, module: nn.Module) -> Iterator[Tensor]:
    trained = [p for p in module.parameters() if p.requires_grad]
    found = torch.autograd.grad(loss, trained, allow_unused=True)
    return (torch.zeros_like(p) if g is None else g for p, g in zip(trained, found, strict=True))


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_fine_tuning_is_dpo_with_the_anchor_alone(world: World, kind: str) -> None:
    given, batch = parts(world, kind, perturbed=0.02), world.batch()
    ((tuned, metrics),) = list(sft.build(sft.Options(), given).losses(batch))
    assert len(asked(given)[0]) == len(batch.keys)  # the rejected side is not even looked at
    anchored, others = loss_of(given, batch, loss={"sft": 1.0})
    torch.testing.assert_close(tuned, anchored, rtol=1e-6, atol=0)
    torch.testing.assert_close(metrics["errors/chosen"], others["errors/chosen"])
    for one, other in zip(gradients(tuned, given.module), gradients(anchored, given.module), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-6)


def test_fine_tuning_learns_where_there_is_no_signal_too(worlds: dict[str, World]) -> None:
    world = worlds["zero-snr"]
    given = parts(world)
    last = len(given.schedule) - 1
    ((loss, _),) = list(sft.build(sft.Options(timesteps=(last,)), given).losses(world.batch()))
    assert loss.isfinite() and asked(given)[1].tolist() == [last] * 5
