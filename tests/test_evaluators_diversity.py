"""Diversity and degenerate pictures, on pictures of which both are known."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from PIL import Image

from evaluators.diversity import (
    ImageFeatures,
    across,
    copies,
    cosine_distances,
    degenerate,
    distances,
    diversity,
    pixel_distances,
    within,
)
from evaluators.scorer import load
from mmalign.errors import UserError
from mmalign.shapes.render import render
from mmalign.shapes.scenes import draw_scenes, parse

SCENES = draw_scenes(40, split="heldout", seed=3)
GOOD = [Image.fromarray(render(scene, number)) for number, scene in enumerate(SCENES)]
CAPTIONS = [scene.caption for scene in SCENES]


def plain(level: float, size: int = 32, colour: tuple[float, float, float] = (1, 1, 1)) -> Image.Image:
    picture = np.full((size, size, 3), 1.0) * np.array(colour) * level
    return Image.fromarray(np.round(255 * picture).astype(np.uint8))


def noise(seed: int, size: int = 32) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (size, size, 3), dtype=np.uint8))


# --------------------------------------------------------------------------------------------------- distances


def test_cosine_distances_are_those_of_directions() -> None:
    features = torch.tensor([[1.0, 0.0], [3.0, 0.0], [0.0, 2.0], [-1.0, 0.0]])
    expected = [[0.0, 0.0, 1.0, 2.0], [0.0, 0.0, 1.0, 2.0], [1.0, 1.0, 0.0, 1.0], [2.0, 2.0, 1.0, 0.0]]
    assert cosine_distances(features).tolist() == expected


def test_pixel_distances_are_root_mean_square_differences() -> None:
    found = pixel_distances([plain(0.2), plain(0.6, size=80), plain(0.2, size=48)])
    assert found[0, 1].item() == pytest.approx(0.4, abs=2e-3)
    assert found[0, 2].item() == 0.0
    assert torch.equal(found, found.T)
    red = pixel_distances([plain(1.0), plain(1.0, colour=(1, 0, 0))])[0, 1].item()
    assert red == pytest.approx(math.sqrt(2 / 3), abs=1e-6)


def test_pictures_of_other_modes_and_sizes_are_compared() -> None:
    image = GOOD[0]
    large = image.resize((128, 128), Image.Resampling.NEAREST).convert("RGBA")
    assert pixel_distances([image, large])[0, 1].item() < 0.01


def test_within_is_the_mean_over_prompts_and_across_over_all_pairs() -> None:
    found = torch.tensor(
        [
            [0.0, 1.0, 3.0, 9.0, 9.0, 9.0],
            [1.0, 0.0, 2.0, 9.0, 9.0, 9.0],
            [3.0, 2.0, 0.0, 9.0, 9.0, 9.0],
            [9.0, 9.0, 9.0, 0.0, 5.0, 9.0],
            [9.0, 9.0, 9.0, 5.0, 0.0, 9.0],
            [9.0, 9.0, 9.0, 9.0, 9.0, 0.0],
        ]
    )
    groups = ["a", "a", "a", "b", "b", "alone"]
    assert within(found, groups) == pytest.approx((2.0 + 5.0) / 2)
    assert across(found) == pytest.approx((1 + 2 + 3 + 5 + 11 * 9) / 15)
    assert diversity(found, groups) == within(found, groups)
    assert diversity(found, list("abcdef")) == across(found)
    order = [4, 0, 5, 2, 3, 1]  # pictures of one prompt need not be together
    assert within(found[order][:, order], [groups[index] for index in order]) == pytest.approx(3.5)


def test_without_a_pair_there_is_no_diversity() -> None:
    with pytest.raises(UserError, match="two pictures of a prompt"):
        within(torch.zeros(2, 2), ["a", "b"])
    with pytest.raises(UserError, match="at least two pictures"):
        across(torch.zeros(1, 1))


@pytest.mark.parametrize("space", ["pixels", "clip"])
def test_collapse_is_a_loss_of_diversity(space: str) -> None:
    scorer = load("clip", {"device": "cpu"}) if space == "clip" else None
    assert scorer is None or isinstance(scorer, ImageFeatures)
    collapsed = [GOOD[0]] * 10
    scene = parse("a red circle")
    assert scene is not None
    similar = [Image.fromarray(render(scene, seed)) for seed in range(10)]
    values = [across(distances(images, scorer)) for images in (collapsed, similar, GOOD[:10])]
    assert values[0] == pytest.approx(0.0, abs=1e-6)
    assert 0.001 < values[1] < values[2]


# -------------------------------------------------------------------------------------------------- degenerate


def test_pictures_of_the_world_are_not_degenerate() -> None:
    found = degenerate(GOOD, CAPTIONS)
    assert (found.share, found.flat, found.garish, found.noise, found.copies) == (0.0, 0.0, 0.0, 0.0, 0.0)


def test_each_kind_is_counted_and_a_picture_only_once() -> None:
    garish = np.asarray(GOOD[1]).copy()
    garish[:, :20] = (255, 0, 255)
    bad = [plain(0.5), noise(0), Image.fromarray(garish), plain(1.0, colour=(1, 0, 0)), GOOD[2], GOOD[2]]
    prompts = ["a", "b", "c", "d", "e", "f"]
    found = degenerate(bad + GOOD[3:9], prompts + CAPTIONS[3:9])
    assert found.flat == pytest.approx(2 / 12)  # grey and red
    assert found.noise == pytest.approx(1 / 12)
    assert found.garish == pytest.approx(2 / 12)  # red is both
    assert found.copies == pytest.approx(2 / 12)
    assert found.share == pytest.approx(6 / 12)


def test_a_faint_but_visible_object_is_not_flat() -> None:
    picture = np.full((100, 100, 3), 0.5)
    picture[:20, :10] += 0.2  # 2 % of the picture
    faint = Image.fromarray(np.round(255 * picture).astype(np.uint8))
    rng = np.random.default_rng(0)
    grainy = Image.fromarray((128 + rng.integers(-3, 4, (100, 100, 3))).astype(np.uint8))
    assert degenerate([faint], ["a"]).share == 0.0
    found = degenerate([grainy], ["a"])
    assert (found.flat, found.noise) == (1.0, 0.0)  # plain with grain is flat, not noise too


@pytest.mark.parametrize("size", [32, 64, 200])
def test_noise_is_found_at_any_size_and_strength(size: int) -> None:
    weak = np.random.default_rng(1).normal(0.5, 0.1, (size, size, 1)).repeat(3, axis=2).clip(0, 1)
    images = [noise(2, size), Image.fromarray(np.round(255 * weak).astype(np.uint8))]
    assert degenerate(images, ["a", "b"]).noise == 1.0


def test_photographs_are_not_degenerate() -> None:
    data = pytest.importorskip("skimage.data", reason="scikit-image has the photographs")
    images = [Image.fromarray(getattr(data, name)()) for name in ("chelsea", "coffee", "rocket", "astronaut")]
    assert degenerate(images, ["cat", "coffee", "rocket", "astronaut"]).share == 0.0


def test_black_and_white_alone_are_not_garish() -> None:
    picture = np.full((32, 32, 3), 255, dtype=np.uint8)
    picture[8:24, 8:24] = 0
    assert degenerate([Image.fromarray(picture)], ["a"]).share == 0.0


def test_copies_count_across_prompts_only() -> None:
    nearly = np.asarray(GOOD[0]).astype(int) + np.random.default_rng(0).integers(-2, 3, (32, 32, 3))
    images = [GOOD[0], Image.fromarray(nearly.clip(0, 255).astype(np.uint8)), GOOD[1], GOOD[1]]
    assert copies(images, ["a", "b", "c", "c"]).tolist() == [True, True, False, False]


def test_another_shape_in_the_same_place_is_no_copy() -> None:
    captions = ["a red circle", "a red square", "a red triangle"]
    scenes = [parse(caption) for caption in captions]
    images = [Image.fromarray(render(scene, 5)) for scene in scenes if scene is not None]
    assert not copies(images, captions).any()


def test_pictures_of_one_pixel_break_nothing() -> None:
    assert degenerate([plain(0.5, size=1), plain(0.9, size=1)], ["a", "b"]).flat == 1.0
