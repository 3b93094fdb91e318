"""InPO: its targets against the procedure written out in float64, and kept inversions against fresh ones."""

from __future__ import annotations

import math
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from pydantic import ValidationError
from tiny_runs import Tiny, contents, lines, newest, run_jobs, weights
from tiny_worlds import Spy, World, make_worlds, parts
from torch import Tensor, nn

from diffusion.cache import PairData, prepare
from diffusion.inversions import is_split
from diffusion.methods import dpo, inpo
from diffusion.parts import PairBatch, Parts
from diffusion.settings import LatentSettings
from mmalign.errors import UserError
from mmalign.losses import smoothed
from mmalign.randomness import Draws
from mmalign.reference import AdaptersOff, Cached

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")


@pytest.fixture(scope="module")
def worlds(tmp_path_factory: pytest.TempPathFactory) -> dict[str, World]:
    return make_worlds(tmp_path_factory.mktemp("worlds"))


@pytest.fixture(params=["sd", "sdxl", "v"])
def world(request: pytest.FixtureRequest, worlds: dict[str, World]) -> World:
    return worlds[request.param]


@pytest.fixture
def sd(worlds: dict[str, World]) -> World:
    return worlds["sd"]


def method_of(given: Parts, **options: Any) -> inpo.InPO:
    return inpo.build(inpo.Options(**options), given)


def loss_of(given: Parts, batch: PairBatch, **options: Any) -> tuple[Tensor, dict[str, Tensor]]:
    ((loss, metrics),) = list(method_of(given, **options).losses(batch))
    return loss, dict(metrics)


def encoded(world: World, given: Parts, **settings: Any) -> tuple[PairData, Parts]:
    """Other encodings of a world's pairs, and the parts with them."""
    data = prepare(world.model, world.pairs, LatentSettings(**{"cache": None, **settings}))
    return data, replace(given, data=data)


def asked(given: Parts) -> list[tuple[Any, ...]]:
    assert isinstance(given.predict, Spy)
    return given.predict.asked


# ------------------------------------------------------------------------------------------------- the default


def test_targets_one_picture_at_a_time_in_float64(world: World) -> None:
    """The reference's inversion written out for single rows, with the UNet in float64."""
    given, batch = parts(world, perturbed=0.05), world.batch()
    noise, t = method_of(given, inversion="online").on_grid(batch)
    assert torch.equal(*t.chunk(2)) and len(t.unique()) > 1 and set((t % 100).tolist()) == {1}
    abar, v = given.schedule.alphas_cumprod.double(), given.schedule.prediction_type != "epsilon"
    unet = world.model.unet.double()
    try:
        for row in (0, 3, 5, 8):
            x = x0 = batch.latents[row : row + 1].double()
            for landing in range(1, int(t[row]) + 1, 100):
                told = max(landing - 100, 0)
                a, b = abar[told], abar[landing]
                with torch.no_grad():
                    answer = world.model.predict(
                        unet, x, torch.tensor([told]), batch.conditioning.select(slice(row, row + 1))
                    )
                eps = a**0.5 * answer + (1 - a) ** 0.5 * x if v else answer
                x = b**0.5 * (x - (1 - a) ** 0.5 * eps) / a**0.5 + (1 - b) ** 0.5 * eps
            expected = (x - abar[t[row]] ** 0.5 * x0) / (1 - abar[t[row]]) ** 0.5
            torch.testing.assert_close(noise[row].double(), expected[0], rtol=1e-4, atol=2e-5)
    finally:
        unet.float()


