"""Models: what ours gives is what diffusers gives, and what ours writes diffusers and peft open."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_models
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from peft import PeftModel
from torch import Tensor

from diffusion.adapters import (
    TARGETS,
    adapters_disabled,
    add_lora,
    frozen_copy,
    lora_layers,
    merge_lora,
    set_attention,
)
from diffusion.conditioning import Conditioning
from diffusion.models import DiffusionModel, load_model
from diffusion.settings import LoraSettings, ModelSettings
from diffusion.weights import load_weights, open_weights, save_weights, start_from
from mmalign.errors import UserError

# Euler schedulers of diffusers hand tensors to numpy in a way that numpy 2 deprecates.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

PROMPTS = ["a red circle", "two blue squares and one green triangle above", ""]
KINDS = {"sd": StableDiffusionPipeline, "sdxl": StableDiffusionXLPipeline}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("pipelines")
    return {
        "sd": tiny_models.write(tiny_models.sd_pipeline(), root / "sd"),
        "sdxl": tiny_models.write(tiny_models.sdxl_pipeline(), root / "sdxl"),
    }


@pytest.fixture
def opened(folders: dict[str, Path]) -> Callable[..., DiffusionModel]:
    def open_model(family: str, **settings: Any) -> DiffusionModel:
        return load_model(ModelSettings(path=str(folders[family]), **settings))

    return open_model


@pytest.fixture(params=["sd", "sdxl"])
def model(request: pytest.FixtureRequest, opened: Callable[..., DiffusionModel]) -> DiffusionModel:
    return opened(request.param)


def some(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def answer(model: DiffusionModel, unet: Any = None, rows: int = 2) -> Tensor:
    """The UNet's prediction for fixed inputs."""
    conditioning = model.encode_prompts(PROMPTS[:rows])
    with torch.no_grad():
        return model.predict(
            model.unet if unet is None else unet,
            some(1, rows, 4, 8, 8),
            torch.tensor([7, 900][:rows]),
            conditioning,
        )


def perturb(unet: Any, scale: float = 0.1) -> None:
    """Give every trainable weight another value, as training would."""
    with torch.no_grad():
        for index, parameter in enumerate(p for p in unet.parameters() if p.requires_grad):
            parameter.add_(scale * some(100 + index, *parameter.shape))


# ----------------------------------------------------------------------------------------------------
# Conditioning


def test_rows_of_conditioning() -> None:
    rows = Conditioning(embeds=some(1, 3, 2, 4), pooled=some(2, 3, 5), time_ids=some(3, 3, 6))
    assert len(rows) == 3 and len(rows.repeat(2)) == 6
    assert torch.equal(rows.repeat(2).embeds[3:], rows.embeds)
    picked = rows.select(torch.tensor([2, 0]))
    assert picked.time_ids is not None and rows.time_ids is not None
    assert torch.equal(picked.time_ids, rows.time_ids[[2, 0]])
    empty = Conditioning(embeds=torch.zeros(1, 2, 4), pooled=torch.zeros(1, 5), time_ids=torch.ones(1, 6))
    dropped = rows.replace_text(torch.tensor([False, True, False]), empty)
    assert dropped.pooled is not None and rows.pooled is not None
    assert not dropped.embeds[1].any() and not dropped.pooled[1].any()
    assert torch.equal(dropped.embeds[[0, 2]], rows.embeds[[0, 2]])
    assert dropped.time_ids is rows.time_ids
    half = rows.to("cpu", torch.float16)
    assert half.embeds.dtype == torch.float16 and half.time_ids is not None
    assert half.time_ids.dtype == torch.float32
    with pytest.raises(ValueError, match="some parts"):
        Conditioning.cat([rows, Conditioning(embeds=rows.embeds)])


# ----------------------------------------------------------------------------------------------------
# Opening


