"""Diffusion-KTO against its formula written out, one picture at a time."""

from __future__ import annotations

import contextlib
import copy
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from tiny_runs import Tiny, lines, write_store
from torch import Tensor, nn

from diffusion import adapters
from diffusion.cache import PairData, prepare
from diffusion.conditioning import Conditioning
from diffusion.methods import kto
from diffusion.models import DiffusionModel, load_model
from diffusion.parts import PairBatch, Parts, draw_timesteps
from diffusion.schedule import timestep_choices
from diffusion.settings import LatentSettings, LoraSettings, ModelSettings
from mmalign import losses
from mmalign.errors import UserError
from mmalign.pairing import Pairing, make_pairs
from mmalign.preferences import Store
from mmalign.reference import AdaptersOff, FrozenCopy

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

BETA = 3000.0


@dataclass(frozen=True, kw_only=True)
class World:
    """A tiny model and the same pictures, unpaired and as pairs of one prompt."""

    model: DiffusionModel
    data: PairData
    paired: PairData

    def batch(self, items: list[int] | None = None, data: PairData | None = None, visit: int = 0) -> PairBatch:
        items = list(range(5)) if items is None else items
        return (data or self.data).batch(items, [visit] * len(items), seed=3)


@pytest.fixture(scope="module")
def worlds(tmp_path_factory: pytest.TempPathFactory) -> dict[str, World]:
    root = tmp_path_factory.mktemp("worlds")
    store = Store.open(write_store(root / "store"))
    found = {}
    for name, make in {"sd": tiny_models.sd_pipeline, "sdxl": tiny_models.sdxl_pipeline}.items():
        model = load_model(ModelSettings(path=str(tiny_models.write(make(), root / name))))

        def encoded(model: DiffusionModel = model, **pairing: Any) -> PairData:
            pairs = list(make_pairs(store.records(), Pairing(score="taste", **pairing)))
            return prepare(model, pairs, LatentSettings(cache=None))

        found[name] = World(model=model, data=encoded(strategy="unpaired", threshold=0.75), paired=encoded())
    return found


@pytest.fixture(params=["sd", "sdxl"])
def world(request: pytest.FixtureRequest, worlds: dict[str, World]) -> World:
    return worlds[request.param]


@pytest.fixture
def sd(worlds: dict[str, World]) -> World:
    return worlds["sd"]


def parts(world: World, *, perturbed: float = 0.0, better: bool = False, data: PairData | None = None) -> Parts:
    """An adapted policy, moved away from the reference where `perturbed` says how far: to the worse, or the reference
    from it, which leaves the policy the better one."""
    unet = copy.deepcopy(world.model.unet)
    adapters.add_lora(unet, LoraSettings(rank=2, targets="all"))
    moved = copy.deepcopy(unet) if better else unet
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in moved.parameters():
            if parameter.requires_grad and perturbed:
                parameter.add_(perturbed * torch.randn(parameter.shape, generator=generator))
    off = AdaptersOff(unet, lambda: adapters.adapters_disabled(unet))
    return Parts(
        module=unet.train(),
        predict=world.model.predict,
        schedule=world.model.schedule,
        reference=FrozenCopy(moved, contextlib.nullcontext) if better else off,
        elements=world.data.elements,
        data=data,
    )


def loss_of(given: Parts, batch: PairBatch, **options: Any) -> tuple[Tensor, dict[str, Tensor]]:
    method = kto.build(kto.Options(**{"beta": BETA, **options}), given)
    ((loss, metrics),) = list(method.losses(batch))
    return loss, dict(metrics)


def rewards_of(world: World, given: Parts, batch: PairBatch, *, other_prompt: bool) -> list[float]:
    """r of every row in forwards of its own, with its own prompt or with that of the pair's other side."""
    draws = batch.draws("noise")
    choices = timestep_choices(given.schedule, None, shared_noise=False)
    t = torch.cat([draw_timesteps(draws, choices), draw_timesteps(draws, choices)])
    noise = torch.cat([draws.normal(batch.latents.shape[1:]), draws.normal(batch.latents.shape[1:])])
    rows, pairs = len(t), len(t) // 2
    found = []
    for row in range(rows):
        one = slice(row, row + 1)
        told = (row + pairs) % rows if other_prompt else row
        conditioning = batch.conditioning.select(slice(told, told + 1))
        if batch.conditioning.time_ids is not None:
            conditioning = conditioning.with_time_ids(batch.conditioning.time_ids[one])
        noisy = given.schedule.add_noise(batch.latents[one], noise[one], t[one])

        def error(unet: nn.Module, told: Any = (noisy, t[one], conditioning), eps: Tensor = noise[one]) -> Tensor:
            return (world.model.predict(unet, *told) - eps).square().mean()

        with torch.no_grad():
            policy = error(given.module)
        found.append(-BETA * (policy - given.reference.run(error)).item())
    assert len(t.unique()) > pairs  # every row has a timestep of its own
    return found


