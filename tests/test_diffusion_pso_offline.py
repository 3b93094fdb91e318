"""Offline PSO: Diffusion-DPO at the distilled timesteps, and the released formulas with what is wrong about them."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from tiny_runs import Tiny, lines, write_store
from torch import Tensor

from diffusion import adapters
from diffusion.cache import PairData, prepare
from diffusion.methods import dpo, pso_offline, sft
from diffusion.models import DiffusionModel, load_model
from diffusion.parts import Parts
from diffusion.settings import LatentSettings, LoraSettings, ModelSettings
from mmalign.config import parse_section
from mmalign.errors import UserError
from mmalign.pairing import Pairing, make_pairs
from mmalign.preferences import Store
from mmalign.reference import AdaptersOff

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

STEPS = (249, 499, 749, 999)
TIMES: dict[str, Any] = {"timesteps": STEPS}


# ------------------------------------------------------------------------------------------- the released formulas

ERRORS = torch.tensor([0.1000, 0.2000, 0.3000, 0.0500, 0.1204, 0.1800, 0.3000, 0.0890], dtype=torch.float64)
REFERENCE = torch.tensor([0.1002, 0.1998, 0.3001, 0.0500, 0.1202, 0.1801, 0.2998, 0.0889], dtype=torch.float64)


def test_t11_the_released_losses() -> None:
    loss = pso_offline.authors_loss(ERRORS, None, scale=5.0, negative_factor=0.1, prior_weight=0.5).mean()
    assert loss.item() == pytest.approx(1.8125, abs=1e-12)
    assert loss.item() == pytest.approx(1 + 5 * ERRORS[:4].mean().item(), abs=1e-12)
    loss = pso_offline.authors_loss(ERRORS, REFERENCE, scale=200.0, negative_factor=1.0, prior_weight=0.0).mean()
    assert loss.item() == pytest.approx(0.6810845933, abs=1e-6)


def test_the_loser_cancels_out_of_the_released_recipe_and_counts_in_ours() -> None:
    errors = ERRORS.clone().requires_grad_()
    released = pso_offline.authors_loss(errors, None, scale=5.0, negative_factor=0.1, prior_weight=0.5)
    winner, loser = torch.autograd.grad(released.sum(), errors)[0].chunk(2)
    assert torch.equal(winner, torch.full_like(winner, 5.0))
    assert torch.equal(loser, torch.zeros_like(loser))
    ours = pso_offline.authors_loss(errors, REFERENCE, scale=2500.0, negative_factor=1.0, prior_weight=0.0)
    winner, loser = torch.autograd.grad(ours.sum(), errors)[0].chunk(2)
    assert torch.equal(loser, -winner) and (winner > 100).all()


def test_the_hinge_is_inactive_only_for_errors_of_losers_above_two() -> None:
    errors = torch.tensor([0.0, 2.5], dtype=torch.float64, requires_grad=True)
    loss = pso_offline.authors_loss(errors, None, scale=5.0, negative_factor=0.1, prior_weight=0.5)
    assert loss.item() == 1.25
    assert torch.autograd.grad(loss.sum(), errors)[0].tolist() == [0.0, 0.5]


# --------------------------------------------------------------------------------------------------- on a model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("pso")
    write_store(root / "store")
    tiny_models.write(tiny_models.sd_pipeline(), root / "model")
    return root


@pytest.fixture(scope="module")
def world(folder: Path) -> tuple[DiffusionModel, PairData]:
    pairs = list(make_pairs(Store.open(folder / "store").records(), Pairing(score="taste")))
    model = load_model(ModelSettings(path=str(folder / "model")))
    return model, prepare(model, pairs, LatentSettings(cache=None))


def parts(world: tuple[DiffusionModel, PairData], *, perturbed: float = 0.0) -> Parts:
    model, data = world
    unet = copy.deepcopy(model.unet)
    adapters.add_lora(unet, LoraSettings(rank=2, targets="all"))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in unet.parameters():
            if parameter.requires_grad and perturbed:
                parameter.add_(perturbed * torch.randn(parameter.shape, generator=generator))
    return Parts(
        module=unet.train(),
        predict=model.predict,
        schedule=model.schedule,
        reference=AdaptersOff(unet, lambda: adapters.adapters_disabled(unet)),
        elements=data.elements,
    )


def options(**changes: Any) -> pso_offline.Options:
    return parse_section(pso_offline.Options, changes, "method")


def loss_of(method: Any, world: tuple[DiffusionModel, PairData]) -> tuple[Tensor, Mapping[str, Tensor]]:
    batch = world[1].batch([0, 1, 2, 3, 4], [0] * 5, seed=3)
    ((loss, metrics),) = list(method.losses(batch))
    return loss, metrics


def gradient(loss: Tensor, given: Parts) -> Tensor:
    trained = [p for p in given.module.parameters() if p.requires_grad]
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, trained)])


def test_ours_is_diffusion_dpo_at_the_distilled_timesteps(world: tuple[DiffusionModel, PairData]) -> None:
    given = parts(world, perturbed=0.02)
    method = pso_offline.build(options(beta=2500.0, timesteps=STEPS), given)
    plain = dpo.build(dpo.Options(beta=5000.0, timesteps=STEPS), given)
    loss, metrics = loss_of(method, world)
    expected, others = loss_of(plain, world)
    assert torch.equal(loss, expected) and loss.item() != pytest.approx(math.log(2), abs=1e-3)
    assert all(torch.equal(metrics[name], others[name]) for name in others)
    assert method.describe()["timesteps"] == "249, 499, 749, 999"
    assert method.describe()["logit scale"].startswith("2500 on mean errors")


@pytest.mark.parametrize("changes", [{}, {"compat": "authors", "formula": "pso"}])
def test_margins_are_exactly_zero_before_the_first_step(
    world: tuple[DiffusionModel, PairData], changes: dict[str, Any]
) -> None:
    loss, metrics = loss_of(pso_offline.build(options(**TIMES, **changes), parts(world)), world)
    assert metrics["rewards/margins_abs"].item() == 0
    prior = 0.5 * metrics["errors/rejected"].item() if changes else 0.0
    assert loss.item() == pytest.approx(math.log(2) + prior, abs=1e-6)


def test_the_released_recipe_trains_what_fine_tuning_trains(world: tuple[DiffusionModel, PairData]) -> None:
    given = parts(world, perturbed=0.02)
    released, metrics = loss_of(pso_offline.build(options(compat="authors", **TIMES), given), world)
    tuned, others = loss_of(sft.build(sft.Options(**TIMES), given), world)
    assert released.item() == pytest.approx(1 + 5 * tuned.item(), rel=1e-5)
    theirs, plain = gradient(released, given), 5 * gradient(tuned, given)
    assert (theirs - plain).norm() < 1e-5 * plain.norm()
    torch.testing.assert_close(metrics["errors/chosen"], others["errors/chosen"])
    ours = gradient(loss_of(pso_offline.build(options(**TIMES), given), world)[0], given)
    assert torch.cosine_similarity(ours, plain, dim=0) < 0.9


def test_the_released_loss_with_a_reference(world: tuple[DiffusionModel, PairData]) -> None:
    given = parts(world, perturbed=0.02)
    method = pso_offline.build(
        options(compat="authors", formula="pso", beta=200.0, negative_factor=1.0, prior_weight=0.0, **TIMES), given
    )
    loss, metrics = loss_of(method, world)
    ours, others = loss_of(pso_offline.build(options(beta=200.0, **TIMES), given), world)
    torch.testing.assert_close(loss, ours)
    torch.testing.assert_close(metrics["rewards/margins"], others["rewards/margins"])
    assert method.describe()["compat"] == "pso, loser counts 1, prior 0"


def test_their_beta_comes_with_their_formulas() -> None:
    assert options(**TIMES).strength == 2500.0
    assert options(compat="authors", **TIMES).strength == 5.0
    assert options(compat="authors", beta=7.0, **TIMES).strength == 7.0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"formula": "pso"}, "formula: only with compat=authors"),
        ({"prior_weight": 0.5, "negative_factor": 0.1}, "negative_factor, prior_weight: only with compat=authors"),
        ({"compat": "authors", "loss": {"sft": 1.0}}, "compat=authors has losses of its own; leave out loss"),
    ],
)
def test_options_that_contradict_each_other(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as error:
        options(**TIMES, **changes)
    assert message in str(error.value) and "method" in str(error.value)


@pytest.mark.parametrize("changes", [{}, {"compat": "authors"}])
def test_timesteps_must_be_known_and_teach_something(folder: Path, changes: dict[str, Any]) -> None:
    pairs = list(make_pairs(Store.open(folder / "store").records(), Pairing(score="taste")))[:2]
    model = load_model(ModelSettings(path=str(folder / "model"), zero_terminal_snr=True))
    given = parts((model, prepare(model, pairs, LatentSettings(cache=None))))
    with pytest.raises(UserError) as error:
        pso_offline.build(options(**changes), given)
    assert str(error.value) == (
        "the timesteps that this model was distilled to are not known (method.timesteps). "
        "Give those that it samples at, say [249, 499, 749, 999] for SDXL-Turbo or DMD2 in four steps"
    )
    with pytest.raises(UserError, match=r"timestep 999 keeps nothing of the picture \(SNR 0\)"):
        pso_offline.build(options(**TIMES, **changes), given)
    pso_offline.build(options(timesteps=(249, 499, 749), **changes), given)


def test_a_run(tmp_path: Path) -> None:
    tiny = Tiny(tmp_path)
    for name, changes in {"ours": {}, "theirs": {"compat": "authors"}}.items():
        method = {"name": "pso_offline", "timesteps": list(STEPS), **changes}
        assert tiny.train(tmp_path / name, method=method) == 0
        rows = lines(tmp_path / name)
        assert len(rows) == 3 and all(row["grad_norm"] > 0 for row in rows)
