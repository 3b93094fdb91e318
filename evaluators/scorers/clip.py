"""CLIP similarity of prompt and picture, by any CLIP that transformers loads: the embedded one, a folder, a hub id.

    clip = cosine(text features, image features)     [-1, 1], fp32

Hessel's CLIPScore is another number, `clipscore`. Source: Radford et al. 2103.00020.
"""

from __future__ import annotations

from evaluators.scorer import Card
from evaluators.towers import ClipTower, CosineScorer
from evaluators.weights import Weights, find
from mmalign import shapes
from mmalign.precision import Precision

WEIGHTS = Weights(name="clip", repo="openai/clip-vit-large-patch14", gigabytes=1.7, licence="MIT (card: for research)")
CARD = Card(unit="cosine, -1 to 1", licence="the model's; the embedded one Apache-2.0", weights=())


def build(
    path: str = "shapes", device: str | None = None, precision: Precision = "fp32", download: bool = False
) -> CosineScorer:
    """CLIP from `path`: 'shapes' for the embedded one, a folder, or a hub id."""
    folder = shapes.model_folder("clip") if path == "shapes" else find(WEIGHTS, path, download=download)
    return CosineScorer("clip", "1", ClipTower(folder, device, precision), precision)
