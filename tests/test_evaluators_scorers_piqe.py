"""No-reference quality: the formula block by block, and that disturbed pictures are worse."""

from __future__ import annotations

import io
import math

import numpy as np
import pytest
from PIL import Image, ImageFilter

from evaluators.scorer import Scorer, load, main_scores
from evaluators.scorers.piqe import normalised, piqe


def photo(seed: int = 0, width: int = 160, height: int = 128) -> Image.Image:
    """Noise with the spectrum of photographs, 1 / frequency, seen through a lens that is a little soft."""
    rng = np.random.default_rng(seed)
    down, across = np.meshgrid(np.fft.fftfreq(height), np.fft.fftfreq(width), indexing="ij")
    amplitude = 1 / np.maximum(np.hypot(down, across), 1 / width)
    field = np.fft.ifft2(amplitude * np.exp(2j * np.pi * rng.random((height, width)))).real
    sharp = Image.fromarray(np.uint8(255 * (field - field.min()) / np.ptp(field))).convert("RGB")
    return sharp.filter(ImageFilter.GaussianBlur(0.7))


def noisy(image: Image.Image, deviation: float) -> Image.Image:
    noise = np.random.default_rng(1).normal(0, deviation, (image.height, image.width, 3))
    return Image.fromarray(np.uint8(np.clip(np.asarray(image) + noise, 0, 255)))


def quality(*images: Image.Image) -> list[float]:
    return main_scores(load("piqe"), ["x"] * len(images), images)


def by_hand(grey: np.ndarray) -> float:
    """The formula, a block and a segment at a time, for a picture of whole blocks."""
    even, total, counting = normalised(grey), 0.0, 0
    for top in range(0, grey.shape[0], 16):
        for left in range(0, grey.shape[1], 16):
            block = even[top : top + 16, left : left + 16]
            v = block.var(ddof=1)
            if v <= 0.1:
                continue
            counting += 1
            edges = (block[0], block[15], block[:, 0], block[:, 15])
            if any(edge[start : start + 6].std(ddof=1) < 0.1 for edge in edges for start in range(11)):
                total += 1 - v
            ratio = block[:, 7:9].std(ddof=1) / np.hstack([block[:, :7], block[:, 9:]]).std(ddof=1)
            if math.sqrt(v) > 2 * abs(math.sqrt(v) - ratio) / max(math.sqrt(v), ratio):
                total += v
    return 100 * (1 + total) / (1 + counting)


def test_the_score_is_the_formula() -> None:
    for image in (photo(), photo(1).filter(ImageFilter.GaussianBlur(1)), noisy(photo(2), 20)):
        grey = np.asarray(image.convert("L"), np.float64)
        assert 1 < piqe(grey) < 100 and piqe(grey) == pytest.approx(by_hand(grey), abs=1e-9)


def test_the_window_is_gaussian_and_goes_on_at_the_edges() -> None:
    assert np.abs(normalised(np.full((20, 20), 77.0))).max() < 1e-9
    point = np.zeros((21, 21))
    point[10, 10] = 100.0
    weights = np.exp(-(np.arange(-3, 4) ** 2) / (2 * (7 / 6) ** 2))
    window = np.outer(weights, weights) / weights.sum() ** 2
    mean = 100 * window
    expected = (point[7:14, 7:14] - mean) / (np.sqrt(100 * mean - mean**2) + 1)
    assert np.allclose(normalised(point)[7:14, 7:14], expected)


@pytest.mark.parametrize("seed", range(3))
def test_disturbed_pictures_are_worse(seed: int) -> None:
    image = photo(seed)
    for worse in (
        [image.filter(ImageFilter.GaussianBlur(radius)) for radius in (1, 2, 4)],
        [noisy(image, deviation) for deviation in (15, 30, 60)],
        [blocky(image, at) for at in (40, 15, 5)],
    ):
        values = quality(image, *worse)
        assert values == sorted(values, reverse=True) and values[-1] < values[0] - 10


def blocky(image: Image.Image, at: int) -> Image.Image:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=at)
    return Image.open(buffer).convert("RGB")


def test_a_batch_is_its_pictures_of_any_size() -> None:
    images = [photo(), photo(1, 50, 33), Image.new("RGB", (5, 3), "red"), noisy(photo(3), 9).convert("L")]
    together = load("piqe").score_images(["a", "b", "c", "d"], images)
    assert together == [load("piqe").score_images(["other"], [image])[0] for image in images]
    assert together[2] == {"quality": 0.0, "piqe": 100.0}  # nothing in it
    assert all(row["quality"] == 100 - row["piqe"] for row in together)
    assert isinstance(load("piqe"), Scorer) and load("piqe").main == "quality"
