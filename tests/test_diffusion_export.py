"""Export: what is written, opened by plain diffusers, is the trained model; what would not be is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from diffusion import exporting, weights
from diffusion.adapters import add_lora
from diffusion.export import main
from diffusion.models import load_model
from diffusion.settings import LoraSettings, ModelSettings
from mmalign import checkpoint
from mmalign import config as configuration
from mmalign.cli import run_entry
from mmalign.errors import UserError

# diffusers' Euler scheduler hands a torch tensor to numpy, which asks for an argument torch does not take yet.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning")

PLAIN = LoraSettings(rank=4)
CLASSES = {"sd": StableDiffusionPipeline, "sdxl": StableDiffusionXLPipeline}


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("bases")
    return {
        "sd": tiny_models.write(tiny_models.sd_pipeline(), root / "sd"),
        "sdxl": tiny_models.write(tiny_models.sdxl_pipeline(), root / "sdxl"),
    }


@pytest.fixture
def make_run(bases: dict[str, Path], tmp_path: Path) -> Callable[..., Path]:
    """Writes what a training run leaves: config.yaml and a checkpoint with weights that are not the base's."""

    def make(
        family: str = "sd",
        *,
        adapter: LoraSettings | None = PLAIN,
        moved: float = 0.3,
        ema: bool = False,
        loop: dict[str, Any] | None = None,
    ) -> Path:
        run = tmp_path / "run"
        run.mkdir()
        settings = ModelSettings(path=str(bases[family]))
        recipe = {
            "model": {"path": settings.path},
            "adapter": None if adapter is None else adapter.model_dump(),
            "data": {"path": "nowhere", "cache": None},
            "method": {"name": "dpo"},
            "optim": {"lr": 1e-4},
            "loop": {"steps": 3, "output_dir": str(run), **(loop or {})},
        }
        (run / "config.yaml").write_text(json.dumps(recipe))
        model = load_model(settings, train_full=adapter is None)
        if start := (loop or {}).get("init_from"):
            weights.start_from(model, Path(start))
        unet = model.unet
        identity = model.identity
        if adapter is not None:
            add_lora(unet, adapter)
        generator = torch.Generator().manual_seed(5)

        def move(by: float) -> None:
            for name, parameter in sorted(unet.named_parameters()):
                if ".lora_B." in name or (adapter is None and name.endswith("to_q.weight")):
                    parameter.data += by * torch.randn(parameter.shape, generator=generator)

        move(moved)
        writers = {"model": lambda folder: weights.save_weights(unet, folder)}
        checkpoint.save(run, 2, {}, keep=2, method="dpo", summary={"base": identity}, writers=writers)
        if ema:
            move(moved)
            writers["model_ema"] = lambda folder: weights.save_weights(unet, folder)
            checkpoint.save(run, 3, {}, keep=2, method="dpo", summary={"base": identity}, writers=writers)
        return run

    return make


def plain(base: Path, family: str) -> Any:
    """The pipeline as anybody opens it."""
    pipeline = CLASSES[family].from_pretrained(base)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@torch.no_grad()
def picture(pipeline: Any) -> Tensor:
    """Two denoising steps of a plain pipeline, as latents."""
    made: Tensor = pipeline(
        "a red circle", num_inference_steps=2, generator=torch.Generator().manual_seed(1), output_type="latent"
    ).images
    return made


def trained_picture(base: Path, family: str, weights_folder: Path) -> Tensor:
    model = load_model(ModelSettings(path=str(base)))
    weights.open_weights(model, weights_folder)
    return picture(model.pipeline)


def fails(*arguments: Any) -> str:
    with pytest.raises(UserError) as failure:
        main([str(argument) for argument in arguments])
    return str(failure.value)


# ------------------------------------------------------------------------------------------------ round trips


