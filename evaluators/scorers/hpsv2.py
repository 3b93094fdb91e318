"""Human Preference Score v2 and v2.1: fine-tunes of OpenCLIP's ViT-H/14 on HPDv2.

    hpsv2 = cosine(prompt, picture)        usually 0.20 to 0.35; tables print 100 times this

v2 and v2.1 are different scores, and either compares pictures of one prompt only. Pictures are letterboxed with black
before they are normalised. Numbers in fp16, which is how tables are made, differ by about 0.001.

Source: Wu et al. 2306.09341.
"""

from __future__ import annotations

from evaluators.scorer import Card
from evaluators.towers import CosineScorer, OpenClipTower
from evaluators.weights import Weights, find
from mmalign.errors import UserError, nearest
from mmalign.precision import Precision

# 986 M parameters, of 2 bytes or of 4: which of the two the files have is not known here
FILES = {
    version: Weights(name="hpsv2", repo="xswu/HPSv2", file=file, gigabytes=3.9, licence="Apache-2.0")
    for version, file in (("2.1", "HPS_v2.1_compressed.pt"), ("2.0", "HPS_v2_compressed.pt"))
}
CARD = Card(
    unit="cosine, usually 0.20 to 0.35; tables print 100 times this",
    licence="Apache-2.0",
    weights=(FILES["2.1"],),
)


def build(
    version: str = "2.1",
    path: str | None = None,
    device: str | None = None,
    precision: Precision = "fp32",
    download: bool = False,
    architecture: str = "ViT-H-14",
) -> CosineScorer:
    """HPSv2 of a version; `path` is its checkpoint, of open_clip's `architecture`."""
    if version not in FILES:
        raise UserError(f"HPSv2 has no version '{version}'", fix=nearest(version, FILES))
    file = find(FILES[version], path, download=download)
    tower = OpenClipTower(file, architecture, fit="longest", device=device, precision=precision)
    return CosineScorer("hpsv2", version, tower, precision)