@pytest.mark.parametrize(("baseline", "better"), [("mismatched", True), ("mismatched", False), ("batch", True)])
def test_loss_as_published_one_picture_at_a_time(world: World, baseline: str, better: bool) -> None:
    given, batch, share = parts(world, perturbed=0.02, better=better), world.batch(), 0.8
    loss, metrics = loss_of(given, batch, baseline=baseline, desirable_share=share)
    rewards = rewards_of(world, given, batch, other_prompt=False)
    weights = [2 * share] * 5 + [2 * (1 - share)] * 5
    if baseline == "batch":
        counted = [(weight, reward) for weight, reward in zip(weights, rewards, strict=True)]
    else:
        strayed = rewards_of(world, given, batch, other_prompt=True)
        assert batch.origin is not None
        prompts = batch.origin.prompts
        unrelated = [prompts[row] != prompts[(row + 5) % 10] for row in range(10)]
        assert 0 < sum(unrelated) < 10  # some of the other prompts are the same text by chance
        counted = [(w * differs, r) for w, r, differs in zip(weights, strayed, unrelated, strict=True)]
    z = max(0.0, sum(w * r for w, r in counted) / sum(w for w, _ in counted))
    gains = [reward - z if row < 5 else z - reward for row, reward in enumerate(rewards)]
    expected = sum(w * (1 - 1 / (1 + math.exp(-gain))) for w, gain in zip(weights, gains, strict=True)) / 10
    assert (z > 0.05) == better
    assert metrics["rewards/baseline"].item() == pytest.approx(z, abs=5e-3)
    assert loss.item() == pytest.approx(expected, rel=2e-3)
    assert metrics["rewards/chosen"].item() == pytest.approx(sum(rewards[:5]) / 5, abs=5e-3)
    assert metrics["rewards/rejected"].item() == pytest.approx(sum(rewards[5:]) / 5, abs=5e-3)


def test_the_baselines_differ_and_have_no_gradient(sd: World) -> None:
    given, batch = parts(sd, perturbed=0.02, better=True), sd.batch()
    mismatched, batched = (loss_of(given, batch, baseline=name)[1] for name in ("mismatched", "batch"))
    assert not torch.equal(mismatched["rewards/baseline"], batched["rewards/baseline"])
    assert torch.equal(mismatched["rewards/chosen"], batched["rewards/chosen"])
    assert not mismatched["rewards/baseline"].requires_grad and not batched["rewards/baseline"].requires_grad


@pytest.mark.parametrize("baseline", ["mismatched", "batch"])
def test_everything_is_exactly_zero_before_the_first_step(world: World, baseline: str) -> None:
    loss, metrics = loss_of(parts(world), world.batch(), baseline=baseline)
    for name in ("rewards/margins_abs", "rewards/chosen", "rewards/rejected", "rewards/baseline"):
        assert metrics[name].item() == 0
    assert loss.item() == pytest.approx(0.5, abs=1e-6)  # weights of mean 1 on 1 - sigmoid(0)


def test_a_step_raises_desirable_and_lowers_undesirable_rewards(sd: World) -> None:
    given, batch = parts(sd), sd.batch()
    trained = [p for p in given.module.parameters() if p.requires_grad]
    loss, _ = loss_of(given, batch, desirable_share=0.5)
    loss.backward()
    norm = math.sqrt(sum(float(p.grad.square().sum()) for p in trained if p.grad is not None))
    with torch.no_grad():
        for parameter in trained:
            if parameter.grad is not None:
                parameter.sub_(1e-4 / norm * parameter.grad)
    after, metrics = loss_of(given, batch, desirable_share=0.5)
    assert after < loss
    assert metrics["rewards/chosen"] - metrics["rewards/rejected"] > 0


def test_weights_stand_for_the_share_of_desirable_pictures_drawn() -> None:
    """mean(w l) over equal halves = the expected loss of drawing a desirable item with probability gamma."""
    generator = torch.Generator().manual_seed(0)
    rewards = torch.randn(1000, generator=generator, dtype=torch.float64).requires_grad_()
    desirable = torch.arange(1000) < 500
    z, gamma = torch.zeros((), dtype=torch.float64), 0.8
    per_item = losses.kto(rewards, desirable, z)
    drawn = gamma * per_item[:500].mean() + (1 - gamma) * per_item[500:].mean()
    weighted = losses.kto(rewards, desirable, z, desirable_weight=2 * gamma, undesirable_weight=2 * (1 - gamma)).mean()
    torch.testing.assert_close(weighted, drawn, rtol=1e-12, atol=0)
    one, other = (torch.autograd.grad(value, rewards, retain_graph=True)[0] for value in (weighted, drawn))
    torch.testing.assert_close(one, other, rtol=1e-12, atol=0)


