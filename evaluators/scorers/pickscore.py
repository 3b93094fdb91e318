"""PickScore v1: a CLIP ViT-H/14 that was taught what people pick.

    pickscore = exp(logit_scale) * cosine(prompt, picture)        exp(logit_scale) is about 100; usually 18 to 24

Tables also give the bare cosine (0.21) and the score over 26 (0.8): divide by 100 or by 26 to compare. Between the
pictures of one prompt, softmax(pickscore) is the probability of being picked.

Source: Kirstain et al. 2305.01569.
"""

from __future__ import annotations

from evaluators.scorer import Card
from evaluators.towers import ClipTower, CosineScorer
from evaluators.weights import Weights, find
from mmalign.precision import Precision

WEIGHTS = Weights(
    name="pickscore",
    repo="yuvalkirstain/PickScore_v1",
    gigabytes=3.9,
    licence="code MIT, the weights' card names none",
)
CARD = Card(
    unit="exp(logit_scale) * cosine, usually 18 to 24",
    licence="code MIT, weights unstated",
    weights=(WEIGHTS,),
)


def build(
    path: str | None = None, device: str | None = None, precision: Precision = "fp32", download: bool = False
) -> CosineScorer:
    """PickScore as published, or another CLIP in `path` in its unit."""
    tower = ClipTower(find(WEIGHTS, path, download=download), device, precision)
    return CosineScorer("pickscore", "1", tower, precision, rule=lambda cosine: tower.scale * cosine)
