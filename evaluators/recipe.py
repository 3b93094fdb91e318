"""What the recipe of a scorer says: which CLIP learns from which preferences, and how the result is judged."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from mmalign.config import LoopSettings, NamedSection, OptimSettings, Settings
from mmalign.pairdata import PairDataSettings


class ClipSettings(Settings):
    """The model that becomes a scorer, and what of it is trained."""

    path: str = Field(description="'shapes' for the embedded CLIP, a folder of transformers' CLIPModel, or a hub id")
    download: bool = Field(False, description="the hub may be asked")
    text_layers: int | None = Field(
        None, ge=0, description="last layers of the text tower that are trained, with what stands behind; null: all"
    )
    vision_layers: int | None = Field(None, ge=0, description="the same of the vision tower")
    head: int | None = Field(
        None, gt=0, description="width of an MLP of both vectors, added to the scaled cosine; null: none"
    )

    @property
    def layers(self) -> str:
        """Those that are trained, in words."""
        towers = {"text": self.text_layers, "vision": self.vision_layers}
        return ", ".join(f"{tower}: {'all' if last is None else f'last {last}'}" for tower, last in towers.items())


class ScorerDataSettings(PairDataSettings):
    """Which preferences, and what counts as one thing to learn from."""

    items: Literal["pairs", "prompts"] = Field(
        "pairs", description="a pair at a time, or all pairs of a prompt, each picture embedded once"
    )


class HeldOutSettings(Settings):
    """Preferences that are judged by and never trained on."""

    path: Annotated[Path, Field(strict=False)] | None = Field(None, description="another store; null: the same one")
    split: str | None = Field(None, description="a split of the store; null: prompts are drawn from the data's own")
    share: float = Field(0.1, gt=0, lt=1, description="of the prompts that are drawn, where no split is named")
    seed: int = Field(0, ge=0, description="of which are drawn: not the run's, so that runs can be compared")
    every: int = Field(0, ge=0, description="updates between looks at them; 0: only when training is over")
    patience: int | None = Field(None, gt=0, description="looks without a lower log loss before training ends")

    @model_validator(mode="after")
    def _consistent(self) -> HeldOutSettings:
        if self.path is not None and self.split is None:
            raise ValueError("another store needs the name of its split")
        if self.patience is not None and not self.every:
            raise ValueError("patience counts looks: say every, the updates between them")
        return self


class TrainConfig(Settings):
    """A scorer's recipe."""

    package: Literal["evaluators"] = "evaluators"
    model: ClipSettings
    data: ScorerDataSettings
    held_out: HeldOutSettings | None = Field(HeldOutSettings(), description="null: everything is trained on")
    method: NamedSection
    optim: OptimSettings
    loop: LoopSettings