def test_the_rest_is_diffusion_dpo(sd: World) -> None:
    """At the points that the inversion landed on, with the implied noise: the same scale, losses and metrics."""
    given, batch = parts(sd, perturbed=0.02), sd.batch()
    method = method_of(given, inversion="online", beta=3000.0)
    noise, t = method.on_grid(batch)
    ((loss, metrics),) = list(method.losses(batch))
    noisy = given.schedule.add_noise(batch.latents, noise, t)
    with torch.no_grad():
        policy, reference = (
            (sd.model.predict(unet, noisy, t, batch.conditioning) - noise).square().mean((1, 2, 3)).chunk(2)
            for unet in (given.module, sd.model.unet)
        )
    margin = -1500.0 * ((policy[0] - reference[0]) - (policy[1] - reference[1]))
    assert margin.abs().mean() > 0.05
    torch.testing.assert_close(loss, -nn.functional.logsigmoid(margin).mean(), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(metrics["rewards/margins"], margin.mean(), rtol=1e-2, atol=1e-3)
    assert metrics.keys() == dict(next(iter(dpo.build(dpo.Options(), given).losses(batch)))[1]).keys()


def test_both_sides_are_inverted_in_one_forward_by_the_reference_alone(sd: World) -> None:
    given, batch = parts(sd, perturbed=0.02), sd.batch([0, 1])
    moved, _ = method_of(given, inversion="online").on_grid(batch)
    per_step = [len(x) for _, x, _, _ in asked(given)]
    assert per_step[0] == 4 and per_step == sorted(per_step, reverse=True)
    still, _ = method_of(parts(sd), inversion="online").on_grid(batch)
    assert torch.equal(moved, still)  # whatever the policy is


@pytest.mark.parametrize("inversion", ["cached", "online"])
@pytest.mark.parametrize("kind", ["lora", "full"])
def test_margins_are_zero_before_the_first_step(world: World, kind: str, inversion: str) -> None:
    loss, metrics = loss_of(parts(world, kind), world.batch(), inversion=inversion)
    assert metrics["rewards/margins_abs"].item() == 0
    assert loss.item() == pytest.approx(math.log(2), abs=1e-7)


def test_a_step_prefers_the_chosen_side(sd: World) -> None:
    given, batch = parts(sd), sd.batch()
    loss, _ = loss_of(given, batch)
    loss.backward()
    found = [p for p in given.module.parameters() if p.grad is not None]
    norm = math.sqrt(sum(float(p.grad.square().sum()) for p in found if p.grad is not None))
    with torch.no_grad():
        for p in found:
            assert p.grad is not None and p.grad.isfinite().all()
            p.sub_(1e-4 / norm * p.grad)
    after, metrics = loss_of(given, batch)
    assert after < loss and metrics["rewards/margins"] > 0


def test_opposite_labels_have_opposite_margins(sd: World) -> None:
    given = parts(sd, perturbed=0.02)
    flipped = prepare(sd.model, [pair.flip() for pair in sd.pairs], LatentSettings(cache=None))
    assert flipped.inputs_key == sd.data.inputs_key and flipped.key != sd.data.key
    _, metrics = loss_of(given, sd.batch())
    _, others = loss_of(replace(given, data=flipped), sd.batch(data=flipped))
    assert abs(metrics["rewards/margins"].item()) > 0.02
    torch.testing.assert_close(others["rewards/margins"], -metrics["rewards/margins"], rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("inversion", ["cached", "online"])
def test_a_pair_counts_the_same_alone_and_in_any_batch(sd: World, inversion: str) -> None:
    given = parts(sd, perturbed=0.02)
    method = method_of(given, inversion=inversion)
    ((_, together),) = list(method.losses(sd.batch([0, 1, 2, 3])))
    alone = [next(iter(method.losses(sd.batch([item]))))[1] for item in (3, 1, 0, 2)]
    for name, value in together.items():
        torch.testing.assert_close(value, sum(metrics[name] for metrics in alone) / 4, rtol=1e-3, atol=1e-3)


# --------------------------------------------------------------------------------------------- kept inversions


@pytest.mark.parametrize("renoise", [False, True])
def test_kept_inversions_are_those_made_in_the_step(world: World, renoise: bool) -> None:
    """With dropped prompts, which are inverted as what the network is told: nothing."""
    data, given = encoded(world, parts(world, perturbed=0.02), prompt_dropout=0.5)
    kept = method_of(given, steps=5, renoise=renoise)
    online = method_of(given, steps=5, renoise=renoise, inversion="online")
    seen = set()
    for visit in (0, 1):
        batch = world.batch(data=data, visit=visit)
        assert batch.origin is not None
        seen |= {prompt == -1 for prompt in batch.origin.prompts}
        (mine, t), (fresh, same) = kept.on_grid(batch), online.on_grid(batch)
        assert torch.equal(t, same)
        torch.testing.assert_close(mine, fresh, rtol=1e-4, atol=1e-4)  # other batches round in another order
        (loss, _), (other, _) = next(iter(kept.losses(batch))), next(iter(online.losses(batch)))
        torch.testing.assert_close(loss, other, rtol=1e-2, atol=1e-3)
    assert seen == {True, False}


def test_a_dropped_prompt_has_an_inversion_of_its_own(sd: World) -> None:
    data, given = encoded(sd, parts(sd), prompt_dropout=0.999)
    plain = method_of(parts(sd)).on_grid(sd.batch())[0]
    dropped = method_of(given).on_grid(sd.batch(data=data))[0]
    assert (plain - dropped).abs().max() > 1e-3


def test_half_precision_on_disk_keeps_the_noise(sd: World, tmp_path: Path) -> None:
    data, given = encoded(sd, parts(sd), cache=tmp_path, dtype="fp16")
    batch = sd.batch(data=data)
    kept, _ = method_of(given).on_grid(batch)
    fresh, _ = method_of(given, inversion="online").on_grid(batch)
    torch.testing.assert_close(kept, fresh, rtol=2e-3, atol=2e-3)
    (file,) = tmp_path.glob("inversion-*/noise-32x32.npy")
    rows = sum(len(origin.pictures) for origin in data.origins())
    assert file.stat().st_size == pytest.approx(2 * rows * 10 * sd.data.elements, abs=200)
    said = method_of(given).describe()["inversion"]
    assert said.startswith("10 levels from t = 1 to 901, by the reference, kept: ")
    assert f"{rows} rows" in said and f"MB in {tmp_path}" in said


def test_inversions_are_found_again_by_what_they_depend_on(sd: World, tmp_path: Path) -> None:
    def forwards(changed: Parts, **options: Any) -> int:
        spy = Spy(sd.model)
        method_of(replace(changed, predict=spy), **options)
        return len(spy.asked)

    _, given = encoded(sd, parts(sd), cache=tmp_path)
    assert forwards(given) > 0
    assert forwards(given) == 0
    flipped = prepare(sd.model, [pair.flip() for pair in sd.pairs], LatentSettings(cache=tmp_path))
    assert forwards(replace(given, data=flipped)) == 0  # labels do not matter
    assert forwards(replace(given, base="another")) > 0
    assert forwards(given, steps=5) > 0 and forwards(given, renoise=True) > 0
    assert forwards(replace(given, data=prepare(sd.model, sd.pairs[:3], LatentSettings(cache=tmp_path)))) > 0
    empties = prepare(sd.model, sd.pairs, LatentSettings(cache=tmp_path, prompt_dropout=0.1))
    assert forwards(replace(given, data=empties)) > 0


@pytest.mark.parametrize(
    "settings",
    [
        {"prompt_dropout": 0.5},
        {"views": 3, "crop": "random", "flip": True},
        {"views": 2, "flip": True, "prompt_dropout": 0.3, "buckets": ((32, 32), (32, 16))},
    ],
)
def test_origins_hold_everything_that_a_batch_can_ask_for(sd: World, settings: dict[str, Any]) -> None:
    data, _ = encoded(sd, parts(sd), **settings)
    known = {origin.size: set(zip(origin.pictures, origin.prompts, strict=True)) for origin in data.origins()}
    assert known.keys() == data.buckets.keys()
    for items in data.buckets.values():
        for visit in range(8):
            batch = data.batch(items, [visit] * len(items), seed=3)
            assert batch.origin is not None
            assert set(zip(batch.origin.pictures, batch.origin.prompts, strict=True)) <= known[batch.origin.size]
            latents, conditioning = data.rows(batch.origin)
            assert torch.equal(latents, batch.latents) and torch.equal(conditioning.embeds, batch.conditioning.embeds)
    for origin in data.origins():
        rows = list(zip(origin.pictures, origin.prompts, strict=True))
        assert rows == sorted(set(rows))


def test_a_batch_of_other_data_is_not_taken_for_this(sd: World) -> None:
    method = method_of(parts(sd))
    batch = sd.batch()
    assert batch.origin is not None
    for pictures in ((10**6,) * 10, (-1,) * 10):
        with pytest.raises(ValueError, match="a batch of other data"):
            method.on_grid(replace(batch, origin=replace(batch.origin, pictures=pictures)))
    with pytest.raises(ValueError, match="which rows"):
        method.on_grid(replace(batch, origin=None))
    with pytest.raises(ValueError, match="some data"):
        method_of(replace(parts(sd), data=None))


# ------------------------------------------------------------------------------------ as the authors released it


class Released:
    """The released procedure for one pair, in plain float64: see section 3.2 of the paper's code.

    Its scheduler is diffusers 0.20's: timesteps -99, 1, ..., 801, a step from t leads to t + 100.
    """

    def __init__(self, world: World, unet: nn.Module, batch: PairBatch, steps: int = 10) -> None:
        self.world, self.unet, self.batch, self.spacing = world, unet, batch, 1000 // steps
        self.grid = [1 - self.spacing + self.spacing * k for k in range(steps)]
        self.abar = world.model.schedule.alphas_cumprod.double()

    def level(self, t: int) -> Tensor:
        return self.abar[t] if t >= 0 else self.abar[0]

    def target(self, t: int, draw: Any, renoise: bool = False) -> tuple[Tensor, Tensor]:
        """(x, target), chosen row first; `draw` makes both rows' noise."""
        x0 = x = self.batch.latents
        for told in [told for told in self.grid if told < t]:
            a, b = self.level(told), self.level(told + self.spacing)
            eps = self.world.model.predict(self.unet, x, torch.tensor([told, told]), self.batch.conditioning)

            def to(noise: Tensor, x: Tensor = x, a: Tensor = a, b: Tensor = b) -> Tensor:
                clean = (x - (1 - a) ** 0.5 * noise) / a**0.5
                return b**0.5 * clean + (1 - b) ** 0.5 * noise

            if renoise:
                again = self.world.model.predict(
                    self.unet, to(eps), torch.tensor([told, told]), self.batch.conditioning
                )
                x = to((eps + again) / 2)
            else:
                variance = (1 - a) / (1 - b) * (1 - b / a)
                x = to(eps) + 0.1 * draw() * variance**0.5
        a = self.abar[t]
        return x, (x - x0 * a**0.5) / (1 - a) ** 0.5


def two(draws: Draws, shape: Sequence[int]) -> Tensor:
    return torch.cat([draws.normal(shape), draws.normal(shape)])


@pytest.mark.parametrize("name", ["sd", "sdxl"])
@pytest.mark.parametrize(("steps", "renoise"), [(10, False), (5, True)])
def test_compat_has_the_targets_of_the_released_code(
    worlds: dict[str, World], name: str, steps: int, renoise: bool
) -> None:
    world = worlds[name]
    given = parts(world, perturbed=0.02)
    exact = replace(given.schedule, alphas_cumprod=given.schedule.alphas_cumprod.double())
    given = replace(given, module=given.module.double(), schedule=exact)
    method = method_of(given, compat="authors", steps=steps, renoise=renoise)
    drawn = {int(world.batch([visit % 5], visit=visit).draws("noise").integers(1000)): visit for visit in range(60)}
    ordered = sorted(drawn)
    assert ordered[0] < 50 and ordered[-1] > 950
    for t in (ordered[0], *ordered[5::15], ordered[-1]):
        batch = world.batch([drawn[t] % 5], visit=drawn[t])
        batch = replace(batch, latents=batch.latents.double())
        draws, shape = batch.draws("noise"), batch.latents.shape[1:]
        draws.integers(1000)
        released = Released(world, given.module, batch, steps)
        with torch.no_grad():
            x, target = released.target(t, lambda: two(draws, shape), renoise)  # noqa: B023  # called here and now
        before = len(asked(given))
        noise, timesteps = method.released(batch)
        inverting = asked(given)[before:]
        assert timesteps.tolist() == [t, t]
        torch.testing.assert_close(noise, target, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(exact.add_noise(batch.latents, noise, timesteps), x, rtol=1e-6, atol=1e-6)
        assert [when.tolist() for _, _, when, _ in inverting] == [
            [told] * 2 for told in released.grid if told < t for _ in range(1 + renoise)
        ]
        assert all(unet is given.module and unet.training for unet, *_ in inverting)
    # and the loss is the released one: mean errors of this target, half of beta, the reference from the base
    ((loss, _),) = list(method.losses(batch))
    base = world.model.unet.double()
    try:
        with torch.no_grad():
            both = [
                (world.model.predict(unet, x, timesteps, batch.conditioning) - target).square().mean((1, 2, 3))
                for unet in (given.module, base)
            ]
    finally:
        base.float()
    inside = -0.5 * 2000.0 * ((both[0][0] - both[0][1]) - (both[1][0] - both[1][1]))
    torch.testing.assert_close(loss, -nn.functional.logsigmoid(inside), rtol=1e-4, atol=1e-5)


def test_compat_starts_at_margin_zero_and_says_what_it_does(sd: World) -> None:
    given = parts(sd)
    loss, metrics = loss_of(given, sd.batch([2]), compat="authors")
    assert metrics["rewards/margins_abs"].item() == 0 and loss.item() == pytest.approx(math.log(2), abs=1e-7)
    said = method_of(given, compat="authors").describe()["inversion"]
    assert "by the policy as the authors released it: 6.4 more UNet forwards a row" in said
    assert "5.5 more UNet forwards a row" in method_of(given, inversion="online").describe()["inversion"]


# ---------------------------------------------------------------------------------------------- labels and mistakes


def test_soft_labels_as_smpo_has_them(sd: World) -> None:
    given = parts(sd, perturbed=0.02)
    batch = replace(sd.batch([0]), confidence=torch.tensor([0.8]))
    _, metrics = loss_of(given, batch)
    margin = metrics["rewards/margins"][None]
    loss, _ = loss_of(given, batch, loss={"smoothed": 1.0})
    torch.testing.assert_close(loss.detach(), smoothed(margin, torch.tensor([0.8]))[0])
    torch.testing.assert_close(loss.detach(), nn.functional.softplus(-6.0 * margin)[0])
    tie, _ = loss_of(given, replace(batch, confidence=torch.tensor([0.5])), loss={"smoothed": 1.0})
    assert tie.item() == pytest.approx(math.log(2))


def test_each_mistake_is_said_in_one_line(sd: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = parts(sd)
    with pytest.raises(UserError, match=r"a single pair \(loop\.batch_size\)\. Set loop\.batch_size=1"):
        loss_of(given, sd.batch([0, 1]), compat="authors")
    cached = replace(given, reference=Cached(given.reference, tmp_path))
    with pytest.raises(UserError, match=r"\(reference\.cache\)\. Set reference\.cache=null"):
        method_of(cached, compat="authors")
    with pytest.raises(UserError, match=r"501 inversion steps do not fit 1000 timesteps \(method\.steps\)"):
        method_of(given, steps=501)
    with pytest.raises(UserError, match=r"Did you mean 'smoothed'"):
        method_of(given, loss={"smooth": 1.0})
    with pytest.raises(ValidationError, match="nothing can be cached"):
        inpo.Options(compat="authors", inversion="cached")
    assert inpo.Options(compat="authors", inversion="online").compat == "authors"
    drawn, redrawn = encoded(sd, given, posterior="sample")
    with pytest.raises(UserError, match=r"drawn at every use \(data\.posterior=sample\).*method\.inversion=online"):
        method_of(redrawn)
    assert loss_of(redrawn, sd.batch(data=drawn), inversion="online")[0].isfinite()

    _, kept = encoded(sd, given, cache=tmp_path / "data")
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(UserError, match=r"the inversions need 0\.0 GB and 0\.0 GB are free.*method\.inversion=online"):
        method_of(kept)
    assert list((tmp_path / "data").glob("inversion-*")) == []


def test_the_level_without_signal_is_refused_where_its_errors_do_not_exist(worlds: dict[str, World]) -> None:
    given = parts(worlds["zero-snr"])
    with pytest.raises(UserError, match=r"timestep 999 keeps nothing of the picture.*method\.steps=500"):
        method_of(given, steps=500, error_space="x0", inversion="online")


def test_split_weights_are_told_apart() -> None:
    module = nn.Linear(2, 2)
    assert not is_split(module)
    module.weight.ds_id = 0  # type: ignore[assignment]  # as ZeRO-3 marks what it has split
    assert is_split(module)


# ------------------------------------------------------------------------------------------------- whole runs

INPO: dict[str, Any] = {"method": {"name": "inpo", "steps": 4}, "data": {"prompt_dropout": 0.3}}
AUTHORS: dict[str, Any] = {
    "method": {"name": "inpo", "steps": 4, "compat": "authors"},
    "loop": {"batch_size": 1, "accumulation": 2},
}


@pytest.fixture
def fresh_accelerator() -> Any:
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    return Tiny(tmp_path_factory.mktemp("tiny"))


@pytest.mark.usefixtures("fresh_accelerator")
def test_caches_change_nothing(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    cached = {
        **INPO,
        "data": {"cache": str(tmp_path / "data"), "prompt_dropout": 0.3},
        "reference": {"cache": str(tmp_path / "errors")},
    }
    assert tiny.train(tmp_path / "off", **INPO) == 0
    assert tiny.train(tmp_path / "filling", **cached) == 0
    assert "inversion" in capsys.readouterr().out
    first, *_, last = lines(tmp_path / "off")
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-7) and last["rewards/margins_abs"] > 0

    def never(*_: object) -> Tensor:
        raise AssertionError("what is kept was computed again")

    monkeypatch.setattr(AdaptersOff, "run", never)
    assert tiny.train(tmp_path / "filled", **cached) == 0
    assert contents(tmp_path / "filling") == contents(tmp_path / "off") == contents(tmp_path / "filled")
    assert lines(tmp_path / "filled") == lines(tmp_path / "off")


@pytest.mark.usefixtures("fresh_accelerator")
@pytest.mark.parametrize("kind", ["default", "full", "authors"])
def test_a_resumed_run_equals_the_whole_one(tiny: Tiny, tmp_path: Path, kind: str) -> None:
    changes = {"default": INPO, "full": {**INPO, "adapter": None}, "authors": AUTHORS}[kind]
    loop = {**changes.get("loop", {}), "checkpoint_every": 1, "keep_checkpoints": 5}
    assert tiny.train(tmp_path / "whole", **{**changes, "loop": loop}) == 0
    shutil.copytree(tmp_path / "whole", tmp_path / "resumed")
    shutil.rmtree(newest(tmp_path / "resumed"))
    assert tiny.train(tmp_path / "resumed", **{**changes, "loop": loop}) == 0
    assert contents(tmp_path / "resumed") == contents(tmp_path / "whole")
    assert lines(tmp_path / "resumed") == lines(tmp_path / "whole")


@pytest.mark.slow
@pytest.mark.usefixtures("fresh_accelerator")
def test_two_processes_equal_one_with_twice_the_batch(tiny: Tiny, tmp_path: Path) -> None:
    kept = {**INPO, "data": {"cache": str(tmp_path / "data"), "prompt_dropout": 0.3}}
    fresh = {**INPO, "method": {"name": "inpo", "steps": 4, "inversion": "online"}}
    recipes = {
        name: str(tiny.recipe(tmp_path / f"two-{name}", **{**changes, "loop": {"batch_size": 2}}))
        for name, changes in (("kept", kept), ("fresh", fresh))
    }
    # the two processes make the kept inversions: one while the other waits
    ended = run_jobs([{"recipe": recipes[name]} for name in ("kept", "fresh")], tmp_path, processes=2)
    assert [code for code, _ in ended] == [0, 0]
    for name, changes in (("kept", kept), ("fresh", fresh)):
        assert tiny.train(tmp_path / f"one-{name}", **{**changes, "loop": {"batch_size": 4}}) == 0
        one, two = weights(tmp_path / f"one-{name}"), weights(tmp_path / f"two-{name}")
        assert one.keys() == two.keys()
        for key, value in one.items():
            torch.testing.assert_close(two[key], value, rtol=1e-4, atol=1e-6)
