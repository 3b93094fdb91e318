"""The recipe sections of a vision-language model: which one, and what of it is trained. Imports nothing heavy."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from mmalign.config import Settings
from mmalign.precision import Precision


class VlmModelSettings(Settings):
    """Which model, and how it is run."""

    path: str = Field(min_length=1, description="a folder of transformers, a hub id, or shapes-vlm, which comes along")
    revision: str | None = Field(default=None, description="branch, tag or commit on the hub")
    dtype: Precision = Field(default="fp32", description="of all weights that are not trained")
    attention: Literal["sdpa", "eager", "flash_attention_2"] = Field(
        default="sdpa", description="flash_attention_2 needs its package and a GPU"
    )
    template: Literal["vicuna"] | None = Field(
        default=None,
        description="vicuna: the conversation LLaVA-1.5 was trained on, which ends with </s>; null: the model's own, "
        "and vicuna for a LLaVA that has none",
    )
    min_pixels: int | None = Field(
        default=None, gt=0, description="Qwen-VL: smaller pictures are enlarged to this area; null: the model's own"
    )
    max_pixels: int | None = Field(
        default=None, gt=0, description="Qwen-VL: larger pictures are reduced to this area; null: the model's own"
    )
    longest_edge: int | None = Field(
        default=None, gt=0, description="SmolVLM, Idefics3: pixels of the longest side before tiling; null: its own"
    )
    tiles: bool | None = Field(
        default=None, description="SmolVLM, Idefics3: whether large pictures are cut into tiles; null: its own"
    )
    max_tokens: int | None = Field(
        default=None, gt=0, description="longest row, image tokens included; null: what the model was made for"
    )
    logits_chunk: int = Field(
        default=512, gt=0, description="token positions whose fp32 logits exist at once: memory is this x vocabulary"
    )
    offline: bool = Field(default=False, description="never reach for the hub; HF_HUB_OFFLINE=1 does the same")


class VlmLoraSettings(Settings):
    """A low-rank adapter: W + (alpha / rank) B A, with B = 0 at the start; on the language model unless told more."""

    rank: int = Field(default=16, gt=0, description="inner dimension of every pair of matrices")
    alpha: float | None = Field(
        default=None, gt=0, description="the update is scaled by alpha / rank; null: alpha = rank"
    )
    targets: Literal["attention", "all"] = Field(
        default="all", description="of the language model: q, k, v, o; all: also gate, up, down"
    )
    projector: bool = Field(default=False, description="also every linear layer between vision tower and language")
    vision: bool = Field(default=False, description="also every linear layer of the vision tower")
    dropout: float = Field(default=0.0, ge=0, lt=1, description="on the input of A, while training")
    seed: int = Field(default=0, ge=0, description="of A's Gaussian start")
