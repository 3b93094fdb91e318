"""What a text-to-image recipe says: where pairs come from, what is trained how, and how the result is judged."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from diffusion.settings import DataSettings, LoraSettings, ModelSettings
from evaluators.overoptimisation import WatchSettings
from evaluators.rewards import RewardSettings
from mmalign.config import LoopSettings, NamedSection, OptimSettings, Settings


class SamplerSettings(Settings):
    """How pictures are drawn."""

    steps: int = Field(30, gt=0, description="denoising steps")
    guidance_scale: float = Field(7.5, ge=0, description="classifier-free guidance; 1 or less switches it off")
    batch_size: int = Field(8, gt=0, description="pictures drawn at once; changes nothing in them")


class CandidateSettings(Settings):
    """Pictures sampled from the model before training, when `data.path` does not exist yet: to choose from by a scorer,
    or to lose against target pictures."""

    prompts: str | None = Field(None, description="shapes:train, or a .txt, .jsonl, .json, .tsv or .csv file")
    targets: str | None = Field(
        None, description="instead of prompts: pictures with captions, a folder or a store; each wins over samples"
    )
    count: int | None = Field(None, gt=0, description="prompts or targets used, drawn by the seed; null: all")
    per_prompt: int = Field(4, ge=1, description="pictures sampled per prompt or target")
    sampler: SamplerSettings = SamplerSettings()
    scorer: NamedSection | None = Field(None, description="who judges them: a file of evaluators/scorers")
    seed: int = Field(0, ge=0, description="of the prompts and the noise")

    @model_validator(mode="after")
    def _prompts_or_targets(self) -> CandidateSettings:
        if self.targets is not None:
            if self.prompts is not None or self.scorer is not None:
                raise ValueError("targets have captions and win by themselves: leave out prompts and scorer")
        elif self.prompts is None or self.scorer is None:
            raise ValueError("candidates need prompts and a scorer, or targets")
        elif self.per_prompt < 2:
            raise ValueError("there is nothing to choose from one picture: say per_prompt=2 or more")
        return self


class RolloutSettings(Settings):
    """What an online method draws in each round, and who rewards it."""

    prompts: str = Field(description="trained on: as in candidates")
    count: int | None = Field(None, gt=0, description="prompts used, drawn by the seed; null: all")
    prompts_per_round: int = Field(gt=0, description="over all processes; a multiple of the prompts per update")
    per_prompt: int = Field(2, ge=1, description="pictures per prompt")
    passes: int = Field(1, gt=0, description="how often a round's pictures are trained on")
    kernel: Literal["ddim", "ddpm", "euler_ancestral", "lcm"] = Field(
        description="the steps that are sampled and trained"
    )
    steps: int = Field(gt=0, description="denoising steps")
    eta: float = Field(1.0, gt=0, description="noise of DDIM's steps")
    guidance_scale: float = Field(ge=0, description="in sampling and training alike; 1 or less switches it off")
    batch_size: int = Field(8, gt=0, description="pictures drawn at once; changes nothing in them")
    shared_start: bool = Field(False, description="the pictures of a prompt start from the same noise")
    policy: Literal["current", "reference"] = Field(
        "current", description="who draws: the policy as it is (online), or the model it started from (offline)"
    )
    pool: int | None = Field(None, gt=0, description="rounds before they repeat; for policy=reference")
    reward: RewardSettings = Field(description="what the pictures are rewarded for")


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
    data: DataSettings | None = Field(None, description="preferences, for methods that are fed with pairs")
    rollout: RolloutSettings | None = Field(None, description="what is drawn, for methods that draw for themselves")
    watch: WatchSettings | None = Field(None, description="looks for over-optimisation, for methods with rollouts")
    method: NamedSection
    reference: ReferenceSettings = ReferenceSettings()
    validation: ValidationSettings = ValidationSettings()
    evaluation: EvaluationSettings | None = Field(None, description="read by `mmalign demo` alone")
    optim: OptimSettings
    loop: LoopSettings
