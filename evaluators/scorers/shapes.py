"""The shapes checker as a scorer: reward that can be verified, for pictures of the embedded world.

reward     mean of what the caption speaks of: number, colours, shapes, relation         [0, 1]
faithful   1 when all of it is right and nothing is added                                0 or 1
style      a bright, flat ground: a taste that has nothing to do with the caption        [0, 1]
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image

from evaluators.scorer import Card
from mmalign.errors import UserError, nearest
from mmalign.shapes import checker
from mmalign.shapes.render import SIZE
from mmalign.shapes.scenes import parse

NAMES = ("reward", "faithful", "style", "count", "colour", "shape", "relation")
CARD = Card(unit="share of what the caption says that is right, 0 to 1", licence="Apache-2.0")


class ShapesChecker:
    """See the module's docstring."""

    identity = "shapes@1"
    numbers = NAMES

    def __init__(self, main: str) -> None:
        if main not in NAMES:
            raise UserError(f"the shapes checker has no number '{main}'", fix=nearest(main, NAMES))
        self.main = main

    def score_images(self, prompts: Sequence[str], images: Sequence[Image.Image]) -> list[dict[str, float]]:
        return [self._one(prompt, image) for prompt, image in zip(prompts, images, strict=True)]

    def _one(self, prompt: str, image: Image.Image) -> dict[str, float]:
        scene = parse(prompt)
        if scene is None:
            raise UserError(
                f"not a caption of the shapes world: {prompt[:80]!r}",
                fix="The shapes checker judges captions such as 'a red circle left of a blue square'.",
            )
        if image.size != (SIZE, SIZE):
            image = image.resize((SIZE, SIZE), Image.Resampling.BOX)
        picture = np.asarray(image.convert("RGB"))
        verdict = checker.check(picture, scene)
        numbers = {
            "reward": verdict.reward,
            "faithful": float(verdict.faithful),
            "style": checker.style(picture),
            "count": verdict.count,
            "colour": verdict.colour,
            "shape": verdict.shape,
        }
        return numbers if verdict.relation is None else {**numbers, "relation": verdict.relation}


def build(main: str = "reward") -> ShapesChecker:
    """The checker; `main` says which of its numbers is the score."""
    return ShapesChecker(main)
