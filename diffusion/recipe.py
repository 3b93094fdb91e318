"""What a text-to-image recipe says: where pairs come from, what is trained how, and how the result is judged."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from diffusion.settings import DataSettings, LoraSettings, ModelSettings
from mmalign.config import LoopSettings, NamedSection, OptimSettings, Settings


class SamplerSettings(Settings):
    """How pictures are drawn."""

    steps: int = Field(30, gt=0, description="denoising steps")
    guidance_scale: float = Field(7.5, ge=0, description="classifier-free guidance; 1 or less switches it off")
    batch_size: int = Field(8, gt=0, description="pictures drawn at once; changes nothing in them")


class CandidateSettings(Settings):
    """Pictures to choose from, sampled from the model before training when `data.path` does not exist yet."""

    prompts: str = Field(description="shapes:train, or a .txt or .jsonl file")
    count: int | None = Field(None, gt=0, description="prompts used, drawn by the seed; null: all")
    per_prompt: int = Field(4, ge=2, description="pictures per prompt")
    sampler: SamplerSettings = SamplerSettings()
    scorer: NamedSection = Field(description="who judges them: a file of evaluators/scorers")
    seed: int = Field(0, ge=0, description="of the prompts and the noise")


class EvaluationSettings(Settings):
    """How `mmalign demo` judges base and tuned models: same prompts, same noise."""

    prompts: str = Field("shapes:heldout", description="as in candidates; none of them trained on")
    count: int | None = Field(None, ge=2, description="prompts used, drawn by the seed; null: all")
    per_prompt: int = Field(1, ge=1, description="pictures per prompt; intervals are clustered by prompt")
    sampler: SamplerSettings = SamplerSettings()
    scorers: tuple[NamedSection, ...] = Field(description="all the numbers reported for each picture")
    preference: str = Field(description="the number that decides which of two pictures wins: what was taught")
    arms: dict[str, tuple[str, ...]] = Field(
        description="what is trained: name -> key=value that turns this recipe into that arm; the first is reported"
    )
    shown: int = Field(12, ge=0, description="prompts in the report's picture grid")
    seed: int = Field(0, ge=0, description="of the prompts and the noise")


class ReferenceSettings(Settings):
    """Where the reference's errors come from."""

    cache: Annotated[Path, Field(strict=False)] | None = Field(
        None, description="folder that keeps reference errors across runs; null: computed every time"
    )
    draws: int = Field(8, gt=0, description="with a cache: (timestep, noise) draws per pair before they repeat")


class ValidationSettings(Settings):
    """Samples drawn every `loop.sample_every` updates, for looking only."""

    prompts: tuple[str, ...] = Field((), description="what to draw")
    seed: int = Field(0, ge=0, description="of the first prompt's noise")
    sampler: SamplerSettings = SamplerSettings()


class TrainConfig(Settings):
    """A diffusion recipe."""

    package: Literal["diffusion"] = "diffusion"
    model: ModelSettings
    adapter: LoraSettings | None = Field(description="LoRA; null trains the whole UNet")
    candidates: CandidateSettings | None = Field(None, description="null: data.path must exist")
    data: DataSettings
    method: NamedSection
    reference: ReferenceSettings = ReferenceSettings()
    validation: ValidationSettings = ValidationSettings()
    evaluation: EvaluationSettings | None = Field(None, description="read by `mmalign demo` alone")
    optim: OptimSettings
    loop: LoopSettings
