"""How disturbed a picture is by noise, blocks and blur, by itself: PIQE, which needs no reference and no model.

    I^     (I - mu) / (sigma + 1), with mean and deviation under a Gaussian window of 7 x 7 pixels, I of 0 to 255
    v      variance of I^ in a block of 16 x 16; blocks of v <= 0.1 are flat and do not count
    edge   D += 1 - v where 6 pixels in a row at one of the block's edges deviate by less than 0.1
    noise  D += v     where sqrt(v) > 2 |sqrt(v) - r| / max(sqrt(v), r), r the deviation of the two middle columns over
                      that of the others
    piqe = 100 (1 + sum of D) / (1 + counting blocks)           0 to 100, lower is better; 100 for a flat picture
    quality = 100 - piqe                                        higher is better

It sees disturbance, not beauty or sense: a smooth drawing is poor by it, and a little grain does good. Compare models
on the same prompts at the same size. Other implementations stretch a picture to its brightest pixel first, and so
differ where that is not white.

Source: Venkatanath et al., Blind image quality evaluation using perception based features, NCC 2015.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float
from numpy import ndarray
from numpy.lib.stride_tricks import sliding_window_view
from PIL import Image

from evaluators.scorer import Card

BLOCK, SEGMENT = 16, 6  # pixels
ACTIVE, FLAT_EDGE = 0.1, 0.1  # variance from which a block counts, deviation below which an edge is a block's
WINDOW, SPREAD = 7, 7 / 6  # pixels
CARD = Card(unit="100 - PIQE, 0 to 100", licence="Apache-2.0")


class Piqe:
    """See the module's docstring; what the prompts say changes nothing."""

    identity, main, numbers = "piqe@1", "quality", ("quality", "piqe")

    def score_images(self, prompts: Sequence[str], images: Sequence[Image.Image]) -> list[dict[str, float]]:
        """See `Scorer`."""
        values = [piqe(np.asarray(image.convert("L"), np.float64)) for _, image in zip(prompts, images, strict=True)]
        return [{"quality": 100 - value, "piqe": value} for value in values]


def piqe(grey: Float[ndarray, "height width"]) -> float:
    """PIQE of a grey picture of 0 to 255; its edges are mirrored up to whole blocks."""
    height, width = grey.shape
    whole = np.pad(grey, ((0, -height % BLOCK), (0, -width % BLOCK)), mode="symmetric")
    rows, columns = (size // BLOCK for size in whole.shape)
    blocks = normalised(whole).reshape(rows, BLOCK, columns, BLOCK).swapaxes(1, 2).reshape(-1, BLOCK, BLOCK)
    variance = blocks.var(axis=(1, 2), ddof=1)
    blocks, variance = blocks[variance > ACTIVE], variance[variance > ACTIVE]
    edges = np.stack([blocks[:, 0], blocks[:, -1], blocks[:, :, 0], blocks[:, :, -1]], axis=1)
    disturbed = (sliding_window_view(edges, SEGMENT, axis=2).std(axis=3, ddof=1) < FLAT_EDGE).any(axis=(1, 2))
    middle = [BLOCK // 2 - 1, BLOCK // 2]
    inside, around = blocks[:, :, middle], np.delete(blocks, middle, axis=2)
    ratio = inside.std(axis=(1, 2), ddof=1) / np.maximum(around.std(axis=(1, 2), ddof=1), 1e-12)
    deviation = np.sqrt(variance)
    noisy = deviation > 2 * np.abs(deviation - ratio) / np.maximum(deviation, ratio)
    total = (disturbed * (1 - variance) + noisy * variance).sum()
    return float(100 * (1 + total) / (1 + len(blocks)))


def normalised(grey: Float[ndarray, "height width"]) -> Float[ndarray, "height width"]:
    """The picture without its local mean and contrast; pixels beyond its edges are those at the edges."""
    mean = _blurred(grey)
    deviation = np.sqrt(np.abs(_blurred(grey * grey) - mean * mean))
    result: np.ndarray = (grey - mean) / (deviation + 1)
    return result


def _blurred(picture: Float[ndarray, "height width"]) -> Float[ndarray, "height width"]:
    half = WINDOW // 2
    weights = np.exp(-(np.arange(-half, half + 1) ** 2) / (2 * SPREAD**2))
    for axis in (0, 1):
        beyond = [(half, half) if axis == side else (0, 0) for side in (0, 1)]
        picture = sliding_window_view(np.pad(picture, beyond, mode="edge"), WINDOW, axis=axis) @ (
            weights / weights.sum()
        )
    return picture


def build() -> Piqe:
    """The quality; there is nothing to choose."""
    return Piqe()
