"""The published models at full width and depth train here, and what is written opens in plain diffusers.

SD1.5, SDXL and SDXL-Turbo have random weights and small pictures: every layer is there, each is cheap.
"""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
import yaml
from accelerate.state import AcceleratorState
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from safetensors.torch import load_file
from tiny_runs import RECIPE, lines, merged, newest, write_store
from torch import Tensor

from diffusion import models, weights
from diffusion.models import DiffusionModel, load_model
from diffusion.settings import ModelSettings
from diffusion.train import main
from mmalign.errors import UserError
from mmalign.method import known, load

# diffusers' Euler scheduler hands a torch tensor to numpy, which asks for an argument torch does not take yet.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning")

CLASSES = {"sd": StableDiffusionPipeline, "sdxl": StableDiffusionXLPipeline}

# ------------------------------------------------------------------------------------------------ at full size
# What a method needs said beside `method.name` to make one update; a new method's test starts with its line here.

ROLLOUT: dict[str, Any] = {
    "prompts": "",
    "prompts_per_round": 1,
    "per_prompt": 2,
    "kernel": "ddim",
    "steps": 2,
    "guidance_scale": 0.0,
    "batch_size": 2,
    "reward": {"terms": [{"name": "red", "function": "tiny_reward:red"}]},
}
PAIRS: dict[str, dict[str, Any]] = {
    "dpo": {},
    "inpo": {"method": {"steps": 2}},
    "kto": {"data": {"pairing": {"strategy": "unpaired"}}},
    "pso_offline": {"method": {"timesteps": [249, 499, 749]}},
    "sft": {},
}
ROLLOUTS: dict[str, dict[str, Any]] = {
    "d3po": {},
    "ddpo": {},
    "prdp": {},
    "pso": {},
}
# A model's own part of the recipe: few-step models are noised, and drawn from, at their own timesteps.
SIZES: dict[str, dict[str, Any]] = {
    "sd15": {},
    "sdxl": {},
    "sdxl_turbo": {
        "model": {"distilled_steps": 4},
        "method": {"timesteps": [249, 499, 749]},
        "rollout": {"kernel": "euler_ancestral"},
    },
}
HALF = [("dpo", "sd15")]  # once in the precision that is usual on GPUs, which a CPU computes slowly
PIXELS = 64  # the smallest whose deepest attentions have more than one place to choose from
BLOCKS = {"sd15": 16, "sdxl": 70, "sdxl_turbo": 70}  # transformer blocks, each with two attentions of four matrices


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_store(tmp_path_factory.mktemp("store") / "store", records=3)


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


@pytest.fixture(autouse=True)
def fresh_accelerator() -> Iterator[None]:
    yield
    AcceleratorState._reset_state(reset_partial_state=True)  # its precision is the process's


@pytest.fixture(scope="module")
def pool() -> tiny_models.Pool:
    return {}


def test_the_tables_have_every_method() -> None:
    assert sorted(PAIRS | ROLLOUTS) == known("diffusion")
    feeds = {name: load("diffusion", name).FEED for name in PAIRS | ROLLOUTS}
    assert feeds == dict.fromkeys(PAIRS, "pairs") | dict.fromkeys(ROLLOUTS, "rollouts")


@pytest.mark.slow
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("method", [*PAIRS, *ROLLOUTS])
def test_one_update_of_every_method_on_the_published_models(
    method: str,
    size: str,
    train: Callable[..., Path],
    pool: tiny_models.Pool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # What is left out is the way of gigabytes to the disk and back, reading them for their names, and the estimate.
    dtype, half = (torch.bfloat16, "bf16") if (method, size) in HALF else (torch.float32, "fp32")
    pipeline = tiny_models.full_size(size, dtype=dtype, pool=pool)
    monkeypatch.setattr(models, "open_pipeline", lambda settings, unet_dtype: pipeline)
    monkeypatch.setattr(models, "module_fingerprint", lambda module: "0" * 64)
    monkeypatch.setattr("diffusion.train.estimate_seconds", lambda *_: 1.0)
    own = dict(SIZES[size])
    options = load("diffusion", method).Options.model_fields
    own["method"] = {"name": method, **{key: v for key, v in own.get("method", {}).items() if key in options}}
    (tmp_path / "prompts.txt").write_text("a red circle\n")
    recipe: dict[str, Any] = {
        "model": {"path": size, "dtype": half, "resolution": PIXELS},
        "adapter": {"rank": 4, "targets": "attention"},
        "optim": {"lr": 1e-3, "eps": 1e-8},
        "loop": {"steps": 1, "batch_size": 1, "precision": half},
    }
    if method in ROLLOUTS:
        rollout = merged(ROLLOUT, {"prompts": str(tmp_path / "prompts.txt"), **own.pop("rollout", {})})
        recipe |= {"data": None, "rollout": rollout}
    own.pop("rollout", None)
    run = train(recipe, own, {k: dict(v) for k, v in (PAIRS | ROLLOUTS)[method].items()})
    gc.collect()
    (line,) = lines(run)
    assert math.isfinite(line["loss"]) and 0 < line["grad_norm"] < math.inf
    if method == "dpo":
        assert line["loss"] == pytest.approx(math.log(2), abs=1e-6)
        assert line["rewards/margins_abs"] == 0 and line["errors/chosen"] > 0
    adapter = load_file(newest(run) / "model" / "pytorch_lora_weights.safetensors")
    moved = [tensor for key, tensor in adapter.items() if key.endswith(".lora_B.weight")]
    assert len(moved) == BLOCKS[size] * 2 * 4
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