def test_what_is_opened(model: DiffusionModel) -> None:
    assert model.family in type(model.pipeline).__name__.lower().replace("stablediffusion", "sd")
    assert model.resolution == 32 and model.scale == 4 and model.multiple == 8
    assert model.latent_shape(32, 40) == (4, 10, 8)
    assert len(model.schedule) == 1000 and model.schedule.prediction_type == "epsilon"
    parts = [p for p in model.pipeline.components.values() if isinstance(p, torch.nn.Module)]
    assert not any(p.requires_grad or part.training for part in parts for p in part.parameters())


def test_identity_is_of_the_content(opened: Callable[..., DiffusionModel], folders: dict[str, Path]) -> None:
    first = opened("sd").identity
    assert first == opened("sd").identity and first.startswith("sd@")
    assert first != opened("sdxl").identity.replace("sdxl", "sd")


def test_dtypes(opened: Callable[..., DiffusionModel], folders: dict[str, Path]) -> None:
    model = opened("sd", dtype="bf16")
    assert {model.unet.dtype, model.vae.dtype, model.pipeline.text_encoder.dtype} == {torch.bfloat16}
    full = load_model(ModelSettings(path=str(folders["sd"]), dtype="bf16"), train_full=True)
    assert full.unet.dtype == torch.float32 and full.vae.dtype == torch.bfloat16
    assert torch.equal(full.unet.conv_in.weight, opened("sd").unet.conv_in.weight)
    # fp16 weights on disk; SDXL's VAE is one that asks for fp32
    assert opened("sd", dtype="fp16").vae.dtype == torch.float16
    assert opened("sdxl", dtype="fp16").vae.dtype == torch.float32


def test_another_vae(opened: Callable[..., DiffusionModel], folders: dict[str, Path], tmp_path: Path) -> None:
    other = tiny_models.autoencoder(seed=9)
    other.save_pretrained(tmp_path / "vae")
    for source in (tmp_path / "vae", tmp_path):  # the VAE's own folder, or a pipeline's
        model = opened("sd", vae=str(source))
        assert torch.equal(model.vae.encoder.conv_in.weight, other.encoder.conv_in.weight)


def test_schedule_overrides_reach_training_and_sampling(opened: Callable[..., DiffusionModel]) -> None:
    model = opened("sd", prediction_type="v_prediction", zero_terminal_snr=True)
    assert model.schedule.prediction_type == "v_prediction" and model.schedule.alphas_cumprod[-1] == 0
    assert model.pipeline.scheduler.config.prediction_type == "v_prediction"


def edit_index(folder: Path, **changes: Any) -> None:
    file = folder / "model_index.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def remove(*parts: str) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        for part in parts:
            target = folder / part
            shutil.rmtree(target) if target.is_dir() else target.unlink()

    return damage


def pickled(folder: Path) -> None:
    (folder / "unet" / "diffusion_pytorch_model.safetensors").rename(folder / "unet" / "diffusion_pytorch_model.bin")


def truncated(folder: Path) -> None:
    file = folder / "unet" / "diffusion_pytorch_model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])


def inpainting(folder: Path) -> None:
    tiny_models.unet(cross_attention_dim=16, in_channels=9).save_pretrained(folder / "unet")


