"""Few-step models: a UNet or a LoRA over a base, their schedulers, and the timesteps they were distilled at."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_models
import torch
import yaml
from diffusers import (
    EulerAncestralDiscreteScheduler,
    LCMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from tiny_runs import RECIPE, merged, newest, write_store
from torch import Tensor

from diffusion import weights
from diffusion.adapters import add_lora, lora_layers
from diffusion.export import main as export
from diffusion.models import DiffusionModel, load_model
from diffusion.sample import main as sample
from diffusion.settings import LoraSettings, ModelSettings
from diffusion.train import main as train
from diffusion.tuned import find_tuned, open_base, open_tuned
from mmalign import hub, shapes
from mmalign.errors import UserError

# Euler schedulers of diffusers hand tensors to numpy in a way that numpy 2 deprecates.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

KINDS = {"sd": StableDiffusionPipeline, "sdxl": StableDiffusionXLPipeline}
CROSS = {"sd": 16, "sdxl": 40}
FOUR = (999, 749, 499, 249)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("pipelines")
    return {
        "sd": tiny_models.write(tiny_models.sd_pipeline(), root / "sd"),
        "sdxl": tiny_models.write(tiny_models.sdxl_pipeline(), root / "sdxl"),
    }


@pytest.fixture
def opened(folders: dict[str, Path]) -> Callable[..., DiffusionModel]:
    def open_model(family: str = "sd", **settings: Any) -> DiffusionModel:
        return load_model(ModelSettings(path=str(folders[family]), **settings))

    return open_model


def another_unet(folder: Path, seed: int = 9) -> UNet2DConditionModel:
    """The UNet of a pipeline with other weights."""
    unet: Any = UNet2DConditionModel.from_pretrained(folder, subfolder="unet")
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in unet.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return unet


def same(unet: Any, other: Any) -> bool:
    mine, theirs = unet.state_dict(), other.state_dict()
    return mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)


# ----------------------------------------------------------------------------------------------------
# Another UNet


@pytest.mark.parametrize("family", ["sd", "sdxl"])
@pytest.mark.parametrize("how", ["folder", "pipeline", "file"])
def test_a_unet_over_a_base(
    how: str, family: str, opened: Callable[..., DiffusionModel], folders: dict[str, Path], tmp_path: Path
) -> None:
    other = another_unet(folders[family])
    folder = tmp_path / "unet"
    other.save_pretrained(folder)
    source = {
        "folder": folder,
        "pipeline": tmp_path,
        "file": folder / "diffusion_pytorch_model.safetensors",
    }[how]
    model = opened(family, unet=str(source))
    assert same(model.unet, other) and not model.unet.training
    assert not any(parameter.requires_grad for parameter in model.unet.parameters())
    base = opened(family)
    assert model.identity != base.identity and model.identity.startswith(f"{family}@")
    assert same(model.vae, base.vae)
    half = opened(family, unet=str(source), dtype="fp16")
    assert half.unet.dtype == torch.float16
    full = load_model(ModelSettings(path=str(folders[family]), unet=str(source), dtype="fp16"), train_full=True)
    assert same(full.unet, other)
    # one identity however it is given
    shutil.move(folder, tmp_path / "elsewhere")
    assert opened(family, unet=str(tmp_path / "elsewhere")).identity == model.identity


def broken_file(change: Callable[[dict[str, Tensor]], object]) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        tensors = load_file(folder / "diffusion_pytorch_model.safetensors")
        change(tensors)
        save_file(tensors, folder / "broken.safetensors")
        return folder / "broken.safetensors"

    return make


def edited(**changes: Any) -> Callable[[Path], Path]:
    def edit(folder: Path) -> Path:
        file = folder / "config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
        return folder

    return edit


def without_config(folder: Path) -> Path:
    (folder / "config.json").unlink()
    return folder


def pickled_folder(folder: Path) -> Path:
    file = folder / "diffusion_pytorch_model.safetensors"
    file.rename(file.with_suffix(".bin"))
    return folder


def replaced(change: Callable[[dict[str, Tensor]], object]) -> Callable[[Path], Path]:
    """A folder whose own file was changed."""

    def make(folder: Path) -> Path:
        broken_file(change)(folder).replace(folder / "diffusion_pytorch_model.safetensors")
        return folder

    return make


def file_of(name: str, content: bytes = b"") -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        (folder / name).write_bytes(content)
        return folder / name

    return make


def original(tensors: dict[str, Tensor]) -> None:
    for name in list(tensors):
        tensors["model.diffusion_model." + name] = tensors.pop(name)


BROKEN: dict[str, tuple[Callable[[Path], Path | str], str]] = {
    "pickled file": (file_of("dmd2.bin"), r"pickled weights \(\.bin\) can run code.*weights_only=True.*save_file"),
    "pickled, not here": (lambda _: "tianweiy/DMD2/dmd2.bin", r"pickled weights \(\.bin\)"),
    "pickled folder": (pickled_folder, r"has only pickled weights \(\.bin\)"),
    "another file": (file_of("unet.yaml"), "not a .safetensors file"),
    "truncated": (file_of("x.safetensors", b"1234"), "the weights cannot be read"),
    "nowhere": (lambda _: "./nowhere", "there is no such file or folder"),
    "missing file": (lambda _: "runs/unet.safetensors", "there is no such file or folder"),
    "upwards": (lambda _: "owner/name/../x.safetensors", "there is no such file or folder"),
    "hub file": (lambda _: "owner/name/x.safetensors", r"not in the local hub cache \(offline\)"),
    "hub model": (lambda _: "owner/name", r"not in the local hub cache \(offline\)"),
    "no config": (without_config, "not a diffusers UNet: it has no config.json"),
    "missing": (broken_file(lambda t: t.pop("conv_in.bias")), r"another UNet: 1 missing \(conv_in\.bias\)"),
    "unknown": (broken_file(lambda t: t.update(more=torch.ones(1))), r"another UNet: 1 unknown \(more\)"),
    "shapes": (
        broken_file(lambda t: t.update({"conv_in.bias": torch.ones(3)})),
        r"another UNet: 1 of another shape \(conv_in\.bias\)",
    ),
    "original": (broken_file(original), "in the original layout"),
    "folder, missing": (replaced(lambda t: t.pop("conv_in.bias")), "conv_in.bias"),
    "folder, unknown": (replaced(lambda t: t.update(more=torch.ones(1))), r"1 unknown \(more\)"),
    "folder, shapes": (replaced(lambda t: t.update({"conv_in.bias": torch.ones(3)})), "conv_in"),
    "another kind": (edited(_class_name="UNetMotionModel"), "a UNetMotionModel, not a UNet2DConditionModel"),
    "wider": (edited(cross_attention_dim=768), "its cross_attention_dim is 768, the base's 16"),
    "inpainting": (edited(in_channels=9), "its in_channels is 9, the base's 4"),
    "guided": (edited(time_cond_proj_dim=8), "cannot load the UNet|conditioned on more|missing"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_what_is_no_unet_of_this_base_is_one_line(
    kind: str, opened: Callable[..., DiffusionModel], folders: dict[str, Path], tmp_path: Path
) -> None:
    make, message = BROKEN[kind]
    source = make(Path(shutil.copytree(folders["sd"] / "unet", tmp_path / "unet")))
    with pytest.raises(UserError, match=message) as caught:
        opened(unet=str(source))
    assert "\n" not in str(caught.value) and f"model.unet: {source}" in str(caught.value)


def test_a_file_of_the_hub_is_asked_for_by_name(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: list[tuple[str, str]] = []

    def download(name: str, file: str, **_: Any) -> str:
        asked.append((name, file))
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    source = "tianweiy/DMD2/sub/dmd2.safetensors"
    assert hub.single_file(source, offline=False, place="model.unet") == tmp_path
    assert asked == [("tianweiy/DMD2", "sub/dmd2.safetensors")]
    assert hub.single_file("tianweiy/DMD2", offline=False, place="model.unet") is None


# ----------------------------------------------------------------------------------------------------
# A LoRA


def write_lora(pipeline: Any, folder: Path, *, rank: int = 3, alpha: int = 6, texts: bool = False) -> Path:
    """A LoRA as diffusers' scripts write them, of the UNet and perhaps of the text encoder."""
    from peft.utils import get_peft_model_state_dict

    def layers(module: Any, targets: list[str]) -> tuple[dict[str, Tensor], dict[str, Any]]:
        config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=targets)
        module.add_adapter(config)
        generator = torch.Generator().manual_seed(4)
        with torch.no_grad():
            for name, parameter in sorted(module.named_parameters()):
                if ".lora_" in name:
                    parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
        return get_peft_model_state_dict(module), config.to_dict()

    unet, config = layers(pipeline.unet, ["to_q", "to_v", "conv1", "proj_in"])
    written: dict[str, Any] = {"unet_lora_layers": unet, "unet_lora_adapter_metadata": config}
    if texts:
        text, config = layers(pipeline.text_encoder, ["q_proj"])
        written |= {"text_encoder_lora_layers": text, "text_encoder_lora_adapter_metadata": config}
    type(pipeline).save_lora_weights(folder, **written)
    return folder


