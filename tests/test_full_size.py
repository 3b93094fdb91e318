"""The published models at full width and depth train here, and what is written opens in plain diffusers.

SD1.5 and SDXL have random weights, in half precision, and latents of 8 x 8: every layer is there, each is cheap.
"""

from __future__ import annotations

import gc
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
import yaml
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from safetensors.torch import load_file
from tiny_runs import RECIPE, lines, merged, newest, write_store
from torch import Tensor

from diffusion import models, weights
from diffusion.models import DiffusionModel, load_model
from diffusion.settings import ModelSettings
from diffusion.train import main
from mmalign.errors import UserError

# diffusers' Euler scheduler hands a torch tensor to numpy, which asks for an argument torch does not take yet.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning")

CLASSES = {"sd": StableDiffusionPipeline, "sdxl": StableDiffusionXLPipeline}
ONE_STEP = {"optim": {"lr": 1e-3, "eps": 1e-8}, "loop": {"steps": 1, "batch_size": 1}}


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_store(tmp_path_factory.mktemp("store") / "store", records=1)


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("bases")
    return {
        "sd": tiny_models.write(tiny_models.sd_pipeline(), root / "sd"),
        "sdxl": tiny_models.write(tiny_models.sdxl_pipeline(), root / "sdxl"),
    }


@pytest.fixture
def train(store: Path, tmp_path: Path) -> Callable[..., Path]:
    """Runs a recipe through the command; returns the run's folder."""

    def run(*changes: dict[str, Any]) -> Path:
        recipe: dict[str, Any] = RECIPE
        for change in ({"data": {"path": str(store)}, "loop": {"output_dir": str(tmp_path / "run")}}, *changes):
            recipe = merged(recipe, change)
        file = tmp_path / "recipe.yaml"
        file.write_text(yaml.safe_dump(recipe))
        assert main([str(file)]) == 0
        return tmp_path / "run"

    return run


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sd15", "sdxl"])
def test_one_step_of_the_published_models(
    name: str, train: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    # What is left out is the way of gigabytes to the disk and back.
    built = [tiny_models.full_size(name, dtype=torch.bfloat16)]
    for part in built[0].components.values():
        if isinstance(part, torch.nn.Module):
            part.requires_grad_(False)
    monkeypatch.setattr(models, "open_pipeline", lambda settings, unet_dtype: built.pop())
    settings = {"path": name, "dtype": "bf16", "resolution": 64}
    run = train(
        {"model": settings, "adapter": {"rank": 4, "targets": "attention"}, "loop": {"precision": "bf16"}}, ONE_STEP
    )
    gc.collect()
    (line,) = lines(run)
    assert line["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert line["rewards/margins_abs"] == 0 and line["errors/chosen"] > 0
    assert 0 < line["grad_norm"] < math.inf
    adapter = load_file(newest(run) / "model" / "pytorch_lora_weights.safetensors")
    blocks = {"sd15": 16, "sdxl": 70}[name]  # transformer blocks, each with two attentions of four matrices
    moved = [tensor for key, tensor in adapter.items() if key.endswith(".lora_B.weight")]
    assert len(moved) == blocks * 2 * 4
    assert all(tensor.isfinite().all() and tensor.abs().max() > 0 for tensor in moved)


# ------------------------------------------------------------------------------------------------ in small


@torch.no_grad()
def picture(pipeline: Any) -> Tensor:
    pipeline.set_progress_bar_config(disable=True)
    made: Tensor = pipeline(
        "a red circle", num_inference_steps=2, generator=torch.Generator().manual_seed(1), output_type="latent"
    ).images
    return made


@pytest.mark.parametrize("family", ["sd", "sdxl"])
def test_plain_diffusers_opens_a_checkpoint(family: str, bases: dict[str, Path], train: Callable[..., Path]) -> None:
    run = train({"model": {"path": str(bases[family])}, "adapter": {"alpha": 3.0}, "optim": {"lr": 0.1}})
    folder = newest(run) / "model"
    pipeline = CLASSES[family].from_pretrained(bases[family])
    before = picture(pipeline)
    pipeline.load_lora_weights(str(folder), weight_name="pytorch_lora_weights.safetensors")
    after = picture(pipeline)
    ours = load_model(ModelSettings(path=str(bases[family])))
    weights.open_weights(ours, folder)
    assert (after - before).abs().max() > 1e-3
    assert torch.allclose(after, picture(ours.pipeline), atol=1e-5)


@pytest.mark.parametrize("family", ["sd", "sdxl"])
def test_velocity_prediction_trains(family: str, bases: dict[str, Path], train: Callable[..., Path]) -> None:
    run = train({"model": {"path": str(bases[family]), "prediction_type": "v_prediction"}})
    first, *_, last = lines(run)
    assert first["rewards/margins_abs"] == 0 < last["rewards/margins_abs"]
    assert 0 < first["grad_norm"] < math.inf


def turbo(base: Path, timesteps: list[int]) -> dict[str, Any]:
    return {
        "model": {"path": str(base), "zero_terminal_snr": True},
        "method": {"name": "dpo", "beta": 2000.0, "timesteps": timesteps},
    }


def test_the_turbo_schedule_trains_at_its_timesteps(
    bases: dict[str, Path], train: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: set[int] = set()
    predict = DiffusionModel.predict

    def watched(self: Any, unet: Any, x_t: Any, t: Any, conditioning: Any) -> Any:
        if torch.is_grad_enabled():  # the policy's forwards in training
            seen.update(t.tolist())
        return predict(self, unet, x_t, t, conditioning)

    monkeypatch.setattr(DiffusionModel, "predict", watched)
    run = train(turbo(bases["sdxl"], [249, 499, 749]), {"loop": {"steps": 12, "batch_size": 1}})
    assert seen == {249, 499, 749}
    assert all(0 < line["grad_norm"] < math.inf for line in lines(run))


def test_the_turbo_step_that_teaches_nothing_is_refused(bases: dict[str, Path], train: Callable[..., Path]) -> None:
    with pytest.raises(UserError, match="999"):
        train(turbo(bases["sdxl"], [249, 499, 749, 999]))
