"""The embedded world: scenes of one to three coloured shapes, their captions, pictures, questions and a checker.

Numpy and Pillow only. `scenes` says what can be described, `render` draws it, `checker` reads it back from pixels.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True, kw_only=True)
class Embedded:
    """A text-to-image model that comes along.

    Attributes:
        base: folder of its pipeline.
        overlay: folder with the `unet` and the `scheduler` that it has instead of the base's.
        distilled_steps: of a few-step model; see `diffusion.schedulers`.
    """

    base: str
    overlay: str | None = None
    distilled_steps: int | None = None


MODELS = {
    "shapes": Embedded(base="t2i"),
    "shapes-4step": Embedded(base="t2i", overlay="t2i_4step", distilled_steps=4),
}
"""By the name that `model.path` gives them."""

TALKING = {"shapes-vlm": "vlm"}
"""Vision-language models that come along, by the name that `model.path` gives them: their folders."""


def model_folder(name: str) -> Path:
    """Folder of an embedded model: `t2i` and what lies over it (diffusers), `clip` or `vlm` (transformers)."""
    return Path(__file__).parent / "models" / name
