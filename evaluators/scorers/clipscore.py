"""CLIPScore as published: rescaled, cut off at zero, every prompt called a photograph.

    clipscore = 2.5 * max(cosine("A photo depicts " + prompt, picture), 0)        usually 0.4 to 1.0

Source: Hessel et al. 2104.08718, with CLIP ViT-B/32.
"""

from __future__ import annotations

from evaluators.scorer import Card
from evaluators.towers import ClipTower, CosineScorer
from evaluators.weights import Weights, find
from mmalign.precision import Precision

PREFIX, WEIGHT = "A photo depicts ", 2.5
WEIGHTS = Weights(
    name="clipscore", repo="openai/clip-vit-base-patch32", gigabytes=0.6, licence="MIT (card: for research)"
)
CARD = Card(
    unit="2.5 * max(cosine, 0), usually 0.4 to 1.0",
    licence="code MIT, weights MIT (card: for research)",
    weights=(WEIGHTS,),
)


def build(
    path: str | None = None, device: str | None = None, precision: Precision = "fp32", download: bool = False
) -> CosineScorer:
    """CLIPScore by the published CLIP, or by another in `path`."""
    tower = ClipTower(find(WEIGHTS, path, download=download), device, precision)
    return CosineScorer(
        "clipscore", "1", tower, precision, rule=lambda cosine: WEIGHT * cosine.clamp_min(0), prefix=PREFIX
    )
