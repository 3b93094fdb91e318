"""The benchmark of rounds compares like with like and counts what really runs. No time is asserted."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch

from benchmarks.plain_rollout import PlainPSO, Text
from benchmarks.rollout_round import MAKE, VARIANTS, Case, Floor, Ours, Plain, units, work
from diffusion.methods import prdp
from diffusion.trajectories import Turn

ROOT = Path(__file__).parent.parent
CASE = Case(
    method="pso",
    size="",
    prompts=2,
    batch=2,
    images=2,
    steps=4,
    passes=1,
    resolution=None,
    precision="fp32",
    rank=4,
    gradient_checkpointing=False,
    device=torch.device("cpu"),
)
METHODS: dict[str, dict[str, Any]] = {
    "pso": {"method": "pso"},
    "prdp": {"method": "prdp", "images": 3, "steps": 3},
}
EVERY = pytest.mark.parametrize("method", METHODS)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.write(tiny_models.sd_pipeline(), tmp_path_factory.mktemp("base") / "tiny")


def case(tiny: Path, method: str, **changes: Any) -> Case:
    return dataclasses.replace(CASE, size=str(tiny), **{**METHODS[method], **changes})


# ------------------------------------------------------------------------------------------ like with like


@EVERY
@pytest.mark.parametrize("fused", [False, True])
def test_both_sides_compute_the_same_loss_and_gradient(tiny: Path, tmp_path: Path, method: str, fused: bool) -> None:
    """On equal trajectories, rewards and weights, after the policy has left the one that drew them."""
    here = case(tiny, method, passes=2)
    ours, plain = Ours(here, tmp_path), Plain(here, tmp_path, fused=fused)
    # a temperature and a clip at which every part of the loss counts; at PRDP's own the rewards drown the rest
    if method == "prdp":
        ours.method = prdp.build(prdp.Options(beta=10.0, clip=1e-4), ours.parts)
        plain.trainer.beta, plain.trainer.clip = 10.0, 1e-4
    ours.meter.begin()
    batch = next(ours.method.batches(iter([Turn(1, 0)])))  # the second update of the first round
    assert not batch.unmoved
    theirs = dict(plain.trainer.unet.named_parameters())
    mine = {name: p for name, p in ours.model.unet.named_parameters() if p.requires_grad}
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in mine.items():
            theirs[name].copy_(parameter)
        drew = [parameter.detach().clone() for parameter in plain.trainer.parameters]
        for name, parameter in mine.items():
            parameter += 0.02 * torch.randn(parameter.shape, generator=generator)
            theirs[name].copy_(parameter)

    loss = 0.0
    for part, _ in ours.method.losses(batch):
        part.backward()
        loss += part.item()
    groups, trainer = batch.groups, plain.trainer
    states = groups.trajectories.states
    if isinstance(trainer, PlainPSO):
        sides = [states[k::2] for k in range(2)]
        text = Text(embeds=groups.conditioning.embeds)
        published = torch.zeros(())
        for step in range(trainer.trained):
            published = published + trainer.loss(sides, step, text, groups.rewards) / trainer.trained
        published.backward()
        assert abs(published.item() - math.log(2)) > 1e-4
    else:
        text = Text(embeds=groups.conditioning.embeds.repeat_interleave(here.images, 0))
        _, empty = trainer.encode(["a"] * len(states), guided=True)
        assert empty is not None
        published = trainer.backward(states, text, empty, groups.rewards.flatten(), drew)
    assert published.item() == pytest.approx(loss, rel=2e-3)
    for name, parameter in mine.items():
        assert parameter.grad is not None and theirs[name].grad is not None
        size = parameter.grad.norm()
        assert size > 0 and (parameter.grad - theirs[name].grad).norm() < 1e-2 * size + 1e-8


def test_both_sides_see_the_same_prompts_and_pictures(tiny: Path, tmp_path: Path) -> None:
    here = case(tiny, "prdp")
    ours, plain = Ours(here, tmp_path), Plain(here, tmp_path)
    text, empty = plain.trainer.encode(here.words(), guided=True)
    assert torch.allclose(text.embeds, ours.model.encode_prompts(here.words()).embeds, atol=1e-6)
    assert empty is not None and torch.allclose(empty.embeds[:1], ours.model.without_prompt().embeds, atol=1e-6)
    latents = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    ours.meter.begin()
    plain.meter.begin()
    pairs = zip(ours.parts.rounds._studio._decode(latents), plain.trainer.decode(latents), strict=True)
    assert all(a.tobytes() == b.tobytes() for a, b in pairs)
    assert plain.trainer.timesteps == ours.parts.kernel.timesteps.tolist()


@EVERY
def test_a_sampled_step_is_the_kernels(tiny: Path, tmp_path: Path, method: str) -> None:
    here = case(tiny, method)
    ours, plain = Ours(here, tmp_path), Plain(here, tmp_path)
    kernel, trainer = ours.parts.kernel, plain.trainer
    x, noise = torch.randn(2, 3, 4, 8, 8, generator=torch.Generator().manual_seed(2)).unbind()
    assert trainer.start == pytest.approx(kernel.initial_scale)
    for step in range(here.steps):
        steps = torch.full((len(x),), step)
        mean, deviation = kernel.transition(x, noise, steps)
        theirs, their_deviation = trainer.mean_and_deviation(x, noise, step)
        assert torch.allclose(mean, theirs, rtol=1e-4, atol=1e-5)
        assert deviation[0].item() == pytest.approx(their_deviation, rel=1e-5, abs=1e-9)


# ---------------------------------------------------------------------------------------------- counting


@EVERY
@pytest.mark.parametrize("variant", VARIANTS)
def test_the_counted_calls_are_those_that_run(tiny: Path, tmp_path: Path, method: str, variant: str) -> None:
    here = case(tiny, method, prompts=4, passes=2)  # in batches of two
    running = MAKE[variant](here, tmp_path)
    unet = running.model.unet if isinstance(running, Ours) else running.trainer.unet
    with counting(unet) as seen:
        running.step()
    expected: Counter[tuple[int, bool]] = Counter()
    for calls in work(here, variant).values():
        expected[calls.rows, calls.backward] += calls.calls
    assert seen == expected
    assert sorted(running.meter.rounds[-1]) == ["decode", "score"]
    assert all(value > 0 for value in running.meter.rounds[-1].values())


@EVERY
def test_the_floor_runs_the_calls_of_a_round_and_changes_nothing(tiny: Path, tmp_path: Path, method: str) -> None:
    ours = Ours(case(tiny, method), tmp_path)
    floor = Floor(ours)
    before = {name: tensor.clone() for name, tensor in ours.model.unet.state_dict().items()}
    with counting(ours.model.unet) as alone:
        floor.step()
    assert all(torch.equal(tensor, before[name]) for name, tensor in ours.model.unet.state_dict().items())
    assert all(parameter.grad is None for parameter in ours.model.unet.parameters())
    with counting(ours.model.unet) as whole:
        ours.step()
    assert alone == whole


def test_stored_log_ratios_save_the_forwards_that_are_computed_again_otherwise() -> None:
    """Per picture, guidance branch and trained step; the deterministic last step is drawn besides."""

    def per_picture(method: str, variant: str, passes: int) -> float:
        here = dataclasses.replace(CASE, **{**METHODS[method], "steps": 51}, passes=passes)
        last = 1  # drawn, and neither scored nor trained
        return (units(work(here, variant)) / (here.prompts * here.images * here.branches) - last) / here.trained

    for variant in ("plain", "plain_fused"):
        # draw 1, reference 1, train 3
        assert per_picture("pso", "ours", 1) == per_picture("pso", variant, 1) == 5
        assert (per_picture("pso", "ours", 2), per_picture("pso", variant, 2)) == (8, 9)
        # the same for ours, whose values are known; theirs again, and once the policy has moved also the old ones
        assert (per_picture("prdp", "ours", 1), per_picture("prdp", variant, 1)) == (5, 6)
        assert (per_picture("prdp", "ours", 2), per_picture("prdp", variant, 2)) == (9, 12)


class counting:
    """Counts the calls of a module by (rows, whether with a graph)."""

    def __init__(self, module: torch.nn.Module) -> None:
        self._module, self.seen = module, Counter[tuple[int, bool]]()

    def __enter__(self) -> Counter[tuple[int, bool]]:
        def note(module: torch.nn.Module, inputs: tuple[Any, ...]) -> None:
            self.seen[len(inputs[0]), torch.is_grad_enabled()] += 1

        self._hook = self._module.register_forward_pre_hook(note)
        return self.seen

    def __exit__(self, *error: object) -> None:
        self._hook.remove()


# ---------------------------------------------------------------------------------------------- the report


@pytest.mark.slow
def test_a_whole_report() -> None:
    words = "--size shapes --repeats 1 --prompts 2 --images 2 --steps 3 --memory-steps 2 4 --variants plain ours"
    command = [sys.executable, "-m", "benchmarks.rollout_round", *words.split()]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-4000:]
    report = json.loads(done.stdout)
    assert report["benchmark"] == "rollout_round" and report["machine"]["device"] == "cpu"
    for method in ("pso", "prdp"):
        part = report[method]
        assert set(part["variants"]) == {"plain", "ours"}
        for name, variant in part["variants"].items():
            times = [variant[key]["median"] for key in ("decode", "score", "without_decode_and_score")]
            assert min(times) > 0 and sum(times) == pytest.approx(variant["seconds_per_round"]["median"])
            assert variant["last_loss"] != variant["first_loss"]
            if method == "pso":
                assert variant["first_loss"] == pytest.approx(math.log(2), abs=1e-5)
            assert variant["work"]["forward_units"] > 0 and variant["work"]["train"]["backward"], name
        assert part["floor"]["seconds_per_round"]["median"] > 0
        assert {"unet_draw", "unet_train", "prompts", "optimizer"} < set(part["rest"])
        assert set(part["ratios"]) == {
            "seconds_per_round: plain / ours",
            "without_decode_and_score: plain / ours",
            "forward_units: plain / ours",
            "without_decode_and_score: ours / floor",
        }
    memory = report["prdp"]["memory"]
    assert set(memory["steps"]) == {"2", "4"} and 0.5 < memory["ratio"] < 2
    assert all(0 < one["imports_gb"] < one["before_the_round_gb"] <= one["peak_gb"] for one in memory["steps"].values())