@pytest.mark.parametrize("family", ["sd", "sdxl"])
@pytest.mark.parametrize(
    "adapter",
    [
        PLAIN,
        LoraSettings(rank=4, alpha=1.0),
        LoraSettings(rank=3, alpha=7.5, targets="all"),  # convolutions; alpha neither rank nor whole
    ],
    ids=["attention", "alpha", "convolutions"],
)
def test_a_kohya_file_is_the_trained_adapter(
    family: str, adapter: LoraSettings, make_run: Callable[..., Path], bases: dict[str, Path], tmp_path: Path
) -> None:
    run, out = make_run(family, adapter=adapter), tmp_path / "out" / "style.safetensors"
    assert main([str(run), "--out", str(out)]) == 0
    assert [path.name for path in out.parent.iterdir()] == ["style.safetensors"]

    pipeline = plain(bases[family], family)
    before = picture(pipeline)
    pipeline.load_lora_weights(str(out.parent), weight_name=out.name)
    after = picture(pipeline)
    expected = trained_picture(bases[family], family, run / "checkpoint-00000002" / "model")
    change = (expected - before).square().mean().sqrt()
    assert change > 1e-3
    assert (after - expected).square().mean().sqrt() < 1e-4 * change


def test_the_names_are_kohyas(make_run: Callable[..., Path], tmp_path: Path) -> None:
    out = tmp_path / "style.safetensors"
    main([str(make_run(adapter=LoraSettings(rank=4, alpha=2.0, targets="all"))), "--out", str(out)])
    tensors = load_file(out)
    assert {name.partition(".")[2] for name in tensors} == {"lora_down.weight", "lora_up.weight", "alpha"}
    assert all(name.startswith("lora_unet_") and "." not in name.partition(".")[0] for name in tensors)
    attention = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_out_0"
    assert tensors[f"{attention}.lora_down.weight"].shape == (4, 16)
    assert tensors[f"{attention}.lora_up.weight"].shape == (16, 4)
    convolution = "lora_unet_down_blocks_0_resnets_0_conv1"
    assert tensors[f"{convolution}.lora_down.weight"].shape == (4, 16, 3, 3)
    assert tensors[f"{convolution}.lora_up.weight"].shape == (16, 4, 1, 1)
    assert {float(tensor) for name, tensor in tensors.items() if name.endswith(".alpha")} == {2.0}
    with safe_open(out, framework="pt") as file:
        about = file.metadata()
    assert about["method"] == "dpo" and about["rank"] == "4" and about["base"].startswith("sd@")
    assert about["ss_network_dim"] == "4" and about["ss_network_alpha"] == "2"


@pytest.mark.parametrize("family", ["sd", "sdxl"])
@pytest.mark.parametrize("adapter", [None, LoraSettings(rank=4, alpha=1.0, targets="all")], ids=["full", "merged"])
def test_a_pipeline_folder_is_the_trained_model(
    family: str,
    adapter: LoraSettings | None,
    make_run: Callable[..., Path],
    bases: dict[str, Path],
    tmp_path: Path,
) -> None:
    run, out = make_run(family, adapter=adapter), tmp_path / "aligned"
    assert main([str(run), "--out", str(out), "--format", "diffusers"]) == 0
    expected = trained_picture(bases[family], family, run / "checkpoint-00000002" / "model")
    change = (expected - picture(plain(bases[family], family))).abs().max()
    assert change > 1e-3
    assert (picture(plain(out, family)) - expected).abs().max() < 1e-4 * change
    assert not list(out.rglob("*.bin"))


def test_which_checkpoint(make_run: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = make_run(ema=True)
    listed = sorted(path.relative_to(run) for path in run.rglob("*"))
    said = []
    for number, source in enumerate([run, run / "checkpoint-00000002", run / "checkpoint-00000003" / "model"]):
        main([str(source), "--out", str(tmp_path / f"{number}.safetensors")])
        said.append(dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines()[1:]))
    assert [(one["step"], one["weights"]) for one in said] == [("3", "model_ema"), ("2", "model"), ("3", "model")]
    assert sorted(path.relative_to(run) for path in run.rglob("*")) == listed  # nothing written there


def test_init_from_is_merged_in(make_run: Callable[..., Path], bases: dict[str, Path], tmp_path: Path) -> None:
    first = make_run()
    first.rename(tmp_path / "first")
    start = tmp_path / "first" / "checkpoint-00000002"
    run, out = make_run(loop={"init_from": str(start)}), tmp_path / "aligned"
    assert "init_from" in fails(run, "--out", tmp_path / "x.safetensors")
    main([str(run), "--out", str(out), "--format", "diffusers"])
    expected = load_model(ModelSettings(path=str(bases["sd"])))
    weights.start_from(expected, start)
    weights.open_weights(expected, run / "checkpoint-00000002")
    assert torch.allclose(picture(plain(out, "sd")), picture(expected.pipeline), atol=1e-4)


