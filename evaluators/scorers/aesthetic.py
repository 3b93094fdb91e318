"""LAION's aesthetic predictor v2, `sac+logos+ava1-l14-linearMSE`: how pleasant a picture is, whatever it shows.

    aesthetic = <w, x> + b        x: unit vector of OpenAI's CLIP ViT-L/14; 1 to 10, usually 4.5 to 6.8

The published head is five linear layers with dropout between, so it is folded to one (`evaluators.heads`). Saturated
and over-sharpened pictures climb it: show another number beside it.

Source: Schuhmann, improved-aesthetic-predictor, 2022.
"""

from __future__ import annotations

from collections.abc import Sequence

from jaxtyping import Float
from torch import Tensor

from evaluators.heads import Affine, fold
from evaluators.scorer import Card
from evaluators.towers import ClipTower, TowerScorer
from evaluators.weights import Weights, find, fingerprint, read_tensors
from mmalign.precision import Precision

TOWER = Weights(
    name="clip-vit-large-patch14",
    repo="openai/clip-vit-large-patch14",
    gigabytes=1.7,
    licence="MIT (card: for research)",
)
HEAD = Weights(
    name="aesthetic",
    repo="christophschuhmann/improved-aesthetic-predictor",
    file="sac+logos+ava1-l14-linearMSE.pth",
    page="https://github.com/christophschuhmann/improved-aesthetic-predictor",
    gigabytes=0.0037,
    licence="Apache-2.0",
)
CARD = Card(
    unit="1 to 10, usually 4.5 to 6.8",
    licence="head Apache-2.0, tower MIT (card: for research)",
    weights=(HEAD, TOWER),
)


class AestheticScorer(TowerScorer):
    """See the module's docstring; what the prompts say changes nothing."""

    def __init__(self, tower: ClipTower, head: Affine, precision: Precision) -> None:
        self._head = head
        super().__init__("aesthetic", "2", tower, precision)

    def values(self, prompts: Sequence[str], features: Float[Tensor, "images width"]) -> Float[Tensor, " images"]:
        return self._head(features)

    def _fingerprint(self) -> str:
        return fingerprint(self.tower.fingerprint, self._head.weight, self._head.bias)


def build(
    path: str | None = None,
    tower: str | None = None,
    device: str | None = None,
    precision: Precision = "fp32",
    download: bool = False,
) -> AestheticScorer:
    """The predictor; `path` is its head, `tower` the CLIP below it."""
    file = find(HEAD, path, download=download)
    clip = ClipTower(find(TOWER, tower, download=download), device, precision)
    return AestheticScorer(clip, fold(read_tensors(file), width=clip.width, place=str(file)), precision)
