"""The benchmarks run, measure what they say, and compare like with like. No time is asserted."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch

from benchmarks import inpo_step
from benchmarks.dpo_step import MAKE, VARIANTS, WARM_UP, Case, Floor, Ours, Plain
from diffusion.parts import draw_timesteps
from mmalign.memory import resident_gb

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.write(tiny_models.sd_pipeline(), tmp_path_factory.mktemp("base") / "tiny")


def case(size: Path | str, **changes: Any) -> Case:
    settings = {"train": "lora", "batch": 2, "resolution": None, "precision": "fp32", "rank": 4}
    return Case(size=str(size), gradient_checkpointing=False, device=torch.device("cpu"), **{**settings, **changes})


@pytest.mark.slow
def test_a_whole_report() -> None:
    words = "--size shapes --repeats 1 --train lora full --variants plain ours"
    command = [sys.executable, "-m", "benchmarks.dpo_step", *words.split()]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-4000:]
    report = json.loads(done.stdout)
    assert report["benchmark"] == "dpo_step" and report["machine"]["device"] == "cpu"
    assert {"torch", "diffusers", "mmalign"} < set(report["versions"])
    for train in ("lora", "full"):
        part = report[train]
        assert set(part["variants"]) == {"plain", "ours"}
        for variant in part["variants"].values():
            assert variant["first_loss"] == pytest.approx(math.log(2), abs=1e-6)
            assert variant["last_loss"] != variant["first_loss"]
            assert 0 < variant["seconds_per_step"]["min"] <= variant["seconds_per_step"]["median"]
            assert 0 < variant["imports_gb"] < variant["peak_gb"]
        assert part["floor"]["seconds_per_step"]["median"] > 0
        assert {"data", "optimizer", "draws_errors_and_loss", "gradient_norm_and_clipping"} < set(part["rest"])
        assert {"pairs_per_second: ours / plain", "peak_memory: ours / plain", "step: ours / floor"} <= set(
            part["ratios"]
        )
    lora, full = (report[train]["model"] for train in ("lora", "full"))
    assert lora["unet_parameters"] == full["unet_parameters"] == full["trained_parameters"] > lora["trained_parameters"]


def test_the_memory_of_a_process_is_its_own() -> None:
    held = torch.ones(2**26)  # a quarter of a GiB that the new process must not be charged for
    before = resident_gb()
    command = [sys.executable, "-c", "from mmalign.memory import resident_gb; print(resident_gb())"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert held.sum() > 0
    assert 0 < float(done.stdout) < before


@pytest.mark.parametrize("train", ["lora", "full"])
def test_both_sides_compute_the_same_loss_and_gradient(tiny: Path, tmp_path: Path, train: Any) -> None:
    """On equal weights, latents and draws, after both have left the start, where every loss is log 2."""
    ours, plain = Ours(case(tiny, train=train), tmp_path), Plain(case(tiny, train=train), tmp_path)
    generator = torch.Generator().manual_seed(0)
    theirs = dict(plain.trainer.unet.named_parameters())
    with torch.no_grad():
        for name, parameter in ours.model.unet.named_parameters():
            if parameter.requires_grad:
                parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
                theirs[name].copy_(parameter)

    batch = next(ours.batches)
    loss, _ = next(ours.method.losses(batch))
    loss.backward()
    draws = batch.draws("noise")
    t = draw_timesteps(draws, torch.arange(1000)).repeat(2)
    noise = draws.normal(batch.latents.shape[1:]).repeat(2, 1, 1, 1)
    text = (batch.conditioning.embeds.chunk(2)[0], None)
    for fused in (False, True):
        plain.trainer.fused = fused
        plain.trainer.optimizer.zero_grad()
        published = plain.trainer.loss(batch.latents, noise, t, text)
        published.backward()
        assert abs(published.item() - math.log(2)) > 1e-3
        assert published.item() == pytest.approx(loss.item(), rel=2e-3)  # beta makes rounding large
        for name, parameter in ours.model.unet.named_parameters():
            if parameter.requires_grad:
                assert parameter.grad is not None and theirs[name].grad is not None
                assert torch.allclose(
                    parameter.grad, theirs[name].grad, rtol=1e-2, atol=1e-4 * parameter.grad.abs().max() + 1e-6
                )


def test_both_sides_see_the_same_pictures(tiny: Path, tmp_path: Path) -> None:
    ours, plain = Ours(case(tiny), tmp_path), Plain(case(tiny), tmp_path)
    mine = ours.data.batch([0, 1], [0, 0], seed=0).latents
    vae = plain.trainer.vae
    first = plain.batches[0]
    with torch.no_grad():
        theirs = vae.encode(torch.cat([first.chosen, first.rejected])).latent_dist.mean * vae.config.scaling_factor
    assert torch.allclose(mine, theirs, atol=1e-4)


def test_after_the_warm_up_reference_errors_come_from_the_cache(tiny: Path, tmp_path: Path) -> None:
    assert set(MAKE) == set(VARIANTS)
    cached = MAKE["ours_cached"](case(tiny), tmp_path)
    reference = cached.parts.reference
    for _ in range(WARM_UP):
        cached.step()
    assert (reference.hits, reference.misses) == (0, 8)  # two updates of two pairs
    for _ in range(3):
        cached.step()
    assert (reference.hits, reference.misses) == (12, 8)


def test_the_floor_leaves_the_model_as_it_was(tiny: Path, tmp_path: Path) -> None:
    ours = Ours(case(tiny), tmp_path)
    before = {name: tensor.clone() for name, tensor in ours.model.unet.state_dict().items()}
    Floor(ours).step()
    assert all(torch.equal(tensor, before[name]) for name, tensor in ours.model.unet.state_dict().items())
    assert all(parameter.grad is None for parameter in ours.model.unet.parameters())


def test_inpo_is_measured_beside_dpo(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert inpo_step.main(["--size", str(tiny), "--repeats", "1", "--batch", "2", "--device", "cpu"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert set(report["variants"]) == {"dpo", "inpo_cached", "inpo_online", "dpo_single", "authors"}
    for variant in report["variants"].values():
        assert variant["first_loss"] == pytest.approx(math.log(2), abs=1e-6)
        assert variant["seconds_per_step"]["median"] > 0
    units = {name: ratio["forward_units"] for name, ratio in report["ratios"].items()}
    assert units["step: inpo_cached / dpo"] == 1
    # the specification's count: 10.4 units a step with the reference, against 4
    assert units["step: authors / dpo_single"] == pytest.approx((4 + 6.382) / 4)