DAMAGE: dict[str, tuple[Callable[[Path], None], str]] = {
    "no index": (
        remove("model_index.json"),
        r"not a diffusers pipeline: the folder has no model_index\.json",
    ),
    "not JSON": (
        lambda f: (f / "model_index.json").write_text("{") and None,
        "model_index.json cannot be read",
    ),
    "Flux": (
        lambda f: edit_index(f, _class_name="FluxPipeline"),
        "a FluxPipeline is not supported.*StableDiffusionXL",
    ),
    "own code": (
        lambda f: edit_index(f, unet=["my_unet", "UNet"]),
        r"'unet' comes with code of its own \(my_unet\)",
    ),
    "custom class": (lambda f: edit_index(f, _class_name=["pipeline", "Mine"]), "is not supported"),
    "other UNet": (lambda f: edit_index(f, unet=["diffusers", "UNet2DModel"]), "its unet is a UNet2DModel"),
    "no text encoder": (
        lambda f: edit_index(f, text_encoder=[None, None]),
        "the pipeline has no text_encoder",
    ),
    "missing part": (remove("unet"), "the folder has no 'unet'"),
    "pickled": (pickled, r"'unet' has only pickled weights \(\.bin\)"),
    "truncated": (truncated, "cannot load the pipeline"),
    "inpainting": (inpainting, "the UNet takes 9 channels and the VAE makes 4"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_what_cannot_be_opened_is_one_line(kind: str, folders: dict[str, Path], tmp_path: Path) -> None:
    damage, message = DAMAGE[kind]
    folder = Path(shutil.copytree(folders["sd"], tmp_path / "broken"))
    damage(folder)
    with pytest.raises(UserError, match=message) as caught:
        load_model(ModelSettings(path=str(folder)))
    assert "\n" not in str(caught.value) and str(folder) in str(caught.value)


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("./nowhere", "there is no such folder"),
        ("/nowhere/at/all", "there is no such folder"),
        ("some-owner/some-model", r"no folder here, and not in the local hub cache \(offline\)"),
    ],
)
def test_models_that_are_not_here(path: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_model(ModelSettings(path=path, offline=True))


def test_a_file_is_not_a_folder(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match="a file, not a pipeline folder"):
        load_model(ModelSettings(path=str(tmp_path / "model.safetensors")))


def test_wrong_vae_and_resolution(opened: Callable[..., DiffusionModel], tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no such folder.*model\.vae"):
        opened("sd", vae="./nowhere")
    with pytest.raises(UserError, match=r"cannot load the VAE.*model\.vae"):
        opened("sd", vae=str(tmp_path))
    with pytest.raises(UserError, match=r"resolution 35 is not a multiple of 8.*The nearest is 32"):
        opened("sd", resolution=35)


# ----------------------------------------------------------------------------------------------------
# Encoding


def test_latents_are_the_vaes_scaled(model: DiffusionModel) -> None:
    pixels = some(1, 2, 3, 32, 40).clamp(-1, 1)
    mean, deviation = model.encode_images(pixels)
    with torch.no_grad():
        posterior = model.vae.encode(pixels).latent_dist
    assert torch.equal(mean, posterior.mean * 0.7) and torch.equal(deviation, posterior.std * 0.7)
    assert mean.shape == (2, *model.latent_shape(40, 32))
    with torch.no_grad():
        expected = model.vae.decode(posterior.mean).sample.clamp(-1, 1)
    torch.testing.assert_close(model.decode(mean), expected)


@pytest.mark.parametrize(("dtype", "fix"), [("fp16", "fp16-safe"), ("fp32", "broken")])
def test_overflow_of_the_vae_is_named(opened: Callable[..., DiffusionModel], dtype: str, fix: str) -> None:
    model = opened("sd", dtype=dtype)
    with torch.no_grad():
        model.vae.quant_conv.weight.fill_(6e4 if dtype == "fp16" else float("inf"))
    with pytest.raises(UserError, match=f"not finite in float{dtype[2:]}.*{fix}"):
        model.encode_images(10 * some(1, 1, 3, 32, 32))


def test_prompts_are_encoded_as_the_pipeline_does(model: DiffusionModel) -> None:
    ours = model.encode_prompts(PROMPTS)
    theirs = model.pipeline.encode_prompt(
        prompt=PROMPTS, device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=True
    )
    assert torch.equal(ours.embeds, theirs[0])
    assert torch.equal(model.empty().embeds, theirs[1][:1])
    if model.family == "sdxl":
        assert ours.pooled is not None and torch.equal(ours.pooled, theirs[2])
        assert ours.embeds.shape[-1] == 16 + 24 and ours.pooled.shape[-1] == 24
        empty = model.empty()
        assert empty.pooled is not None and torch.equal(empty.pooled, theirs[3][:1]) and not empty.pooled.any()
    else:
        assert ours.pooled is None and ours.time_ids is None


def test_time_ids_are_the_pipelines(opened: Callable[..., DiffusionModel]) -> None:
    model = opened("sdxl")
    sizes: dict[str, tuple[int, int]] = {"original": (1023, 700), "crop": (3, 0), "target": (32, 40)}
    theirs = model.pipeline._get_add_time_ids(
        sizes["original"], sizes["crop"], sizes["target"], dtype=torch.float32, text_encoder_projection_dim=24
    )
    assert torch.equal(model.time_ids(**sizes), theirs)
    constant = model.encode_prompts(PROMPTS).time_ids
    assert constant is not None and constant.tolist() == [[32, 32, 0, 0, 32, 32]] * 3


@pytest.mark.parametrize(("family", "default"), [("sd", False), ("sdxl", True)])
def test_empty_prompt_can_be_zeros_or_encoded(
    opened: Callable[..., DiffusionModel], family: str, default: bool
) -> None:
    def is_zero(**settings: Any) -> bool:
        return not opened(family, **settings).empty().embeds.any()

    assert is_zero() is default
    assert is_zero(empty_prompt="zeros") and not is_zero(empty_prompt="encode")
    encoded = opened(family, empty_prompt="encode")
    assert torch.equal(encoded.empty().embeds, encoded.encode_prompts([""]).embeds)


def test_a_batch_of_prompts_is_cut(model: DiffusionModel, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = model.encode_prompts(PROMPTS)
    monkeypatch.setattr("diffusion.models.PROMPT_BATCH", 2)
    cut = model.encode_prompts(PROMPTS)
    torch.testing.assert_close(cut.embeds, whole.embeds)
    assert len(cut) == len(whole) == 3


# ----------------------------------------------------------------------------------------------------
# The UNet


def test_prediction_is_the_raw_call(model: DiffusionModel) -> None:
    x_t, t, rows = some(1, 2, 4, 8, 8), torch.tensor([7, 900]), model.encode_prompts(PROMPTS[:2])
    added = None if model.family == "sd" else {"text_embeds": rows.pooled, "time_ids": rows.time_ids}
    with torch.no_grad():
        raw = model.unet(x_t, t, encoder_hidden_states=rows.embeds, added_cond_kwargs=added).sample
        assert torch.equal(model.predict(model.unet, x_t, t, rows), raw)


def test_sizes_reach_the_unet_unrounded_in_half_precision(opened: Callable[..., DiffusionModel]) -> None:
    model = opened("sdxl", dtype="bf16")
    seen: list[Tensor] = []
    model.unet.add_time_proj.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    ids = torch.tensor([[1023.0, 1021, 0, 0, 32, 32]])
    with torch.no_grad():
        out = model.predict(
            model.unet,
            some(1, 1, 4, 8, 8),
            torch.tensor([5]),
            model.encode_prompts(PROMPTS[:1]).with_time_ids(ids),
        )
    assert out.dtype == torch.bfloat16 and seen[0].tolist() == ids.flatten().tolist()


def test_adapter_starts_as_the_base_model_and_off_stays_so(model: DiffusionModel) -> None:
    base = answer(model)
    add_lora(model.unet, LoraSettings(rank=2, targets="all"))
    assert torch.equal(answer(model), base)  # B is 0
    perturb(model.unet)
    adapted = answer(model)
    assert not torch.allclose(adapted, base, atol=1e-3)
    before = {name: p.requires_grad for name, p in model.unet.named_parameters()}
    with adapters_disabled(model.unet):
        assert torch.equal(answer(model), base)
        assert {name: p.requires_grad for name, p in model.unet.named_parameters()} == before
    assert torch.equal(answer(model), adapted)
    with pytest.raises(KeyError), adapters_disabled(model.unet):
        raise KeyError
    assert torch.equal(answer(model), adapted)
    assert {name: p.requires_grad for name, p in model.unet.named_parameters()} == before


def test_adapter_is_fp32_and_alone_trainable(opened: Callable[..., DiffusionModel]) -> None:
    model = opened("sd", dtype="bf16")
    model.unet.requires_grad_(True)
    add_lora(model.unet, LoraSettings(rank=2))
    for name, parameter in model.unet.named_parameters():
        assert parameter.requires_grad == (".lora_" in name)
        assert parameter.dtype == (torch.float32 if ".lora_" in name else torch.bfloat16)
    out = model.predict(model.unet, some(1, 1, 4, 8, 8), torch.tensor([5]), model.encode_prompts(PROMPTS[:1]))
    out.float().square().mean().backward()
    grads = [p.grad for name, p in model.unet.named_parameters() if ".lora_B." in name]
    assert all(grad is not None and grad.any() for grad in grads)


def test_adapter_depends_on_its_seed_alone(opened: Callable[..., DiffusionModel]) -> None:
    def drawn(seed: int) -> dict[str, Tensor]:
        unet = opened("sd").unet
        state = torch.random.get_rng_state()
        add_lora(unet, LoraSettings(rank=4, seed=seed))
        assert torch.equal(torch.random.get_rng_state(), state)
        return {name: p.detach().clone() for name, p in unet.named_parameters() if ".lora_A." in name}

    first = drawn(0)
    torch.manual_seed(77)
    again, other = drawn(0), drawn(1)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not any(torch.equal(first[name], other[name]) for name in first)
    everything = torch.cat([tensor.flatten() for tensor in first.values()])
    assert everything.std().item() == pytest.approx(1 / 4, rel=0.1)


@pytest.mark.parametrize("targets", TARGETS)
def test_targets_of_adapters(opened: Callable[..., DiffusionModel], targets: Any) -> None:
    unet = opened("sdxl").unet
    names = [name for name, _ in unet.named_modules() if name.endswith(TARGETS[targets])]
    add_lora(unet, LoraSettings(rank=1, targets=targets))
    assert len(lora_layers(unet)) == len(names) > 0


def test_misuse_of_adapters_is_refused(opened: Callable[..., DiffusionModel]) -> None:
    unet = opened("sd").unet
    with pytest.raises(ValueError, match="no adapter to disable"), adapters_disabled(unet):
        pass
    with pytest.raises(ValueError, match="no adapter to merge"):
        merge_lora(unet)
    add_lora(unet, LoraSettings(rank=1))
    with pytest.raises(ValueError, match="already"):
        add_lora(unet, LoraSettings(rank=1))


def test_merging_keeps_the_function_and_removes_the_adapter(model: DiffusionModel) -> None:
    names = set(model.unet.state_dict())
    add_lora(model.unet, LoraSettings(rank=2, alpha=3.0, targets="all"))
    perturb(model.unet)
    adapted = answer(model)
    merge_lora(model.unet)
    assert set(model.unet.state_dict()) == names
    torch.testing.assert_close(answer(model), adapted, rtol=1e-4, atol=1e-5)


def test_frozen_copy_is_independent(opened: Callable[..., DiffusionModel]) -> None:
    model = opened("sd")
    copied = frozen_copy(model.unet)
    base = answer(model)
    model.unet.requires_grad_(True)
    perturb(model.unet)
    assert torch.equal(answer(model, copied), base) and not torch.equal(answer(model), base)
    assert not any(p.requires_grad for p in copied.parameters()) and not copied.training


def test_attention_kernels(opened: Callable[..., DiffusionModel]) -> None:
    model = opened("sd")
    base = answer(model)
    set_attention(model.unet, "sdpa")
    assert torch.equal(answer(model), base)
    with pytest.raises(UserError, match=r"xformers (is not installed|needs a GPU).*attention=sdpa"):
        set_attention(model.unet, "xformers")


# ----------------------------------------------------------------------------------------------------
# Weights on disk


def adapted(opened: Callable[..., DiffusionModel], family: str, **settings: Any) -> DiffusionModel:
    model = opened(family)
    add_lora(model.unet, LoraSettings(rank=3, **settings))
    model.unet.to(memory_format=torch.channels_last)  # as in training; safetensors refuses such tensors
    return model


def same_bits(a: Any, b: Any) -> bool:
    mine, other = a.state_dict(), b.state_dict()
    return mine.keys() == other.keys() and all(torch.equal(mine[name], other[name]) for name in mine)


@pytest.mark.parametrize("family", ["sd", "sdxl"])
@pytest.mark.parametrize("settings", [{"targets": "all", "alpha": 6.0}, {"targets": "attention"}])
def test_saved_adapters_open_in_diffusers_and_peft(
    opened: Callable[..., DiffusionModel],
    folders: dict[str, Path],
    tmp_path: Path,
    family: str,
    settings: dict[str, Any],
) -> None:
    model = adapted(opened, family, **settings)
    perturb(model.unet)
    save_weights(model.unet, tmp_path)
    expected = answer(model)
    assert not torch.allclose(expected, answer(opened(family)), atol=1e-3)

    pipeline = (
        KINDS[family].from_pretrained(folders[family], safety_checker=None)
        if family == "sd"
        else KINDS[family].from_pretrained(folders[family], add_watermarker=False)
    )
    pipeline.load_lora_weights(tmp_path)
    torch.testing.assert_close(answer(model, pipeline.unet), expected, rtol=1e-5, atol=1e-6)

    base = UNet2DConditionModel.from_pretrained(folders[family], subfolder="unet")
    torch.testing.assert_close(
        answer(model, PeftModel.from_pretrained(base, tmp_path / "unet_peft")), expected, rtol=1e-5, atol=1e-6
    )

    ours = opened(family)
    open_weights(ours, tmp_path)
    torch.testing.assert_close(answer(ours), expected, rtol=1e-5, atol=1e-6)
    merged = opened(family)
    before = merged.identity
    start_from(merged, tmp_path)
    assert merged.identity != before
    assert not lora_layers(merged.unet)
    torch.testing.assert_close(answer(merged), expected, rtol=1e-4, atol=1e-5)


def test_adapter_resumes_bit_for_bit(opened: Callable[..., DiffusionModel], tmp_path: Path) -> None:
    model = adapted(opened, "sd", targets="all")
    perturb(model.unet)
    save_weights(model.unet, tmp_path)
    other = adapted(opened, "sd", targets="all", seed=5)
    storage = {name: p.data_ptr() for name, p in other.unet.named_parameters()}
    assert not same_bits(model.unet, other.unet)
    load_weights(other.unet, tmp_path)
    assert same_bits(model.unet, other.unet)
    assert storage == {name: p.data_ptr() for name, p in other.unet.named_parameters()}


def test_full_weights_resume_bit_for_bit_and_open_in_diffusers(
    opened: Callable[..., DiffusionModel], tmp_path: Path
) -> None:
    model = opened("sd")
    model.unet.requires_grad_(True).to(memory_format=torch.channels_last)
    perturb(model.unet)
    save_weights(model.unet, tmp_path)
    other = opened("sd")
    load_weights(other.unet, tmp_path)
    assert same_bits(model.unet, other.unet)
    theirs = UNet2DConditionModel.from_pretrained(tmp_path, subfolder="unet")
    assert same_bits(model.unet, theirs)
    (tmp_path / "checkpoint").mkdir()
    shutil.copytree(tmp_path / "unet", tmp_path / "checkpoint" / "model" / "unet")
    third = opened("sd")
    start_from(third, tmp_path / "checkpoint")
    assert same_bits(model.unet, third.unet)


def test_a_gathered_state_is_written_instead_of_the_modules_own(
    opened: Callable[..., DiffusionModel], tmp_path: Path
) -> None:
    model, other = adapted(opened, "sd"), adapted(opened, "sd", seed=5)
    save_weights(model.unet, tmp_path, state=other.unet.state_dict())
    load_weights(model.unet, tmp_path)
    assert same_bits(model.unet, other.unet)


def test_weights_that_do_not_fit_are_refused(opened: Callable[..., DiffusionModel], tmp_path: Path) -> None:
    lora, full, none = tmp_path / "lora", tmp_path / "full", tmp_path / "none"
    for folder in (lora, full, none):
        folder.mkdir()
    save_weights(adapted(opened, "sd").unet, lora)
    save_weights(opened("sd").unet, full)
    with pytest.raises(UserError, match="expected an adapter, found no weights"):
        load_weights(adapted(opened, "sd").unet, none)
    with pytest.raises(UserError, match="expected an adapter, found the whole UNet"):
        load_weights(adapted(opened, "sd").unet, full)
    with pytest.raises(UserError, match="expected the whole UNet, found an adapter"):
        load_weights(opened("sd").unet, lora)
    with pytest.raises(UserError, match=r"targets .*to_k.*this run has targets.*conv1"):
        load_weights(adapted(opened, "sd", targets="all").unet, lora)
    other_rank = opened("sd").unet
    add_lora(other_rank, LoraSettings(rank=4, alpha=3.0))
    with pytest.raises(UserError, match=r"saved with rank 3, this run has rank 4.*adapter\.rank"):
        load_weights(other_rank, lora)
    with pytest.raises(UserError, match=r"belong to another model: \d+ of \d+ differ"):
        load_weights(adapted(opened, "sdxl").unet, lora)
    with pytest.raises(UserError, match=r"belong to another model"):
        load_weights(opened("sdxl").unet, full)
    (lora / "unet_peft" / "adapter_config.json").write_text('{"r": -1, "lora_alpha": 1, "target_modules": []}')
    with pytest.raises(UserError, match="makes no sense"):
        open_weights(opened("sd"), lora)
    (full / "unet" / "diffusion_pytorch_model.safetensors").write_bytes(b"short")
    with pytest.raises(UserError, match="cannot be read"):
        load_weights(opened("sd").unet, full)


# ----------------------------------------------------------------------------------------------------
# Sampling


def arrays(images: list[Any]) -> np.ndarray[Any, Any]:
    return np.stack([np.asarray(image) for image in images]).astype(int)


OPTIONS: dict[str, Any] = {"steps": 3, "guidance_scale": 4.0}


def test_samples_are_the_pipelines_own(model: DiffusionModel) -> None:
    ours = arrays(model.sample(PROMPTS, seeds=[1, 2, 3], batch_size=3, **OPTIONS))
    theirs = model.pipeline(
        PROMPTS,
        generator=[torch.Generator().manual_seed(seed) for seed in (1, 2, 3)],
        num_inference_steps=3,
        guidance_scale=4.0,
        width=32,
        height=32,
    ).images
    assert np.abs(ours - arrays(theirs)).max() <= 1
    assert ours.std() > 1  # random weights, but a picture


def test_a_picture_depends_on_its_prompt_and_seed_alone(model: DiffusionModel) -> None:
    together = arrays(model.sample(PROMPTS, seeds=[5, 6, 7], batch_size=3, **OPTIONS))
    alone = arrays(model.sample(PROMPTS, seeds=[5, 6, 7], batch_size=1, **OPTIONS))
    turned = arrays(model.sample(PROMPTS[::-1], seeds=[7, 6, 5], batch_size=2, **OPTIONS))[::-1]
    assert np.abs(together - alone).max() <= 1 and np.abs(together - turned).max() <= 1
    other = arrays(model.sample(PROMPTS, seeds=[8, 6, 7], batch_size=3, **OPTIONS))
    assert np.abs(other[0] - together[0]).max() > 1 and np.abs(other[1:] - together[1:]).max() <= 1


def test_ancestral_sampling_is_seeded_too(opened: Callable[..., DiffusionModel]) -> None:
    model = opened("sd")
    model.pipeline.scheduler = DDIMScheduler.from_config(model.pipeline.scheduler.config)
    noisy: Any = copy.copy(model.pipeline.scheduler)
    step = noisy.step
    noisy.step = lambda *a, generator=None, eta=0.0, **k: step(*a, eta=1.0, generator=generator, **k)
    model.pipeline.scheduler = noisy
    together = arrays(model.sample(PROMPTS, seeds=[5, 6, 7], batch_size=3, **OPTIONS))
    alone = arrays(model.sample(PROMPTS, seeds=[5, 6, 7], batch_size=1, **OPTIONS))
    assert np.abs(together - alone).max() <= 1


def test_sampling_leaves_training_as_it_was(opened: Callable[..., DiffusionModel]) -> None:
    model = adapted(opened, "sd", dropout=0.5)
    perturb(model.unet)
    model.unet.train()
    model.unet.conv_in.eval()
    modes = [module.training for module in model.unet.modules()]
    rng, table = torch.random.get_rng_state(), model.schedule.alphas_cumprod.clone()
    first = arrays(model.sample(PROMPTS, seeds=[1, 2, 3], **OPTIONS))
    assert [module.training for module in model.unet.modules()] == modes
    assert torch.equal(torch.random.get_rng_state(), rng)
    assert torch.equal(model.schedule.alphas_cumprod, table)
    assert all(p.grad is None for p in model.unet.parameters())
    torch.manual_seed(123)
    assert (arrays(model.sample(PROMPTS, seeds=[1, 2, 3], **OPTIONS)) == first).all()  # no dropout in it


def test_sampling_with_another_unet_and_without_encoders(opened: Callable[..., DiffusionModel]) -> None:
    for family in KINDS:
        model = opened(family)
        expected = arrays(model.sample(PROMPTS, seeds=[1, 2, 3], **OPTIONS))
        other = frozen_copy(model.unet)
        model.unet.requires_grad_(True)
        perturb(model.unet)
        encoded = model.encode_prompts(PROMPTS)
        model.release_texts()
        assert (arrays(model.sample(encoded, seeds=[1, 2, 3], unet=other, **OPTIONS)) == expected).all()
        assert (arrays(model.sample(encoded, seeds=[1, 2, 3], **OPTIONS)) != expected).any()
        with pytest.raises(ValueError, match="released"):
            model.encode_prompts(PROMPTS)
        model.release_encoders()
        with pytest.raises(ValueError, match="the VAE was released"):
            model.encode_images(some(1, 1, 3, 32, 32))
        assert model.to("cpu").device == torch.device("cpu")


def test_sampling_sizes_and_counts(opened: Callable[..., DiffusionModel]) -> None:
    model = opened("sd")
    image = model.sample(["a circle"], seeds=[1], steps=1, guidance_scale=1.0, size=(48, 40))[0]
    assert image.size == (48, 40)
    with pytest.raises(ValueError, match="1 prompts and 2 seeds"):
        model.sample(["a circle"], seeds=[1, 2], steps=1, guidance_scale=1.0)


def test_sampling_with_a_full_precision_unet_beside_half_encoders(folders: dict[str, Path]) -> None:
    model = load_model(ModelSettings(path=str(folders["sd"]), dtype="bf16"), train_full=True)
    assert model.sample(["a circle"], seeds=[1], **OPTIONS)[0].size == (32, 32)
    assert isinstance(model.vae, AutoencoderKL)


@pytest.mark.parametrize(
    ("name", "unet", "texts"),
    [("sd15", 859_520_964, [123_060_480]), ("sdxl", 2_567_463_684, [123_060_480, 694_659_840])],
)
def test_published_configurations_at_full_size(
    name: str, unet: int, texts: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("diffusion.models.module_fingerprint", lambda module: "0" * 64)  # there are no weights
    pipeline = tiny_models.full_size(name, device="meta")
    model = DiffusionModel(pipeline, ModelSettings(path=name))
    sizes = [sum(p.numel() for p in pipeline.components[part].parameters()) for part in tiny_models.TEXTS[name]]
    assert (sum(p.numel() for p in model.unet.parameters()), sizes) == (unet, texts)
    assert model.resolution == {"sd15": 512, "sdxl": 1024}[name] and model.scale == 8
    assert model.multiple == {"sd15": 64, "sdxl": 32}[name] and model.latent_shape(512, 768) == (4, 96, 64)
    with torch.device("meta"):
        rows = Conditioning(embeds=torch.empty(2, 12, model.unet.config.cross_attention_dim))
        if name == "sdxl":
            rows = Conditioning(embeds=rows.embeds, pooled=torch.empty(2, 1280), time_ids=torch.empty(2, 6))
        out = model.predict(model.unet, torch.empty(2, 4, 8, 8), torch.empty(2, dtype=torch.int64), rows)
    assert out.shape == (2, 4, 8, 8)
