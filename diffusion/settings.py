"""The recipe sections of text-to-image training: which model, adapter and data. Imports nothing heavy."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from mmalign.config import Settings
from mmalign.pairdata import PairDataSettings
from mmalign.precision import Precision

Pixels = Annotated[int, Field(gt=0)]


class ModelSettings(Settings):
    """Which pipeline, and how it is run."""

    path: str = Field(
        min_length=1,
        description="a diffusers folder, a hub id, or a model that comes along: shapes, or shapes-4step, distilled",
    )
    revision: str | None = Field(default=None, description="branch, tag or commit on the hub")
    variant: str | None = Field(default=None, description="of the weight files: fp16 reads *.fp16.safetensors")
    vae: str | None = Field(default=None, description="folder or hub id of another VAE, say an fp16-safe one for SDXL")
    unet: str | None = Field(
        default=None,
        min_length=1,
        description="another UNet of the same architecture: folder, hub id, or .safetensors file, also as "
        "owner/name/FILE.safetensors (DMD2 over SDXL)",
    )
    lora: str | None = Field(
        default=None,
        min_length=1,
        description="a LoRA fused in before training: folder, hub id, or .safetensors file (LCM-LoRA)",
    )
    scheduler: Literal["ddim", "ddpm", "euler_ancestral", "lcm"] | None = Field(
        default=None, description="what draws pictures, with the noise levels of the model's own; null: its own"
    )
    distilled_steps: int | None = Field(
        default=None,
        gt=0,
        description="of a few-step model, how many timesteps it was distilled at: 4 for SDXL-Turbo and DMD2 "
        "(999, 749, 499, 249); null: not a few-step model, or as its LCM scheduler says",
    )
    dtype: Precision = Field(
        default="fp32",
        description="of what is not trained: text encoders, VAE and, with an adapter, the UNet",
    )
    prediction_type: Literal["epsilon", "v_prediction"] | None = Field(
        default=None, description="what the UNet predicts; null: as its scheduler says"
    )
    zero_terminal_snr: bool = Field(
        default=False, description="train on the schedule rescaled to end without signal, as SDXL-Turbo does"
    )
    resolution: Pixels | None = Field(default=None, description="pixels of a side; null: the model's own")
    time_ids: Literal["true", "constant"] = Field(
        default="true",
        description="SDXL's size conditioning: each picture's own sizes and crop, or the resolution",
    )
    empty_prompt: Literal["encode", "zeros"] | None = Field(
        default=None, description="what dropped prompts become; null: what the pipeline's own guidance uses"
    )
    offline: bool = Field(default=False, description="never reach for the hub; HF_HUB_OFFLINE=1 does the same")


class LoraSettings(Settings):
    """A low-rank adapter on the UNet: W + (alpha / rank) B A, with B = 0 at the start."""

    rank: int = Field(default=8, gt=0, description="inner dimension of every pair of matrices")
    alpha: float | None = Field(
        default=None, gt=0, description="the update is scaled by alpha / rank; null: alpha = rank"
    )
    targets: Literal["attention", "attention+ff", "all"] = Field(
        default="attention",
        description="attention: to_q, to_k, to_v, to_out; all: also feed-forward and resnets",
    )
    dropout: float = Field(default=0.0, ge=0, lt=1, description="on the input of A, while training")
    seed: int = Field(default=0, ge=0, description="of A's Gaussian start")


class LatentSettings(Settings):
    """How pictures become latents: size, crops, flips, and where the result is kept."""

    buckets: Literal["square", "auto"] | tuple[tuple[Pixels, Pixels], ...] = Field(
        default="square",
        description="(width, height) of training; auto: many shapes of about the resolution's area; "
        "both sides of a pair share one",
    )
    views: int = Field(default=1, ge=1, le=64, description="crops and flips cached per picture; the first is plain")
    crop: Literal["center", "random"] = Field(default="center", description="of the views after the first")
    flip: bool = Field(default=False, description="views after the first may be mirrored, both sides together")
    posterior: Literal["mean", "sample"] = Field(
        default="mean", description="latents are the VAE posterior's mean, or drawn from it at every use"
    )
    dtype: Literal["fp32", "fp16"] = Field("fp32", description="of latents and text embeddings, kept or not")
    encode_batch: int = Field(default=8, gt=0, description="pictures per VAE forward")
    cache: Annotated[Path, Field(strict=False)] | None = Field(
        default=Path("runs/cache"),
        validate_default=False,  # a recipe is checked as JSON, in which this default would be no path
        description="folder of encoded data, found again by content; null: memory only",
    )
    prompt_dropout: float = Field(
        default=0.0,
        ge=0,
        lt=1,
        description="share of pairs trained with an empty prompt, for guidance to stay alive",
    )
    seed: int = Field(default=0, ge=0, description="of random crops and flips")

    @model_validator(mode="after")
    def _views_differ(self) -> LatentSettings:
        varied = self.flip or self.crop == "random"
        if self.views == 1 and varied:
            raise ValueError("crop=random and flip need views of 2 or more: the first view is the plain one")
        if self.views > 1 and not varied:
            raise ValueError("views above 1 would all be the same; say crop=random or flip=true, or views=1")
        if self.views > 2 and self.crop == "center":
            raise ValueError("crop=center with flip has two different views; say views=2 or crop=random")
        return self


class DataSettings(PairDataSettings, LatentSettings):
    """Which preferences, and how their pictures become latents."""
