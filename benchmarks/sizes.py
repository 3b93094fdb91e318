"""The models that are measured: published configurations with random weights, which cost what trained ones cost."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal, TypeAlias

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    EulerDiscreteScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from diffusion.pipelines import DTYPES, open_pipeline
from diffusion.settings import ModelSettings
from mmalign.shapes import words

Precision: TypeAlias = Literal["fp32", "bf16", "fp16"]

CONFIGURATIONS = Path(__file__).parent.parent / "tests" / "configurations"
CLASSES = {
    "unet": UNet2DConditionModel,
    "vae": AutoencoderKL,
    "text_encoder": CLIPTextModel,
    "text_encoder_2": CLIPTextModelWithProjection,
}
TOKENS = 77
SCHEDULE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
NARROW = {"block_out_channels": [128, 256, 512, 512]}  # of 150m; SD1.5 has 320, 640, 1280, 1280
SIZES = ("shapes", "150m", "sd15", "sdxl")


def build_pipeline(size: str, device: torch.device, precision: Precision, *, full: bool) -> Any:
    """A pipeline on a device, in eval mode, nothing trainable.

    Args:
        size: `shapes` (the embedded model), `150m` (SD1.5 with a narrower UNet, its own VAE and text encoder),
            `sd15`, `sdxl`, or the folder of a pipeline.
        precision: of the weights.
        full: the whole UNet will be trained, so its weights are fp32 whatever `precision` says.
    """
    unet_dtype = torch.float32 if full else DTYPES[precision]
    if size not in SIZES or size == "shapes":
        return open_pipeline(ModelSettings(path=size, dtype=precision), unet_dtype=unet_dtype).to(device)
    family = "sdxl" if size == "sdxl" else "sd15"
    configurations = json.loads((CONFIGURATIONS / f"{family}.json").read_text(encoding="utf-8"))
    if size == "150m":
        configurations["unet"] |= NARROW
    torch.manual_seed(0)
    parts = {
        name: build_part(name, settings, device, unet_dtype if name == "unet" else DTYPES[precision])
        for name, settings in configurations.items()
    }
    vocabulary, merges = words.vocabulary()
    tokenizer = CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=TOKENS)
    if family == "sdxl":
        scheduler = EulerDiscreteScheduler(**SCHEDULE)
        return StableDiffusionXLPipeline(
            **parts, tokenizer=tokenizer, tokenizer_2=tokenizer, scheduler=scheduler, add_watermarker=False
        )
    return StableDiffusionPipeline(
        **parts,
        tokenizer=tokenizer,
        scheduler=DDIMScheduler(**SCHEDULE, clip_sample=False, set_alpha_to_one=False),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def build_part(name: str, settings: dict[str, Any], device: torch.device, dtype: torch.dtype) -> Any:
    """One model of a pipeline, from its published configuration; made where and as what it stays."""
    kind: Any = CLASSES[name]
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with device:
            part = kind(CLIPTextConfig(**settings)) if name.startswith("text") else kind.from_config(settings)
    finally:
        torch.set_default_dtype(before)
    return part.requires_grad_(False).eval()