def plain(folder: Path, family: str) -> Any:
    pipeline = KINDS[family].from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@torch.no_grad()
def picture(pipeline: Any, steps: int = 2) -> Tensor:
    made: Tensor = pipeline(
        "a red circle",
        num_inference_steps=steps,
        guidance_scale=0.0,
        generator=torch.Generator().manual_seed(1),
        output_type="latent",
    ).images
    return made


@pytest.mark.parametrize(("family", "texts"), [("sd", True), ("sdxl", False)])
def test_a_lora_is_fused(
    family: str, texts: bool, opened: Callable[..., DiffusionModel], folders: dict[str, Path], tmp_path: Path
) -> None:
    folder = write_lora(plain(folders[family], family), tmp_path / "lora", texts=texts)
    model = opened(family, lora=str(folder))
    assert not lora_layers(model.unet) and not lora_layers(model.pipeline.text_encoder)
    parts = (model.unet, model.pipeline.text_encoder)
    assert not any(p.requires_grad or part.training for part in parts for p in part.parameters())
    theirs = plain(folders[family], family)
    before = picture(theirs)
    theirs.load_lora_weights(str(folder))
    expected = picture(theirs)
    assert (expected - before).abs().max() > 1e-3
    torch.testing.assert_close(picture(model.pipeline), expected, atol=1e-4, rtol=1e-4)
    # the identity is of both; a tuned adapter is the only one afterwards
    base = opened(family)
    file = folder / "pytorch_lora_weights.safetensors"
    assert opened(family, lora=str(file)).identity == model.identity != base.identity
    add_lora(model.unet, LoraSettings(rank=2))
    assert list(model.unet.peft_config) == ["default"]


