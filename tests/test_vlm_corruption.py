"""POVID's noise and mDPO's crops: the published levels, both conversions, sizes, and draws that repeat."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from vlm.corruption import blank, crop, noised, signal_levels


def flat(value: int, size: tuple[int, int] = (64, 48)) -> Image.Image:
    return Image.new("RGB", size, (value,) * 3)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_published_levels() -> None:
    levels = signal_levels()
    published = {
        100: 0.996589, 200: 0.987795, 300: 0.962329, 400: 0.892760, 499: 0.746675, 500: 0.744799, 600: 0.539118,
        999: 0.081249,
    }  # fmt: skip
    for step, level in published.items():
        assert abs(float(levels[step]) - level) < 1e-6
    assert (levels.diff() < 0).all()


def test_noise_has_the_level_and_size_it_should() -> None:
    image = flat(128, (300, 200))
    values = np.asarray(noised(image, 200, seeded()), dtype=np.float64) / 255
    level = float(signal_levels()[200])
    assert values.shape == (200, 300, 3)
    assert abs(values.mean() - level**0.5 * 128 / 255) < 2e-3
    assert abs(values.std() - (1 - level) ** 0.5) < 2e-3
    # the first step leaves a picture nearly as it is
    assert np.abs(np.asarray(noised(image, 0, seeded()), dtype=int) - 128).max() < 8


def test_values_beyond_black_and_white_are_clamped_or_wrapped() -> None:
    image = flat(255)
    clamped, wrapped = (np.asarray(noised(image, 500, seeded(), overflow=way)) for way in ("clamp", "wrap"))
    level = float(signal_levels()[500])
    noise = torch.randn(3, 48, 64, generator=seeded()).permute(1, 2, 0).numpy()
    exact = level**0.5 + (1 - level) ** 0.5 * noise
    beyond, inside = exact > 1.01, (exact > 0.01) & (exact < 0.99)
    assert beyond.mean() > 0.3
    assert (clamped[beyond] == 255).all()
    assert np.abs(clamped[inside] - exact[inside] * 255).max() <= 0.51
    assert (wrapped == (exact.astype(np.float32) * np.float32(255)).astype(np.int64) % 256).mean() > 0.999
    assert wrapped[beyond].mean() < 100  # whites have become blacks


def test_crops_keep_the_share_they_should() -> None:
    # each pixel tells where it is from: its column in red, its row in green
    columns, rows = np.meshgrid(np.arange(240), np.arange(200))
    image = Image.fromarray(np.stack([columns, rows, rows * 0], axis=-1).astype(np.uint8))
    shares, corners = [], set()
    for seed in range(200):
        made = crop(image, seeded(seed), (0.01, 0.2))
        assert made.size == image.size
        values = np.asarray(made).astype(float)
        spans = [values[..., channel].max() - values[..., channel].min() + 1 for channel in (0, 1)]
        shares.append(spans[0] * spans[1] / (240 * 200))
        corners.add((values[0, 0, 0] // 60, values[0, 0, 1] // 50))
    assert 0.008 < min(shares) < 0.03 and 0.17 < max(shares) < 0.22
    assert 0.08 < np.mean(shares) < 0.13
    assert len(corners) > 10  # from everywhere
    assert crop(image, seeded(1), (1.0, 1.0)).size == image.size


@pytest.mark.parametrize("make", [lambda image, g: noised(image, 500, g), lambda image, g: crop(image, g, (0.01, 0.2))])
def test_equal_generators_draw_equal_pictures(make: object) -> None:
    assert callable(make)
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8))
    one, same, other = make(image, seeded(1)), make(image, seeded(1)), make(image, seeded(2))
    assert one.tobytes() == same.tobytes() != other.tobytes()


def test_blank_has_the_size_and_nothing_else() -> None:
    assert blank(flat(7, (5, 9))).getcolors() == [(45, (128, 128, 128))]