# ------------------------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize("format", ["kohya", "diffusers"])
def test_an_adapter_that_does_nothing_is_refused(
    format: str, make_run: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out" / "nothing.safetensors"
    run = make_run(moved=0.0)  # B = 0, as at the start
    assert run_entry(main, [str(run), "--out", str(out), "--format", format]) == 2
    *_, line = capsys.readouterr().err.splitlines()  # after the libraries' progress bars
    assert line.startswith("mmalign: error: the export would change nothing: these weights answer as the base does (")
    assert not out.parent.exists()


def test_a_wrong_alpha_would_be_noticed(
    make_run: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = exporting.kohya_tensors
    monkeypatch.setattr(exporting, "kohya_tensors", lambda adapter, alpha: right(adapter, 1.01 * alpha))
    out = tmp_path / "out" / "style.safetensors"
    assert "as something else" in fails(make_run(), "--out", out)
    assert not list(out.parent.iterdir())


def test_another_base_is_refused(make_run: Callable[..., Path], bases: dict[str, Path], tmp_path: Path) -> None:
    run = make_run()
    other = tiny_models.sd_pipeline()
    other.unet = tiny_models.unet(cross_attention_dim=16, seed=9)
    wrong = tiny_models.write(other, tmp_path / "other")
    message = fails(run, "--out", tmp_path / "a.safetensors", "--model", wrong)
    assert "trained on sd@" in message and "this base is other@" in message
    moved = tmp_path / "moved"
    bases["sd"].rename(moved)
    try:
        assert "no such folder" in fails(run, "--out", tmp_path / "a.safetensors")
        assert main([str(run), "--out", str(tmp_path / "a.safetensors"), "--model", str(moved)]) == 0
    finally:
        moved.rename(bases["sd"])


def test_wrong_places(make_run: Callable[..., Path], tmp_path: Path) -> None:
    run, out = make_run(), tmp_path / "a.safetensors"
    inner = run / "checkpoint-00000002"
    assert "no such checkpoint" in fails(tmp_path / "missing", "--out", out)
    assert "a file, not a checkpoint" in fails(run / "config.yaml", "--out", out)
    (tmp_path / "empty").mkdir()
    assert "not a checkpoint" in fails(tmp_path / "empty", "--out", out)
    assert "would no longer agree" in fails(run, "--out", inner / "model" / "a.safetensors")
    assert "ends in .safetensors" in fails(run, "--out", tmp_path / "a.ckpt")
    out.write_text("precious")
    assert "exists already" in fails(run, "--out", out)
    assert out.read_text() == "precious"
    out.unlink()
    alone = tmp_path / "elsewhere" / inner.name
    alone.parent.mkdir()
    inner.rename(alone)
    assert "no config.yaml" in fails(alone, "--out", out)


def test_a_tampered_checkpoint_is_refused(make_run: Callable[..., Path], tmp_path: Path) -> None:
    run = make_run()
    file = run / "checkpoint-00000002" / "model" / "pytorch_lora_weights.safetensors"
    tensors = {name: tensor + 1 for name, tensor in load_file(file).items()}
    with safe_open(file, framework="pt") as opened:
        save_file(tensors, file, metadata=opened.metadata())
    assert "was changed" in fails(run, "--out", tmp_path / "a.safetensors")
    assert "was changed" in fails(run / "checkpoint-00000002", "--out", tmp_path / "a.safetensors")


def test_a_whole_unet_is_no_adapter(make_run: Callable[..., Path], tmp_path: Path) -> None:
    message = fails(make_run(adapter=None), "--out", tmp_path / "a.safetensors")
    assert "the whole UNet was trained" in message and "--format diffusers" in message


def test_the_recipe_that_a_run_leaves_is_read(make_run: Callable[..., Path]) -> None:
    from diffusion.recipe import TrainConfig

    config = configuration.load(TrainConfig, make_run() / "config.yaml")
    assert config.adapter == PLAIN