def test_a_folder_with_one_file_will_do_for_a_lora(
    opened: Callable[..., DiffusionModel], folders: dict[str, Path], tmp_path: Path
) -> None:
    folder = write_lora(plain(folders["sd"], "sd"), tmp_path / "lora")
    (folder / "pytorch_lora_weights.safetensors").rename(folder / "mine.safetensors")
    expected = opened(lora=str(folder / "mine.safetensors")).identity
    assert opened(lora=str(folder)).identity == expected
    shutil.copy(folder / "mine.safetensors", folder / "other.safetensors")
    with pytest.raises(UserError, match=r"2 \.safetensors files in the folder.*model\.lora"):
        opened(lora=str(folder))


def lora_of(change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> Callable[[Path], str]:
    def make(folder: Path) -> str:
        tensors = change(load_file(folder / "pytorch_lora_weights.safetensors"))
        save_file(tensors, folder / "changed.safetensors")
        return str(folder / "changed.safetensors")

    return make


def renamed(old: str, new: str) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    return lambda tensors: {name.replace(old, new): tensor for name, tensor in tensors.items()}


NO_LORA: dict[str, tuple[Callable[[Path], str], str]] = {
    "nowhere": (lambda _: "./nowhere", "there is no such file or folder"),
    "hub": (lambda _: "owner/name", r"not in the local hub cache \(offline\)"),
    "pickled": (lambda _: "lcm.bin", "pickled weights"),
    "no LoRA": (lora_of(lambda _: {"weight": torch.ones(1)}), "cannot load the LoRA"),
    "of another part": (lora_of(renamed("unet.", "transformer.")), "in it is for a UNet|cannot load the LoRA"),
    "unknown layers": (lora_of(renamed("mid_block", "middle")), r"\d+ of the \d+ matrices have no place"),
    "all unknown": (lora_of(renamed("blocks", "stones")), "cannot load the LoRA|have no place"),
    "shapes": (
        lora_of(lambda tensors: {name: torch.cat([t, t]) for name, t in tensors.items()}),
        "cannot load the LoRA",
    ),
    "not finite": (lora_of(lambda tensors: {n: t * torch.nan for n, t in tensors.items()}), "not finite"),
}


@pytest.mark.parametrize("kind", NO_LORA)
def test_what_is_no_lora_of_this_base_is_one_line(
    kind: str,
    opened: Callable[..., DiffusionModel],
    folders: dict[str, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    make, message = NO_LORA[kind]
    source = make(write_lora(plain(folders["sd"], "sd"), tmp_path / "lora"))
    capsys.readouterr()
    with pytest.raises(UserError, match=message) as caught:
        opened(lora=source)
    assert "\n" not in str(caught.value) and f"model.lora: {source}" in str(caught.value)
    assert capsys.readouterr() == ("", "")  # no word of the libraries' own


def test_a_lora_of_another_family_is_one_line(
    opened: Callable[..., DiffusionModel], folders: dict[str, Path], tmp_path: Path
) -> None:
    folder = write_lora(plain(folders["sd"], "sd"), tmp_path / "lora")
    with pytest.raises(UserError, match=r"model\.lora.*made for this base"):
        opened("sdxl", lora=str(folder))


# ----------------------------------------------------------------------------------------------------
# Schedulers


@pytest.mark.parametrize("family", ["sd", "sdxl"])
@pytest.mark.parametrize("name", ["ddim", "ddpm", "euler_ancestral", "lcm"])
def test_a_scheduler_of_another_kind_has_the_same_noise(
    name: str, family: str, opened: Callable[..., DiffusionModel]
) -> None:
    base, model = opened(family), opened(family, scheduler=name, distilled_steps=4)
    scheduler = model.pipeline.scheduler
    assert type(scheduler).__name__.lower().startswith(name.replace("_", ""))
    assert torch.equal(model.schedule.alphas_cumprod, base.schedule.alphas_cumprod)
    assert not scheduler.config.get("clip_sample")
    assert model.distilled_timesteps() == model.distilled_timesteps(4) == FOUR
    assert model.distilled_timesteps(2) == (999, 499) and model.distilled_timesteps(1) == (999,)
    seen: list[float] = []
    model.unet.register_forward_pre_hook(lambda _, inputs: seen.append(float(inputs[1])))
    model.sample(["a red circle"], seeds=[1], steps=4, guidance_scale=0.0)
    assert tuple(round(t) for t in seen) == FOUR  # one forward each: no guidance
    assert model.identity == base.identity  # of the weights


def test_timesteps_of_consistency_models_are_of_their_grid(opened: Callable[..., DiffusionModel]) -> None:
    lcm = opened(scheduler="lcm")  # 50 steps, as LCMs are distilled
    assert lcm.distilled_steps == 50 and lcm.distilled_timesteps(4) == (999, 759, 499, 259)
    assert len(lcm.distilled_timesteps()) == 50 and lcm.distilled_timesteps()[-1] == 19
    eight = opened(scheduler="lcm", distilled_steps=8)  # DMD2 is trained at eight and drawn at four by PSO's authors
    assert eight.distilled_timesteps(4) == FOUR and eight.distilled_timesteps()[1] == 874


def test_the_models_own_scheduler_can_say_it(folders: dict[str, Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(folders["sd"], tmp_path / "own"))
    pipeline = plain(folder, "sd")
    pipeline.scheduler = LCMScheduler.from_config(pipeline.scheduler.config, original_inference_steps=4)
    pipeline.save_pretrained(folder)
    model = load_model(ModelSettings(path=str(folder)))
    assert model.distilled_steps == 4 and model.distilled_timesteps() == FOUR
    pipeline.scheduler = EulerAncestralDiscreteScheduler.from_config(
        pipeline.scheduler.config, timestep_spacing="trailing"
    )
    pipeline.save_pretrained(folder)
    said = load_model(ModelSettings(path=str(folder), distilled_steps=4))
    assert said.distilled_timesteps() == FOUR
    with pytest.raises(UserError, match=r"not known.*model\.distilled_steps.*4 for SDXL-Turbo"):
        load_model(ModelSettings(path=str(folder))).distilled_timesteps(4)


def test_wrong_steps_are_one_line(opened: Callable[..., DiffusionModel]) -> None:
    model = opened(scheduler="euler_ancestral", distilled_steps=4)
    with pytest.raises(UserError, match=r"30 steps of a model that was distilled at 4.*sampler\.steps.*at most 4"):
        model.sample(["a red circle"], seeds=[1], steps=30, guidance_scale=0.0)
    with pytest.raises(UserError, match="8 steps of a model that was distilled at 4"):
        model.distilled_timesteps(8)
    with pytest.raises(UserError, match="2000 steps of 1000 timesteps"):
        opened().sample(["a red circle"], seeds=[1], steps=2000, guidance_scale=0.0)
    with pytest.raises(UserError, match=r"3 does not divide the 1000 timesteps.*model\.distilled_steps"):
        opened(distilled_steps=3)


# ----------------------------------------------------------------------------------------------------
# The embedded few-step model


@pytest.fixture
def few_step(monkeypatch: pytest.MonkeyPatch, folders: dict[str, Path], tmp_path: Path) -> UNet2DConditionModel:
    """A tiny base and a UNet with a scheduler over it, in the place of the embedded ones."""
    monkeypatch.setattr(shapes, "model_folder", lambda name: folders["sd"] if name == "t2i" else tmp_path / name)
    student = another_unet(folders["sd"])
    student.save_pretrained(tmp_path / "t2i_4step" / "unet")
    config = plain(folders["sd"], "sd").scheduler.config
    scheduler = EulerAncestralDiscreteScheduler.from_config(config, timestep_spacing="trailing")
    scheduler.save_pretrained(tmp_path / "t2i_4step" / "scheduler")
    return student


def test_the_embedded_few_step_model(few_step: UNet2DConditionModel, folders: dict[str, Path]) -> None:
    model = load_model(ModelSettings(path="shapes-4step"))
    assert same(model.unet, few_step) and model.identity.startswith("shapes-4step@")
    assert isinstance(model.pipeline.scheduler, EulerAncestralDiscreteScheduler)
    assert model.distilled_steps == 4 and model.distilled_timesteps() == FOUR
    base = load_model(ModelSettings(path="shapes"))
    assert same(base.unet, plain(folders["sd"], "sd").unet) and base.distilled_steps is None
    assert load_model(ModelSettings(path="shapes-4step", scheduler="lcm")).distilled_timesteps(2) == (999, 499)


@pytest.mark.parametrize(
    ("name", "hint"), [("shapes-4steps", "'shapes-4step'"), ("shapes_4step", "'shapes-4step'"), ("shape", "no such")]
)
def test_names_of_models_that_do_not_come_along(name: str, hint: str) -> None:
    with pytest.raises(UserError, match=hint):
        load_model(ModelSettings(path=name))


def test_a_folder_called_like_an_embedded_model_is_a_folder(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(folders["sd"], tmp_path / "shapes-mine")
    monkeypatch.chdir(tmp_path)
    assert load_model(ModelSettings(path="shapes-mine")).resolution == 32


def test_the_few_step_model_that_comes_along() -> None:
    few = load_model(ModelSettings(path="shapes-4step"))
    base = load_model(ModelSettings(path="shapes"))
    assert few.distilled_timesteps() == FOUR
    assert same(few.vae, base.vae) and not same(few.unet, base.unet)
    assert torch.equal(few.schedule.alphas_cumprod, base.schedule.alphas_cumprod)
    (picture,) = few.sample(["a red circle"], seeds=[1], steps=4, guidance_scale=0.0)
    assert np.asarray(picture).std() > 5


def pixels(folder: Path) -> Any:
    from PIL import Image

    return np.asarray(Image.open(folder / "00000.png")).astype(int)


def test_few_steps_from_the_command(few_step: UNet2DConditionModel, tmp_path: Path) -> None:
    def run(out: str, *words: str) -> dict[str, Any]:
        sample(["--model", "shapes-4step", "--prompts", "a red circle", "--out", str(tmp_path / out), *words])
        row: dict[str, Any] = json.loads((tmp_path / out / "index.jsonl").read_text())
        return row

    row = run("own")
    assert (row["steps"], row["guidance_scale"]) == (4, 0.0)
    run("said", "--steps", "4", "--guidance-scale", "0")
    assert np.array_equal(pixels(tmp_path / "own"), pixels(tmp_path / "said"))
    assert run("two", "--steps", "2", "--guidance-scale", "1.5")["steps"] == 2
    with pytest.raises(UserError, match=r"30 steps of a model that was distilled at 4 timesteps \(--steps\)"):
        run("wrong", "--steps", "30")
    assert not (tmp_path / "wrong").exists()


# ----------------------------------------------------------------------------------------------------
# Runs on such bases


@pytest.fixture
def run(tmp_path: Path, folders: dict[str, Path]) -> Path:
    """A run on SDXL with another UNet, a LoRA fused into it, and a few-step scheduler: all at once."""
    base = tmp_path / "base"
    another_unet(folders["sdxl"]).save_pretrained(base / "unet")
    write_lora(plain(folders["sdxl"], "sdxl"), base / "lora")
    recipe = merged(
        RECIPE,
        {
            "model": {
                "path": str(folders["sdxl"]),
                "unet": str(base / "unet" / "diffusion_pytorch_model.safetensors"),
                "lora": str(base / "lora"),
                "scheduler": "lcm",
                "distilled_steps": 4,
            },
            "data": {"path": str(write_store(tmp_path / "store", records=2))},
            "method": {"name": "dpo", "beta": 2000.0, "timesteps": [249, 499, 749]},
            "optim": {"lr": 0.1},
            "validation": {"prompts": ["a red circle"], "sampler": {"steps": 4, "guidance_scale": 0.0}},
            "loop": {"steps": 2, "sample_every": 1, "output_dir": str(tmp_path / "run")},
        },
    )
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    assert train([str(tmp_path / "recipe.yaml")]) == 0
    return tmp_path / "run"


def test_a_run_on_a_few_step_base(run: Path, folders: dict[str, Path], tmp_path: Path) -> None:
    tuned = find_tuned(run)
    model = open_tuned(tuned)
    assert model.identity == tuned.manifest.summary["base"]
    assert model.distilled_timesteps() == FOUR
    expected = picture(model.pipeline, steps=4)
    untuned = open_base(tuned).pipeline
    assert (picture(untuned, steps=4) - expected).abs().max() > 1e-3

    # plain diffusers: the same base, made there by hand, and the trained adapter on it
    theirs = plain(folders["sdxl"], "sdxl")
    theirs.unet.load_state_dict(load_file(tmp_path / "base" / "unet" / "diffusion_pytorch_model.safetensors"))
    theirs.load_lora_weights(str(tmp_path / "base" / "lora"))
    theirs.fuse_lora(components=["unet"])
    theirs.unload_lora_weights()
    theirs.scheduler = LCMScheduler.from_config(theirs.scheduler.config, original_inference_steps=4)
    torch.testing.assert_close(picture(theirs, steps=4), picture(untuned, steps=4), atol=1e-4, rtol=1e-4)
    theirs.load_lora_weights(str(newest(run) / "model"), weight_name="pytorch_lora_weights.safetensors")
    torch.testing.assert_close(picture(theirs, steps=4), expected, atol=1e-4, rtol=1e-4)

    # exported whole it samples alike: UNet, LoRA, adapter and scheduler are in it
    assert export([str(run), "--out", str(tmp_path / "whole"), "--format", "diffusers"]) == 0
    whole = plain(tmp_path / "whole", "sdxl")
    assert whole.scheduler.config.original_inference_steps == 4
    torch.testing.assert_close(picture(whole, steps=4), expected, atol=1e-4, rtol=1e-4)
    assert load_model(ModelSettings(path=str(tmp_path / "whole"))).distilled_timesteps() == FOUR
    assert export([str(run), "--out", str(tmp_path / "x.safetensors")]) == 0
    sample([str(run), "--prompts", "a red circle", "--out", str(tmp_path / "drawn")])
    assert json.loads((tmp_path / "drawn" / "index.jsonl").read_text())["steps"] == 4


def test_steps_of_later_pictures_are_checked_first(folders: dict[str, Path], tmp_path: Path) -> None:
    drawn = {"sampler": {"steps": 30, "guidance_scale": 0.0}}
    judged = {**drawn, "scorers": [{"name": "shapes"}], "preference": "style", "arms": {"dpo": []}}
    for section in ({"validation": {**drawn, "prompts": ["a red circle"]}}, {"evaluation": judged}):
        recipe = merged(
            RECIPE,
            {
                "model": {"path": str(folders["sd"]), "scheduler": "lcm", "distilled_steps": 4},
                "data": {"path": "nowhere"},
                "loop": {"sample_every": 1, "output_dir": str(tmp_path / "run")},
                **section,
            },
        )
        (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
        with pytest.raises(UserError, match=rf"30 steps of a model .*\({next(iter(section))}\.sampler\.steps\)"):
            train([str(tmp_path / "recipe.yaml")])
    assert not (tmp_path / "run").exists()


def test_a_run_from_anothers_weights_reopens(folders: dict[str, Path], tmp_path: Path) -> None:
    store = write_store(tmp_path / "store", records=2)
    first = tmp_path / "first"
    for folder, start in ((first, None), (tmp_path / "second", first)):
        recipe = merged(
            RECIPE,
            {
                "model": {"path": str(folders["sd"])},
                "data": {"path": str(store)},
                "optim": {"lr": 0.1},
                "loop": {"steps": 1, "output_dir": str(folder), "init_from": start and str(newest(start))},
            },
        )
        (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
        assert train([str(tmp_path / "recipe.yaml")]) == 0
    tuned = find_tuned(tmp_path / "second")
    model = open_tuned(tuned)
    assert model.identity == tuned.manifest.summary["base"] != find_tuned(first).manifest.summary["base"]
    expected = load_model(ModelSettings(path=str(folders["sd"])))
    weights.start_from(expected, newest(first))
    weights.open_weights(expected, newest(tmp_path / "second"))
    torch.testing.assert_close(picture(model.pipeline), picture(expected.pipeline), atol=1e-4, rtol=1e-4)
