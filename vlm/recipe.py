"""What a vision-language recipe says: where pairs come from, what is trained how, and how the result is judged."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from mmalign.config import LoopSettings, NamedSection, OptimSettings, Settings
from mmalign.pairdata import PairDataSettings
from vlm.settings import VlmLoraSettings, VlmModelSettings


class VlmDataSettings(PairDataSettings):
    """Which preferences, and what is done to them."""

    blank_images: bool = Field(
        default=False, description="the control: every picture is one grey, so that only words can be learnt"
    )


class VlmEvaluationSettings(Settings):
    """How `mmalign demo` judges base and tuned models on held-out pictures of the embedded world."""

    count: int = Field(400, ge=2, description="held-out pictures")
    batch_size: int = Field(64, gt=0, description="answers made at once; changes nothing in them")
    arms: dict[str, tuple[str, ...]] = Field(
        description="what is trained: name -> key=value that turns this recipe into that arm; the first is reported"
    )
    shown: int = Field(12, ge=0, description="pictures in the report")
    seed: int = Field(0, ge=0, description="of the pictures and the questions")


class VlmReferenceSettings(Settings):
    """Where the reference's log-probs come from."""

    cache: Annotated[Path, Field(strict=False)] | None = Field(
        None, description="folder that keeps reference log-probs across runs; null: computed every time"
    )
    draws: int = Field(4, gt=0, description="with a cache: crops or noises per pair before they repeat")


class TrainConfig(Settings):
    """A vision-language recipe."""

    package: Literal["vlm"] = "vlm"
    model: VlmModelSettings
    adapter: VlmLoraSettings | None = Field(description="LoRA; null trains the whole language model and projector")
    make: NamedSection | None = Field(
        None, description="how data.path is made when it is not there: a file of vlm/makers; null: it must exist"
    )
    data: VlmDataSettings
    method: NamedSection
    reference: VlmReferenceSettings = VlmReferenceSettings()
    evaluation: VlmEvaluationSettings | None = Field(None, description="read by `mmalign demo` alone")
    optim: OptimSettings
    loop: LoopSettings