def test_an_item_counts_the_same_in_any_batch(sd: World) -> None:
    """With the baseline of other prompts nothing depends on who shares a batch but z itself, a mean."""
    given = parts(sd, perturbed=0.02)
    _, together = loss_of(given, sd.batch([0, 1, 2, 3]))
    alone = [loss_of(given, sd.batch([item]))[1] for item in (3, 1, 0, 2)]
    for name in ("rewards/chosen", "rewards/rejected", "errors/chosen", "errors/ref_rejected"):
        mean = sum(metrics[name] for metrics in alone) / 4
        torch.testing.assert_close(together[name], mean, rtol=1e-4, atol=1e-3)


def test_utilities_and_pair_weights(sd: World) -> None:
    given, batch = parts(sd, perturbed=0.02), sd.batch([0, 1])
    seen = {name: loss_of(given, batch, utility=name)[0].item() for name in ("kto", "loss_averse", "risk_seeking")}
    assert len(set(seen.values())) == 3
    assert seen["loss_averse"] > 1 > seen["risk_seeking"]

    def weighted(*weights: float) -> Tensor:
        return loss_of(given, replace(batch, weights=torch.tensor(weights)))[0]

    torch.testing.assert_close(weighted(0.5, 1.5), 0.25 * weighted(2.0, 0.0) + 0.75 * weighted(0.0, 2.0))
    assert torch.equal(weighted(1.0, 1.0), loss_of(given, batch)[0])


def test_other_prompts_are_those_of_the_other_side() -> None:
    embeds = torch.arange(4.0).view(4, 1, 1).repeat(1, 2, 3)
    embeds[3] = embeds[1]  # the second pair has one prompt on both sides
    sizes = torch.arange(24.0).view(4, 6)
    other, differs = kto.other_prompts(Conditioning(embeds=embeds, pooled=embeds[:, 0], time_ids=sizes))
    assert other.embeds[:, 0, 0].tolist() == [2, 1, 0, 1]
    assert other.pooled is not None and other.pooled[:, 0].tolist() == [2, 1, 0, 1]
    assert other.time_ids is not None and torch.equal(other.time_ids, sizes)
    assert differs.tolist() == [1, 0, 1, 0]


def test_pairs_of_one_prompt_have_no_unrelated_prompts(sd: World) -> None:
    with pytest.raises(UserError) as error:
        loss_of(parts(sd, data=sd.paired), sd.batch(data=sd.paired))
    assert str(error.value) == (
        "the two sides of every pair have the same prompt: there are no unrelated ones for the baseline "
        "(data.pairing.strategy). Use unpaired, or method.baseline=batch"
    )
    loss, _ = loss_of(parts(sd, data=sd.paired), sd.batch(data=sd.paired), baseline="batch")
    assert loss.isfinite()
    assert kto.build(kto.Options(), parts(sd, data=sd.data)).describe() == {
        "logit scale": f"5000 on mean errors (beta: mean_half 10000, mean 5000, sum {5000 / sd.data.elements:g})",
        "items": "2 per pair, weighted 1.6 (desirable) and 0.4; baseline mismatched",
    }


class Recorder(nn.Module):
    """A reference that notes under which names it is asked."""

    def __init__(self, inner: AdaptersOff) -> None:
        super().__init__()
        self.inner, self.keys = inner, list[str]()

    def score(self, keys: Any, compute: Any) -> Tensor:
        self.keys += keys
        return self.inner.score(keys, compute)

    def run(self, compute: Any) -> Tensor:
        return self.inner.run(compute)


def test_reference_scores_are_named_by_item_and_not_by_batch(sd: World) -> None:
    given = parts(sd)
    assert isinstance(given.reference, AdaptersOff)
    recorder = Recorder(given.reference)
    given = replace(given, reference=recorder)
    loss_of(given, sd.batch([0, 1]))
    together, recorder.keys = recorder.keys, []
    for item in (0, 1):
        loss_of(given, sd.batch([item]))
    assert sorted(together) == sorted(recorder.keys) and len(set(together)) == 8


def test_a_run_on_unpaired_data(tmp_path: Path) -> None:
    tiny = Tiny(tmp_path)
    data = {"pairing": {"score": "taste", "strategy": "unpaired", "threshold": 0.75}, "prompt_dropout": 0.3}
    code = tiny.train(tmp_path / "run", method={"name": "kto", "beta": 2000.0}, data=data)
    rows = lines(tmp_path / "run")
    assert code == 0 and len(rows) == 3
    assert rows[0]["rewards/margins_abs"] == 0 and rows[-1]["rewards/margins_abs"] > 0
